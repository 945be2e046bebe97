"""The pattern of the kernels for Hopper: one warpgroup loads, two multiply.

The third warpgroup walks over the program's tiles and copies what each step needs into
a ring of slots, as far ahead as there are free slots, also into the next tile. The
other two walk over the same tiles, multiply what is there and store the sums, while the
ring fills for the tile after.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.ops._warpgroups import COMPUTING, SWIZZLED, launch

DEPTH = SWIZZLED  # of a step

Tile = Any  # what `walk` gives for one tile: a tuple of scalars


@dataclasses.dataclass(frozen=True)
class Task:
    """What one program does, in terms of its tiles.

    Attributes:
      walk: takes `visit(tile, carry) -> carry` and a first carry; visits the tiles of
        this program in order.
      num_steps: of a tile, int32; may be 0.
      load: `(tile, step, slot, full)` starts the copies of a step into a slot; they
        arrive at the barrier `full`.
      multiply: `(sums, slot, warpgroup)` starts the product of a slot, one `wgmma`.
      store: `(tile, sums, warpgroup)` stores the float32 sums of a tile; its copies
        read shared memory that no other warpgroup uses.
    """

    walk: Callable[[Callable[[Tile, jax.Array], jax.Array], jax.Array], jax.Array]
    num_steps: Callable[[Tile], jax.Array]
    load: Callable[[Tile, jax.Array, jax.Array, Any], None]
    multiply: Callable[[Any, jax.Array, jax.Array], None]
    store: Callable[[Tile, jax.Array, jax.Array], None]


def run(
    make_task: Callable[[dict[str, Any]], Task],
    *,
    operands: dict[str, jax.Array],
    out_type: jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    sums_shape: tuple[int, int],
    stages: int,
    copies: int,
    programs: int,
) -> jax.Array:
    """Runs the kernel of a task.

    Args:
      make_task: takes the references by name, that of the result as "out".
      operands: in device memory.
      out_type: of the result.
      scratch: shared memory of a program.
      sums_shape: of one warpgroup.
      stages: slots of the ring.
      copies: that `load` starts for a slot.
      programs: the length of the grid.
    """
    assert stages >= 2, stages

    def copying(refs):
        _load_all(make_task(refs), refs["full"], refs["empty"], stages)

    def computing(refs, warpgroup):
        task, full, empty = make_task(refs), refs["full"], refs["empty"]
        _multiply_all(task, full, empty, stages, sums_shape, warpgroup)

    barriers = {
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    }
    return launch(
        copying,
        computing,
        operands=operands,
        results={"out": out_type},
        scratch=scratch | barriers,
        programs=programs,
    )["out"]


def _load_all(task: Task, full, empty, stages: int) -> None:
    def visit(tile, done):
        num_steps = task.num_steps(tile)

        def step(i, _):
            slot = jax.lax.rem(done + i, stages)

            @pl.when(done + i >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            task.load(tile, i, slot, full.at[slot])
            return _

        jax.lax.fori_loop(0, num_steps, step, None)
        return done + num_steps

    task.walk(visit, jnp.int32(0))


def _multiply_all(task: Task, full, empty, stages, sums_shape, warpgroup) -> None:
    def visit(tile, done):
        num_steps = task.num_steps(tile)

        def free(i):
            plgpu.barrier_arrive(empty.at[jax.lax.rem(done + i, stages)])

        def add_up(sums):
            def step(i, _):
                slot = jax.lax.rem(done + i, stages)
                plgpu.barrier_wait(full.at[slot])
                task.multiply(sums, slot, warpgroup)
                # this product goes on; the one before is over and its slot free
                plgpu.wgmma_wait(1)

                @pl.when(i > 0)
                def _():
                    free(i - 1)

                return _

            jax.lax.fori_loop(0, num_steps, step, None)
            values = sums[...]  # waits for the last product

            @pl.when(num_steps > 0)
            def _():
                free(num_steps - 1)

            return values

        values = pl.run_scoped(
            add_up, plgpu.WGMMAAccumulatorRef(sums_shape, jnp.float32)
        )
        task.store(tile, values, warpgroup)
        return done + num_steps

    task.walk(visit, jnp.int32(0))
