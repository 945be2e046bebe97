"""Which keys a query attends to: pure functions of queries and keys."""

from sparsejax.attention._blocks import block_scores as block_scores
from sparsejax.attention._blocks import causal_density as causal_density
from sparsejax.attention._blocks import (
    statistical_topk_blocks as statistical_topk_blocks,
)
from sparsejax.attention._blocks import topk_blocks as topk_blocks
from sparsejax.attention._masks import causal_mask as causal_mask
from sparsejax.attention._spark import masked_softmax as masked_softmax
from sparsejax.attention._spark import scaled_scores as scaled_scores
from sparsejax.attention._spark import spark_attention as spark_attention
from sparsejax.attention._spark import spark_selection as spark_selection
