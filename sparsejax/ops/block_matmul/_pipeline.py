"""The pattern of the kernels for Hopper: one warpgroup loads, two multiply.

The third warpgroup walks over the program's tiles and copies what each step needs into
a ring of slots, as far ahead as there are free slots, also into the next tile. The
other two walk over the same tiles and multiply what is there. What they have summed
they store during the first steps of the tile after, a part in each, while the tensor
cores work: copies into the ring stand before it in the queue, and waiting for them took
a fifth of the time at density 0.25.
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
# With fewer, walks over short lists, which the compiler unrolls, spill.
_COPYING_REGISTERS = 56

Tile = tuple[jax.Array, ...]  # int32, the first at least 0
Source = Any  # where the blocks of a step lie: scalars


@dataclasses.dataclass(frozen=True)
class Task:
    """What one program does, in terms of its tiles.

    Attributes:
      walk: takes `visit(tile, carry) -> carry` and a first carry; visits the tiles of
        this program in order and gives the last carry.
      num_steps: of a tile, int32; may be 0.
      source: `(tile, step)` reads from the lists what `load` needs; also of a step that
        the tile does not have.
      load: `(tile, source, step, slot, full)` starts the copies of a step into a slot;
        they arrive at the barrier `full`.
      multiply: `(sums, slot, warpgroup)` starts the products of a slot, one for each
        of the sums.
      finish: `(tile, sums, number, warpgroup)` gives what is stored of float32 sums;
        called for each, by number.
      store: `(tile, values, part, warpgroup)` stores a part of it; its copies read
        shared memory that no other warpgroup uses. `values` are of all sums.
      parts: of a tile; 0 if `finish` stores, and gives nothing.
      aside: what the warpgroup that loads does besides; or None.
    """

    walk: Callable[[Callable[[Tile, Any], Any], Any], Any]
    num_steps: Callable[[Tile], jax.Array]
    source: Callable[[Tile, jax.Array], Source]
    load: Callable[[Tile, Source, jax.Array, jax.Array, Any], None]
    multiply: Callable[[tuple[Any, ...], jax.Array, jax.Array], None]
    finish: Callable[[Tile, jax.Array, int, jax.Array], jax.Array | None]
    store: Callable[[Tile, tuple[jax.Array, ...], int, jax.Array], None]
    parts: int
    aside: "Aside | None" = None


@dataclasses.dataclass(frozen=True)
class Aside:
    """What a warpgroup does besides loading.

    Attributes:
      begin: before the first load.
      after: `(step)`, after the load of each of the program's steps.
      end: after the last.
    """

    begin: Callable[[], None]
    after: Callable[[jax.Array], None]
    end: Callable[[], None]


def run(
    make_task: Callable[[dict[str, Any]], Task],
    *,
    operands: dict[str, jax.Array],
    out_type: jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    sums_shape: tuple[int, int],
    num_sums: int,
    no_tile: tuple[int, ...],
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
      num_sums: of that shape that it has.
      no_tile: like a tile, the first number negative.
      stages: slots of the ring.
      copies: that `load` starts for a slot.
      programs: the length of the grid.
    """
    assert stages >= 2, stages

    def copying(refs):
        _load_all(make_task(refs), refs["full"], refs["empty"], stages)

    def computing(refs, warpgroup):
        task = make_task(refs)
        zeros = None
        if task.parts:
            zeros = jnp.zeros(sums_shape, out_type.dtype)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        nothing = tuple(jnp.int32(n) for n in no_tile), (zeros,) * num_sums
        accumulators = [plgpu.WGMMAAccumulatorRef(sums_shape, jnp.float32)] * num_sums
        _multiply_all(
            task, refs["full"], refs["empty"], stages, nothing, accumulators, warpgroup
        )

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
        copying_registers=_COPYING_REGISTERS,
    )["out"]


def _load_all(task: Task, full, empty, stages: int) -> None:
    aside = task.aside

    def visit(tile, done):
        num_steps = task.num_steps(tile)

        def step(i, source):
            slot = jax.lax.rem(done + i, stages)
            following = task.source(tile, i + 1)  # is read while a slot is waited for

            @pl.when(done + i >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            task.load(tile, source, i, slot, full.at[slot])
            if aside is not None:
                aside.after(done + i)
            return following

        jax.lax.fori_loop(0, num_steps, step, task.source(tile, jnp.int32(0)))
        return done + num_steps

    if aside is not None:
        aside.begin()
    task.walk(visit, jnp.int32(0))
    if aside is not None:
        aside.end()


def _multiply_all(
    task: Task, full, empty, stages, nothing, accumulators, warpgroup
) -> None:
    def visit(tile, carry):
        done, previous, values = carry
        num_steps = task.num_steps(tile)

        def free(i):
            plgpu.barrier_arrive(empty.at[jax.lax.rem(done + i, stages)])

        def store_if(condition, part):
            @pl.when(condition & (previous[0] >= 0))
            def _():
                task.store(previous, values, part, warpgroup)

        def add_up(*sums):
            def step(i, _):
                slot = jax.lax.rem(done + i, stages)
                plgpu.barrier_wait(full.at[slot])
                task.multiply(sums, slot, warpgroup)
                for part in range(task.parts):
                    store_if(i == part, part)
                # these products go on; those before are over and their slot free
                plgpu.wgmma_wait(len(sums))

                @pl.when(i > 0)
                def _():
                    free(i - 1)

                return _

            jax.lax.fori_loop(0, num_steps, step, None)
            for part in range(task.parts):  # of which there was no step
                store_if(part >= num_steps, part)
            found = [of_one[...] for of_one in sums]  # waits for the last products

            @pl.when(num_steps > 0)
            def _():
                free(num_steps - 1)

            return tuple(
                task.finish(tile, of_one, number, warpgroup)
                for number, of_one in enumerate(found)
            )

        return done + num_steps, tile, pl.run_scoped(add_up, *accumulators)

    _, last, values = task.walk(visit, (jnp.int32(0), *nothing))

    @pl.when(last[0] >= 0)
    def _():
        for part in range(task.parts):
            task.store(last, values, part, warpgroup)
