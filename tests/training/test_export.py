"""Weights come back from safetensors as they went in, zeros and dtypes included."""

import json
import re
import struct

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


def test_a_scalar_stays_one_and_a_path_may_be_a_text(tmp_path):
    path, params = str(tmp_path / "w"), {"a": jnp.float32(2), "b": jnp.ones(1)}
    training.save_weights(path, params, {})
    loaded, _ = training.load_weights(path, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, params)
    assert loaded["a"] == 2


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
            "a in .* must have the dtype int32 of `like`; got F32",
        ),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, like, message):
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.float32)}
    training.save_weights(tmp_path / "w", params, {})
    with pytest.raises(ValueError, match=message):
        training.load_weights(tmp_path / "w", like)


def test_two_leaves_of_one_name_are_refused(tmp_path):
    params = {"a.b": np.ones(1), "a": {"b": jnp.ones(1)}}
    for call in (
        lambda: training.save_weights(tmp_path / "w", params, {}),
        lambda: training.load_weights(tmp_path / "w", params),
        lambda: models.save_llama(tmp_path / "w", params, models.DecoderConfig()),
    ):
        with pytest.raises(ValueError, match=r"name of its own; got two named 'a.b'"):
            call()
    assert not (tmp_path / "w").exists()


def write_raw(path, header, data=bytes(24), *, size=None):
    """A file by hand; `header` as an object or as bytes."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    size = len(header) if size is None else size
    path.write_bytes(struct.pack("<Q", size) + header + data)


def test_dtypes_that_would_not_come_back_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(TypeError, match=r"a must be of a dtype .*float8_e4m3fn"):
        training.save_weights(path, {"a": jnp.ones(2, jnp.float8_e4m3fn)}, {})
    assert not path.exists()
    training.save_weights(path, {"a": np.ones(2)}, {})
    with pytest.raises(ValueError, match=r"a in .* got float64.*`jax_enable_x64`"):
        training.load_weights(path, {"a": np.ones(2)})


def tensor(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'{"a":%(first)s,"a":%(second)s}' % {
    b"first": json.dumps(tensor()).encode(),
    b"second": json.dumps(tensor(offsets=(24, 48))).encode(),
}
HOSTILE = {
    "huge shape": {"header": {"a": tensor(shape=(2**40, 2**40))}},
    "negative shape": {"header": {"a": tensor(shape=(-2, -3))}},
    "huge offsets": {"header": {"a": tensor(offsets=(0, 2**60))}},
    "offsets swapped": {"header": {"a": tensor(offsets=(24, 0))}},
    "overlap": {"header": {"a": tensor(), "b": tensor()}},
    "huge header": {"header": {"a": tensor()}, "size": 2**63},
    "cut header": {"header": {"a": tensor()}, "size": 10},
    "cut data": {"header": {"a": tensor()}, "data": bytes(20)},
    "more data": {"header": {"a": tensor()}, "data": bytes(28)},
    "unknown dtype": {"header": {"a": tensor("PICKLE")}},
    "a name twice": {"header": TWICE, "data": bytes(48)},
    "metadata of numbers": {"header": {"__metadata__": {"x": 1}, "a": tensor()}},
    "deep": {"header": b"[" * 50_000},
    "bytes": {"header": b"\xff\xfe{}"},
    "pickle": {"header": b"\x80\x04\x95\x0f\x00.", "size": 2**40},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_named(tmp_path, case):
    path = tmp_path / "w.safetensors"
    write_raw(path, **HOSTILE[case])
    like = {"a": np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a sound"):
        training.load_weights(path, like)


def test_what_is_read_of_a_sound_header_is_what_is_wanted(tmp_path):
    path, like = tmp_path / "w", {"a": np.zeros((2, 3), np.float32)}
    write_raw(path, {"a": tensor()})
    training.load_weights(path, like)
    for header, size, message in [
        ({"a": tensor("F64", offsets=(0, 48))}, 48, "must have the dtype.*got F64"),
        ({"a": tensor("F8_E8M0", offsets=(0, 6))}, 6, "dtype.*got F8_E8M0"),
        ({"a": tensor(shape=(3, 2))}, 24, "must have the shape"),
        ({"../../etc/passwd": tensor()}, 24, "in only one.*: ../../etc/passwd, a"),
        ({}, 0, "in only one of the two: a"),
    ]:
        write_raw(path, header, bytes(size))
        with pytest.raises(ValueError, match=message):
            training.load_weights(path, like)
    with pytest.raises(FileNotFoundError, match="missing"):
        training.load_weights(tmp_path / "missing", like)
    with pytest.raises(ValueError, match="is no file at all"):
        training.load_weights(tmp_path, like)
