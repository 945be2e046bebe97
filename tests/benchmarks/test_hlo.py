"""Collectives are counted as often as they run, with the bytes of their results."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.parts import hlo


def test_loops_and_branches():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    rows = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharded)

    def five_sums(x):  # each an all-reduce of 4 floats
        body = lambda _, total: jnp.cos(total + x).sum(0)  # noqa: E731
        return jax.lax.fori_loop(0, 5, body, jnp.zeros(4))

    def program(x, taken):
        return jax.lax.cond(taken, five_sums, lambda x: x[0] * 0, x[:, ::-1])

    replicated = NamedSharding(mesh, PartitionSpec())
    compiled = (
        jax.jit(program, out_shardings=replicated)
        .lower(rows, jax.ShapeDtypeStruct((), bool))
        .compile()
    )
    least, most = hlo.collectives(compiled.as_text())
    assert least.bytes < most.bytes
    assert (most.count, most.bytes) == (5, 5 * 4 * 4)
    assert most.kinds == {"all-reduce"}


def test_kinds_and_tuples():
    text = """
%body (p: (f32[8])) -> (f32[8]) {
  %all-to-all.1 = (bf16[2,4]{1,0}, bf16[2,4]{1,0}) all-to-all(%a, %b), dimensions={0}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %ag = u8[16,8]{1,0} all-gather-start(%p), dimensions={0}
  %w = (f32[8]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""
    least, most = hlo.collectives(text)
    assert least == most
    assert most == hlo.Traffic(4, 128 + 3 * 32, frozenset(["all-gather", "all-to-all"]))
