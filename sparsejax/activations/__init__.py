"""Activation sparsity: which entries of an activation survive; pure functions."""

from sparsejax.activations._arguments import check_k as check_k
from sparsejax.activations._arguments import quantile as quantile
from sparsejax.activations._block import (
    block_statistical_topk as block_statistical_topk,
)
from sparsejax.activations._exact import topk_activation as topk_activation
from sparsejax.activations._magnitude import magnitude_threshold as magnitude_threshold
from sparsejax.activations._statistical import statistical_glu as statistical_glu
from sparsejax.activations._statistical import (
    statistical_threshold as statistical_threshold,
)
from sparsejax.activations._statistical import statistical_topk as statistical_topk
