"""The tiles that do not fill a last round, cut so that all programs share them.

Tiles of equal length are taken in rounds, one by each program. Where few are left for
the last round, most programs would have nothing to do in it. So these tiles are cut:
their steps stand in one row, each program adds up an equal run of them, and the pieces
of a tile are added up afterwards, in the order of the programs.

Programs that are at the same step of different tiles read the same rows, which the
second level of cache then has. So all tiles are cut at the same steps if there are two
programs or more for each, even if some have nothing to do then.
"""

import dataclasses

import jax
import jax.numpy as jnp

# A cut costs about as much as so many steps of all programs: the sums of a piece are
# written and read in float32, by one more kernel.
_COST = 16
_SHORTEST = 16  # steps of a piece, about


@dataclasses.dataclass(frozen=True)
class Split:
    """Which tiles are cut, and how; scalar arithmetic that each program does itself.

    Attributes:
      whole: how many tiles are not cut, those before all others; int32.
      left: how many are cut; int32, below `programs`.
      steps: of a tile.
      programs: that share the work.
    """

    whole: jax.Array
    left: jax.Array
    steps: int
    programs: int

    @classmethod
    def of(cls, num_tiles: jax.Array, steps: int, programs: int) -> "Split":
        """Cuts what is left after whole rounds, if programs would be idle for long.

        Args:
          num_tiles: int32.
          steps: of a tile, see `may_cut`.
          programs: that share the work.
        """
        left = jax.lax.rem(num_tiles, programs)
        worth_it = (programs - left) * steps >= _COST * programs
        left = jnp.where(worth_it, left, 0)
        return cls(num_tiles - left, left, steps, programs)

    @property
    def _total(self) -> jax.Array:
        return self.left * self.steps

    @property
    def _runs(self) -> jax.Array:
        """How many programs have a run; none is too short, nor lies in three tiles."""
        long_enough = jax.lax.div(self._total, _SHORTEST)
        most = jnp.clip(long_enough, 1, self.programs)
        left = jnp.maximum(self.left, 1)
        of_each = jax.lax.div(most, left)
        return jnp.where(of_each > 1, of_each * left, most)

    def run(self, program: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the run of a program begins and ends, in steps of all cut tiles.

        It lies in at most two tiles, and is empty for programs that have none.
        """

        def cut(number):
            number = jnp.minimum(number, self._runs)
            return jax.lax.div(number * self._total, self._runs)

        return cut(program), cut(program + 1)

    def piece(self, program: jax.Array, n: jax.Array) -> jax.Array:
        """A program's piece of the n-th cut tile, a number below `2 * programs`."""
        return 2 * program + n - jax.lax.div(self.run(program)[0], self.steps)

    def programs_of(self, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first program with a piece of the n-th cut tile, and one past the last.

        Programs `p` with `p * total // runs < (n + 1) * steps` begin before its end,
        those with `(p + 1) * total // runs > n * steps` end after its begin.
        """
        total = jnp.maximum(self._total, 1)

        def past(step):
            """The number of programs that begin before a step."""
            return jax.lax.div(step * self._runs + total - 1, total)

        return past(n * self.steps + 1) - 1, past((n + 1) * self.steps)


def may_cut(steps: int, programs: int) -> bool:
    """Whether tiles of so many steps are ever worth a cut, and countable in int32."""
    return steps >= max(_COST, 2 * _SHORTEST) and steps * programs**2 < 2**31
