"""How the Hopper kernel of `active_ffn` cuts its work; plain arithmetic."""

import dataclasses

from sparsejax.ops._hopper import COLUMNS, NUM_SMS, SHARED_BYTES, THREADS

_MAX_SUMS = 128  # float32 sums that a thread can hold beside its other registers
_MAX_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      slots: neurons in the ring of one block, at least 2.
      parts: blocks that share a neuron; each sums its part of the columns of `down`.
        All of them read the whole row of `up`, the second from the cache.
      blocks_per_sm: blocks of threads that share a multiprocessor.
      chunk: entries of a row that are in registers at a time, a multiple of 512.
      num_sms: multiprocessors of the device.
    """

    slots: int
    parts: int = 1
    blocks_per_sm: int = 1
    chunk: int = 1024
    num_sms: int = NUM_SMS

    @classmethod
    def default(cls, batch: int, d_in: int, d_model: int, itemsize: int) -> "Tiles":
        """The tiles for these shapes.

        Args:
          batch: rows of `x`.
          d_in: columns of `up`.
          d_model: columns of `down`.
          itemsize: bytes of an entry of either.

        Returns:
          The tiles. `slots` is less than 2 if shared memory is too small.

        Example:
          >>> Tiles.default(1, 4096, 4096, itemsize=2)
          Tiles(slots=5, parts=1, blocks_per_sm=2, chunk=1024, num_sms=132)
          >>> Tiles.default(8, 4096, 4096, itemsize=2)
          Tiles(slots=3, parts=2, blocks_per_sm=2, chunk=1024, num_sms=132)
        """
        length = d_model // COLUMNS
        divisors = (n for n in range(1, length + 1) if length % n == 0)
        sums = batch * d_model // THREADS
        parts = next(n for n in divisors if sums <= n * _MAX_SUMS or n == length)
        slot_bytes = (d_in + d_model // parts) * itemsize

        def slots(blocks):
            left = SHARED_BYTES // blocks - batch * d_in * itemsize
            return min(_MAX_SLOTS, left // slot_bytes)

        # one computes while the other waits for its row
        blocks_per_sm = 2 if slots(2) >= 3 else 1
        # more rows of `x` beside a chunk would not fit into the registers
        chunk = 1024 if batch <= 8 else 512
        return cls(slots(blocks_per_sm), parts, blocks_per_sm, chunk)

    @property
    def num_blocks(self) -> int:
        """Blocks of threads that have neurons of their own."""
        return max(1, self.num_sms * self.blocks_per_sm // self.parts)
