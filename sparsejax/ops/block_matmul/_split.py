"""The tiles that do not fill a last round, cut so that all programs share them.

Tiles of equal length are taken in rounds, one by each program. Where few are left for
the last round, most programs would have nothing to do in it. So these tiles are cut
into equal parts, taken in a round or two, and the parts added up afterwards, in order.

Programs that are at the same step of different tiles read the same rows, which the
second level of cache then has. So all tiles are cut at the same steps, and the first
parts of all come before the second ones.
"""

import dataclasses

import jax
import jax.numpy as jnp

# A round of parts costs about as much as so many steps of all programs: sums are
# written and read in float32, by one more kernel.
_COST = 16
_SHORTEST = 16  # steps of a part
_GAIN = 0.85  # of the time of the round, or nothing is cut
_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Split:
    """Which tiles are cut, and how; scalar arithmetic that each program does itself.

    Attributes:
      whole: how many tiles are not cut, those before all others; int32.
      left: how many are cut; int32, below the number of programs.
      parts: of each; int32.
      steps: of a tile.
    """

    whole: jax.Array
    left: jax.Array
    parts: jax.Array
    steps: int

    @classmethod
    def none(cls, num_tiles: jax.Array, steps: int) -> "Split":
        """Cuts nothing."""
        return cls(num_tiles, jnp.int32(0), jnp.int32(1), steps)

    @classmethod
    def of(cls, num_tiles: jax.Array, steps: int, programs: int) -> "Split":
        """Cuts what is left after whole rounds, if programs would be idle for long.

        Args:
          num_tiles: int32.
          steps: of a tile, see `may_cut`.
          programs: that share the work.
        """
        left = jax.lax.rem(num_tiles, programs)
        parts, cost = jnp.int32(1), jnp.int32(_GAIN * steps)
        for rounds in range(1, _ROUNDS + 1):
            most = jax.lax.div(jnp.int32(rounds * programs), jnp.maximum(left, 1))
            tried = jnp.clip(most, 1, steps // _SHORTEST)
            of_each = jax.lax.div(steps + tried - 1, tried)
            found = jax.lax.div(left * tried + programs - 1, programs)
            found *= of_each + _COST
            better = (left > 0) & (tried > 1) & (found < cost)
            parts = jnp.where(better, tried, parts)
            cost = jnp.where(better, found, cost)
        left = jnp.where(parts > 1, left, 0)
        return cls(num_tiles - left, left, parts, steps)

    @property
    def num_pieces(self) -> jax.Array:
        return self.left * self.parts

    def piece(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a piece: which of the cut tiles it is of, its first step, its steps."""
        left = jnp.maximum(self.left, 1)
        part, n = jax.lax.div(number, left), jax.lax.rem(number, left)
        first, end = (jax.lax.div(i * self.steps, self.parts) for i in (part, part + 1))
        return n, first, end - first

    def number(self, n: jax.Array, part: jax.Array) -> jax.Array:
        """That of the piece which is a part of the n-th cut tile."""
        return part * self.left + n


def most_pieces(programs: int) -> int:
    return _ROUNDS * programs


def may_cut(steps: int) -> bool:
    """Whether tiles of so many steps are ever worth a cut."""
    return steps >= 2 * _SHORTEST + _COST
