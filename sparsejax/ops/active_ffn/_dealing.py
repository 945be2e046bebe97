"""Which neurons a block of threads of the Hopper kernel takes, and in which order.

`Listed` deals the entries of a list out in turn: each block has as many as the others.
`Found` has no list: the neurons are cut into equal ranges, and in each two blocks find
those with a gate that is not 0, one from the front and one from the back, until they
meet. Some blocks then have more to do than others, by a few neurons; but a list takes
five programs to make, each of which waits for the one before: 1 to 4 us of a layer of
decoding on an H200.
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
from sparsejax.ops._activations import Activation, without_custom_rules
from sparsejax.ops.active_ffn._values import gate_values

_PIECE = 128  # neurons that one copy of gates brings, one for each thread
_ALIGNED = 8  # neurons: a copy begins at a multiple of 16 bytes
_GATES_BYTES = 10 * 1024  # of shared memory; see `_hopper.SHARED_BYTES`


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

    @property
    def num_blocks(self) -> int:
        """Blocks of threads that it deals them out to."""
        ...

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

    Of blocks that share a range, the second has its places mirrored, so that it walks
    over the neurons from the back; each takes half of them. The more neurons a range
    has, the less do their shares of active ones differ.

    Its operands: gates `[batch, d_ff]`; or scores of which a block makes gates, and
    maybe thresholds `[batch, 1]` of them.

    Attributes:
      batch: rows of gates.
      d_ff: neurons.
      num_ranges: of which the lengths differ by at most `_ALIGNED` neurons.
      sides: blocks that share a range, 1 or 2.
      activation: of what exceeds a threshold, or of scores; None for none.
    """

    batch: int
    d_ff: int
    num_ranges: int
    sides: int
    activation: Activation | None = None

    @classmethod
    def default(
        cls,
        batch: int,
        d_ff: int,
        num_blocks: int,
        itemsize: int,
        activation: Activation | None = None,
    ) -> "Found":
        """Ranges that two blocks share, or half as long ones if their gates do not fit.

        Args:
          batch: rows of gates.
          d_ff: neurons.
          num_blocks: at least 1; of an odd number one is left out, or one comes to it.
          itemsize: bytes of a gate.
          activation: see above.

        Returns:
          The dealing; `unsupported_reason` says whether it can be.
        """
        shared = cls(batch, d_ff, max(1, num_blocks // 2), 2, activation)
        if shared.unsupported_reason(itemsize) is None:
            return shared
        return cls(batch, d_ff, num_blocks, 1, activation)

    @property
    def num_blocks(self) -> int:
        return self.num_ranges * self.sides

    @property
    def window(self) -> int:
        """Neurons whose gates a block reads: a range, and maybe some around it."""
        longest = -(-self.d_ff // (self.num_ranges * _ALIGNED)) * _ALIGNED
        return -(-longest // _PIECE) * _PIECE

    @property
    def pieces(self) -> int:
        """Copies that bring a window."""
        return self.window // _PIECE

    def begins(self, number):
        """The first neuron of a range; that of the range after the last is `d_ff`."""
        aligned = number * (self.d_ff // _ALIGNED)
        return jax.lax.div(aligned, self.num_ranges) * _ALIGNED

    def unsupported_reason(self, itemsize: int) -> str | None:
        """Why these sizes cannot be taken; None if they can."""
        if self.d_ff % _ALIGNED or self.d_ff < self.window:
            return (
                f"d_ff must be a multiple of {_ALIGNED} and at least {self.window}; "
                f"got {self.d_ff}"
            )
        if self.batch * self.window * itemsize > _GATES_BYTES:
            return (
                f"the gates that one of {self.num_blocks} blocks reads must fit into "
                f"{_GATES_BYTES} bytes; got {self.batch} x {self.window} gates"
            )
        return None

    def scratch(self, dtype) -> tuple[Any, ...]:
        return (
            plgpu.SMEM((self.pieces, self.batch, _PIECE), dtype),
            plgpu.Barrier(num_arrivals=self.pieces),
        )

    def begin(self, block, operands, scratch, slots: int) -> Callable[[], Walk]:
        [gate_gmem, *threshold_gmem], [gates_smem, full] = operands, scratch
        length = self.window
        number, side = jax.lax.div(block, self.sides), jax.lax.rem(block, self.sides)
        low, high = self.begins(number), self.begins(number + 1)
        # the window of a last range begins before it
        start = jnp.minimum(low, self.d_ff - length)
        for piece in range(self.pieces):
            plgpu.copy_gmem_to_smem(
                gate_gmem.at[:, pl.ds(start + piece * _PIECE, _PIECE)],
                gates_smem.at[piece],
                full,
            )
        thresholds = [ref[b, 0] for ref in threshold_gmem for b in range(self.batch)]

        def mirrored(place):
            """The place in the window as the block counts, and back, if it is one."""
            return side * (length - 1) + (1 - 2 * side) * place

        def wait() -> Walk:
            plgpu.barrier_wait(full)
            if thresholds or self.activation is not None:
                self._activate(gates_smem, thresholds)
            places = [
                self._active(gates_smem, piece, low - start, high - start, mirrored)
                for piece in range(self.pieces)
            ]
            counts = [jnp.where(at < length, 1.0, 0.0) for at in places]
            num = jnp.sum(functools.reduce(operator.add, counts)).astype(jnp.int32)

            def following(place):
                """The next place of an active neuron; `length` if there is none."""
                later = [jnp.where(at > place, at, length) for at in places]
                return jnp.min(functools.reduce(jnp.minimum, later))

            ring = [following(jnp.int32(-1))]
            for _ in range(slots - 1):
                ring.append(following(ring[-1]))

            def neuron(place):
                return start + mirrored(place)

            def gates(_, ring):
                place = mirrored(ring[0])
                at = jax.lax.div(place, _PIECE), jax.lax.rem(place, _PIECE)
                each = range(self.batch)
                return [gates_smem[at[0], b, at[1]].astype(jnp.float32) for b in each]

            return Walk(
                # of an odd number the first side has one more
                jax.lax.div(num + (self.sides - 1) - side, self.sides),
                [neuron(place) for place in ring],
                ring,
                ahead=lambda _, ring: neuron(ring[-1]),
                gates=gates,
                advance=lambda ring: [*ring[1:], following(ring[-1])],
            )

        return wait

    def _activate(self, gates_smem, thresholds) -> None:
        """Writes gates in the place of scores."""
        activation = self.activation and without_custom_rules(self.activation)
        for piece in range(self.pieces):
            for b in range(self.batch):
                gates_smem[piece, b] = gate_values(
                    self._load(gates_smem.at[piece, b]),
                    thresholds[b] if thresholds else None,
                    activation,
                )
        plgpu.commit_smem()

    def _active(self, gates_smem, piece: int, low, high, mirrored) -> jax.Array:
        """The place of each active neuron, the window's length for the others."""
        places = plgpu.broadcasted_iota(jnp.int32, (_PIECE,), 0, layout=_layout())
        places += piece * _PIECE
        used = functools.reduce(
            operator.or_,
            (
                self._load(gates_smem.at[piece, b]).astype(jnp.float32) != 0
                for b in range(self.batch)
            ),
        )
        mine = (places >= low) & (places < high)
        return jnp.where(used & mine, mirrored(places), self.window)

    def _load(self, gates) -> jax.Array:
        """A piece of gates, one for each thread."""
        return _compat.mosaic_gpu_load(plgpu, gates, _layout())


def _layout() -> Any:
    return plgpu.Layout.WG_STRIDED((_PIECE,), vec_size=1)
