"""Flax NNX layers: thin shells around pure functions, which `models` is built from."""

from sparsejax.nn._attention import Attention as Attention
from sparsejax.nn._block_attention import BlockAttention as BlockAttention
from sparsejax.nn._block_attention import BlockSelector as BlockSelector
from sparsejax.nn._block_masks import set_block_masks as set_block_masks
from sparsejax.nn._block_sparse_ffn import BlockSparseFFN as BlockSparseFFN
from sparsejax.nn._block_sparse_linear import BlockSparseLinear as BlockSparseLinear
from sparsejax.nn._block_sparse_linear import Topology as Topology
from sparsejax.nn._gated_ffn import GatedFFN as GatedFFN
from sparsejax.nn._linear import is_plain_linear as is_plain_linear
from sparsejax.nn._pyramid_attention import PyramidAttention as PyramidAttention
from sparsejax.nn._rope import apply_rope as apply_rope
from sparsejax.nn._seer_attention import GateLoss as GateLoss
from sparsejax.nn._seer_attention import GateParam as GateParam
from sparsejax.nn._seer_attention import SeerAttention as SeerAttention
from sparsejax.nn._seer_attention import pop_gate_losses as pop_gate_losses
from sparsejax.nn._spark_attention import SparkAttention as SparkAttention
from sparsejax.nn._spark_ffn import SparkFFN as SparkFFN
