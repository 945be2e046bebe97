"""A product with a block-sparse matrix, forward and backward."""

from sparsejax.ops.block_matmul._api import block_matmul as block_matmul
