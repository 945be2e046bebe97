"""Operations that have kernels: for each a plain reference, and one function."""

from sparsejax.ops._activations import Activation as Activation
from sparsejax.ops._platform import Implementation as Implementation
from sparsejax.ops._shapes import broadcasts as broadcasts
from sparsejax.ops.active_ffn import active_ffn as active_ffn
from sparsejax.ops.active_ffn import active_indices as active_indices
from sparsejax.ops.active_ffn import gated_ffn as gated_ffn
from sparsejax.ops.active_ffn import has_gated_ffn_kernel as has_gated_ffn_kernel
from sparsejax.ops.block_attention import attention_peaks as attention_peaks
from sparsejax.ops.block_attention import block_attention as block_attention
from sparsejax.ops.block_attention import listed_attention as listed_attention
from sparsejax.ops.block_attention import merge_attention as merge_attention
from sparsejax.ops.block_matmul import block_matmul as block_matmul
from sparsejax.ops.gaussian_topk import AxisName as AxisName
from sparsejax.ops.gaussian_topk import gaussian_threshold as gaussian_threshold
from sparsejax.ops.gaussian_topk import gaussian_topk as gaussian_topk
from sparsejax.ops.gaussian_topk import num_entries as num_entries
from sparsejax.ops.highest_pages import highest_pages as highest_pages
from sparsejax.ops.highest_pages import page_scores as page_scores
from sparsejax.ops.keep_highest import keep_highest as keep_highest
from sparsejax.ops.spark_weights import highest as highest
from sparsejax.ops.spark_weights import kept_weights as kept_weights
from sparsejax.ops.spark_weights import spark_kept as spark_kept
from sparsejax.ops.spark_weights import spark_weights as spark_weights
