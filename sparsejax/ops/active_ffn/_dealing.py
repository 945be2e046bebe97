"""Which neurons a block of threads of the Hopper kernel takes, and in which order.

`Listed` deals the entries of a list out in turn: each block has as many as the others.
`Found` has no list: the neurons are cut into equal ranges, and a block finds in its
range those with a gate that is not 0. Some blocks then have more to do than others, by
a few neurons; but a list takes five programs to make, each of which waits for the one
before: 1 to 4 us of a layer of decoding on an H200.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat

_PIECE = 128  # neurons that one copy of gates brings, one for each thread
_ALIGNED = 8  # neurons: a copy begins at a multiple of 16 bytes
_GATES_BYTES = 10 * 1024  # of shared memory; see `_tiles.SHARED_BYTES`


class Walk(NamedTuple):
    """The neurons of one block, place by place.

    Attributes:
      num: how many.
      first: those of the first places, as many as there are slots; only the ones below
        `num` are neurons.
      state: what the walk carries from place to place, of the first place.
      ahead: (i, state of place i) -> the neuron in place i - 1 + slots, if there is.
      gates: (i, state of place i) -> its gates, float32, one for each row of the batch.
      advance: state -> that of the next place.
    """

    num: jax.Array
    first: list[jax.Array]
    state: Any
    ahead: Callable[[jax.Array, Any], jax.Array]
    gates: Callable[[jax.Array, Any], list[jax.Array]]
    advance: Callable[[Any], Any]


class Dealing(Protocol):
    """A way to deal out neurons; static, so that it may be a key of compilation."""

    def scratch(self, dtype) -> tuple[Any, ...]:
        """Types of shared memory that it needs, for gates of that dtype."""
        ...

    def begin(self, block, operands, scratch, slots: int) -> Callable[[], Walk]:
        """Asks for what it needs; the result waits for it and gives the walk."""
        ...


@dataclasses.dataclass(frozen=True)
class Listed:
    """Entries of a list, dealt out in turn.

    Its operands: gates `[batch, capacity]`, neurons `[capacity]`, their number `[1]`.
    """

    batch: int
    capacity: int
    num_blocks: int

    def scratch(self, dtype) -> tuple[Any, ...]:
        del dtype
        return ()

    def begin(self, block, operands, scratch, slots: int) -> Callable[[], Walk]:
        del scratch
        gate_gmem, indices_gmem, num_gmem = operands

        def entry(i):
            """The place in the list of this block's i-th neuron."""
            return block + i * self.num_blocks

        def neuron(i):  # read early, so maybe beyond the last one
            return indices_gmem[jnp.minimum(entry(i), self.capacity - 1)]

        # all at once: each of these reads waits for memory
        first = [neuron(i) for i in range(slots)]
        left = jnp.maximum(jnp.minimum(num_gmem[0], self.capacity) - block, 0)
        num = jax.lax.div(left + (self.num_blocks - 1), self.num_blocks)

        def gates(i, _):
            each = range(self.batch)
            return [gate_gmem[b, entry(i)].astype(jnp.float32) for b in each]

        def ahead(i, _):
            return neuron(i - 1 + slots)

        return lambda: Walk(num, first, (), ahead, gates, lambda state: state)


@dataclasses.dataclass(frozen=True)
class Found:
    """The neurons of a range whose gate is not 0 for some row of the batch.

    Its operand: gates `[batch, d_ff]`.
    """

    batch: int
    d_ff: int
    num_blocks: int

    @property
    def share(self) -> int:
        """Neurons of a range; the last ranges may have fewer."""
        return -(-self.d_ff // (self.num_blocks * _ALIGNED)) * _ALIGNED

    @property
    def pieces(self) -> int:
        """Copies that bring a range, or more of the neurons around it."""
        return -(-self.share // _PIECE)

    def unsupported_reason(self, itemsize: int) -> str | None:
        """Why these sizes cannot be taken; None if they can."""
        window = self.pieces * _PIECE
        if self.d_ff % _ALIGNED or self.d_ff < window:
            return (
                f"d_ff must be a multiple of {_ALIGNED} and at least {window}; got "
                f"{self.d_ff}"
            )
        if self.batch * window * itemsize > _GATES_BYTES:
            return (
                f"the gates that one of {self.num_blocks} blocks reads must fit into "
                f"{_GATES_BYTES} bytes; got {self.batch} x {window} gates"
            )
        return None

    def scratch(self, dtype) -> tuple[Any, ...]:
        return (
            plgpu.SMEM((self.pieces, self.batch, _PIECE), dtype),
            plgpu.Barrier(num_arrivals=self.pieces),
        )

    def begin(self, block, operands, scratch, slots: int) -> Callable[[], Walk]:
        [gate_gmem], [gates_smem, full] = operands, scratch
        length = self.pieces * _PIECE
        # the window of a last range begins before it
        start = jnp.minimum(block * self.share, self.d_ff - length)
        for piece in range(self.pieces):
            plgpu.copy_gmem_to_smem(
                gate_gmem.at[:, pl.ds(start + piece * _PIECE, _PIECE)],
                gates_smem.at[piece],
                full,
            )

        def wait() -> Walk:
            plgpu.barrier_wait(full)
            low = block * self.share - start
            places = [
                self._active(gates_smem, piece, low, length)
                for piece in range(self.pieces)
            ]
            counts = [jnp.where(at < length, 1.0, 0.0) for at in places]
            num = jnp.sum(functools.reduce(operator.add, counts)).astype(jnp.int32)

            def following(place):
                """The next place in the window; its length if there is none."""
                later = [jnp.where(at > place, at, length) for at in places]
                return jnp.min(functools.reduce(jnp.minimum, later))

            ring = [following(jnp.int32(-1))]
            for _ in range(slots - 1):
                ring.append(following(ring[-1]))

            def gates(_, ring):
                at = jax.lax.div(ring[0], _PIECE), jax.lax.rem(ring[0], _PIECE)
                each = range(self.batch)
                return [gates_smem[at[0], b, at[1]].astype(jnp.float32) for b in each]

            return Walk(
                num,
                [start + place for place in ring],
                ring,
                ahead=lambda _, ring: start + ring[-1],
                gates=gates,
                advance=lambda ring: [*ring[1:], following(ring[-1])],
            )

        return wait

    def _active(self, gates_smem, piece: int, low, length: int) -> jax.Array:
        """The place in the window of each active neuron, `length` for the others."""
        layout = plgpu.Layout.WG_STRIDED((_PIECE,), vec_size=1)
        load = functools.partial(_compat.mosaic_gpu_load, plgpu)
        places = plgpu.broadcasted_iota(jnp.int32, (_PIECE,), 0, layout=layout)
        places += piece * _PIECE
        used = functools.reduce(
            operator.or_,
            (
                load(gates_smem.at[piece, b], layout).astype(jnp.float32) != 0
                for b in range(self.batch)
            ),
        )
        mine = (places >= low) & (places < low + self.share)
        return jnp.where(used & mine, places, length)
