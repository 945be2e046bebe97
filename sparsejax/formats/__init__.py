"""Arrays that kernels read: which blocks are kept, and the kept blocks alone."""

from sparsejax.formats._bits import WORD as WORD
from sparsejax.formats._bits import bit_of_rank as bit_of_rank
from sparsejax.formats._bits import count_bits as count_bits
from sparsejax.formats._bits import to_words as to_words
from sparsejax.formats._block_mask import BlockMask as BlockMask
from sparsejax.formats._block_mask import check_block_shape as check_block_shape
from sparsejax.formats._block_sparse import BlockSparse as BlockSparse
from sparsejax.formats._block_sparse import block_positions as block_positions
from sparsejax.formats._block_sparse import block_slots as block_slots
from sparsejax.formats._key_lists import KeyLists as KeyLists
from sparsejax.formats._pairs import are_few as are_few
from sparsejax.formats._pairs import count_if_few as count_if_few
from sparsejax.formats._reshape import reshape_stepwise as reshape_stepwise
from sparsejax.formats._rows import map_rows as map_rows
