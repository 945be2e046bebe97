"""Attention over the blocks of a mask, forward and backward."""

from sparsejax.ops.block_attention._api import block_attention as block_attention
from sparsejax.ops.block_attention._listed import listed_attention as listed_attention
from sparsejax.ops.block_attention._merge import merge_attention as merge_attention
from sparsejax.ops.block_attention._peaks import attention_peaks as attention_peaks
