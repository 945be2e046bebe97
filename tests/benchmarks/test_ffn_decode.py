"""A run of `ffn_decode` that was cut off goes on; its forms agree with the library."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from benchmarks import ffn_decode
from benchmarks.parts import ffn_layers
from benchmarks.parts.ffn_layers import Case


def test_known_rows_are_kept(tmp_path):
    path, case = tmp_path / "rows.json", Case(2, 0.08)
    given = {"part": "given neurons", "batch": 2, "density": 0.08, "speedup": 3.0}
    spark = {"part": "Spark FFN", "batch": 2, "density": 0.153, "speedup": 2.0}
    rows = ffn_decode.Rows(path, {}, [spark, given])

    def never():
        pytest.fail("the row is there already")

    assert rows.of("Spark FFN", case, never) is spark
    assert rows.of("given neurons", case, never) is given
    other = given | {"density": 0.5}
    assert rows.of("given neurons", Case(2, 0.5), lambda: other) is other
    assert json.loads(path.read_text())["rows"] == [spark, given, other]


def test_forms_are_the_layer():
    """Every form of the Spark FFN gives what `sj.nn.SparkFFN` gives."""
    size = ffn_layers.Size(64, 256, 1, "float32")
    (layer,) = ffn_layers.spark_weights(size)
    weights = layer["spark"]
    ffn = sj.nn.SparkFFN(
        64,
        256,
        k=ffn_layers.SPARK_DENSITY * 256,
        split=32,
        rngs=nnx.Rngs(0),
    )
    ffn.gate.kernel[...] = weights["predictor"].T
    ffn.up.kernel[...] = weights["up"].T
    ffn.down.kernel[...] = weights["down"]
    h = jax.random.normal(jax.random.key(0), (2, 64))
    want = ffn(h)
    got = {"dense": ffn_layers.spark_dense_form(layer, h)} | {
        name: ffn_layers.spark_form(layer, h, by, capacity=256)
        for name, by in ffn_layers.implementations().items()
    }
    for name, y in got.items():
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5, err_msg=name)
    assert jnp.any(want != 0)
