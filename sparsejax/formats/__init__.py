"""Arrays that kernels read: which blocks are kept, and the kept blocks alone."""

from sparsejax.formats._block_mask import BlockMask as BlockMask
from sparsejax.formats._block_mask import check_block_shape as check_block_shape
from sparsejax.formats._block_sparse import BlockSparse as BlockSparse
from sparsejax.formats._block_sparse import block_positions as block_positions
from sparsejax.formats._block_sparse import block_slots as block_slots
from sparsejax.formats._key_lists import KeyLists as KeyLists
