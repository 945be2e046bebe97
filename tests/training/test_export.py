"""Weights come back from safetensors as they went in, zeros and dtypes included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparsejax import models, training

CONFIG = models.DecoderConfig(
    d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8
)


def make_params(dtype=jnp.float32):
    params = nnx.state(models.Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(lambda x: jnp.where(x > 0, x, 0).astype(dtype), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, dtype):
    params = make_params(dtype)
    path = tmp_path / "sparse.safetensors"
    training.save_weights(path, params, {"pattern": "2:4"})
    like = jax.eval_shape(lambda: params)
    loaded, metadata = training.load_weights(path, like)
    assert metadata == {"pattern": "2:4"}
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    chex.assert_trees_all_equal(loaded, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, params)


def test_other_readers_see_plain_names_and_zeros(tmp_path):
    params = make_params()
    training.save_weights(tmp_path / "w", params, {})
    tensors = load_file(tmp_path / "w")
    kernel = tensors["blocks.0.ffn.gate.kernel"]
    np.testing.assert_array_equal(
        kernel, params["blocks"][0]["ffn"]["gate"]["kernel"][...]
    )
    assert 0 < np.count_nonzero(kernel) < kernel.size


def test_a_transposed_view_is_stored_right(tmp_path):
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    training.save_weights(tmp_path / "w", {"x": x}, {})
    np.testing.assert_array_equal(load_file(tmp_path / "w")["x"], x)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": np.zeros((2, 3), np.float32)}, "in only one of the two: b"),
        (
            {"a": np.zeros((3, 2), np.float32), "b": np.zeros(1, np.float32)},
            r"a in .* must have the shape \(3, 2\) of `like`; got \(2, 3\)",
        ),
        (
            {"a": np.zeros((2, 3), np.int32), "b": np.zeros(1, np.float32)},
            "a in .* must have the dtype int32 of `like`; got float32",
        ),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, like, message):
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.float32)}
    training.save_weights(tmp_path / "w", params, {})
    with pytest.raises(ValueError, match=message):
        training.load_weights(tmp_path / "w", like)
