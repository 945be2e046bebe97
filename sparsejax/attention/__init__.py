"""Which keys a query attends to: pure functions of queries and keys.

A selector takes queries and what it knows of the keys, budgets as counts, and returns
what a kernel reads: in a prefill a `BlockMask`, for `ops.block_attention`, in decoding
`KeyLists`, for `ops.listed_attention`. What it keeps is read off that: `pair_density`
and `KeyLists.density`.
"""

from sparsejax.attention._block_sparse import block_sparse as block_sparse
from sparsejax.attention._blocks import block_scores as block_scores
from sparsejax.attention._blocks import (
    statistical_topk_blocks as statistical_topk_blocks,
)
from sparsejax.attention._blocks import topk_blocks as topk_blocks
from sparsejax.attention._density import blocks_for_density as blocks_for_density
from sparsejax.attention._density import causal_density as causal_density
from sparsejax.attention._density import pair_density as pair_density
from sparsejax.attention._double_sparsity import KeyLabels as KeyLabels
from sparsejax.attention._double_sparsity import append_label as append_label
from sparsejax.attention._double_sparsity import double_sparsity as double_sparsity
from sparsejax.attention._double_sparsity import key_labels as key_labels
from sparsejax.attention._double_sparsity import label_scores as label_scores
from sparsejax.attention._flex_prefill import flex_prefill as flex_prefill
from sparsejax.attention._label_channels import ChannelKind as ChannelKind
from sparsejax.attention._label_channels import LabelChannels as LabelChannels
from sparsejax.attention._label_channels import channel_scores as channel_scores
from sparsejax.attention._label_channels import (
    interleaved_channels as interleaved_channels,
)
from sparsejax.attention._label_channels import select_channels as select_channels
from sparsejax.attention._masks import causal_mask as causal_mask
from sparsejax.attention._psa import kv_pyramid as kv_pyramid
from sparsejax.attention._psa import pyramid_attention as pyramid_attention
from sparsejax.attention._psa import pyramid_density as pyramid_density
from sparsejax.attention._psa_importance import (
    antidiagonal_importance as antidiagonal_importance,
)
from sparsejax.attention._psa_importance import sampled_importance as sampled_importance
from sparsejax.attention._psa_levels import mass_levels as mass_levels
from sparsejax.attention._psa_levels import pyramid_full_blocks as pyramid_full_blocks
from sparsejax.attention._psa_levels import quota_levels as quota_levels
from sparsejax.attention._psa_similarity import similarity_cap as similarity_cap
from sparsejax.attention._quest import PageBounds as PageBounds
from sparsejax.attention._quest import append_key as append_key
from sparsejax.attention._quest import page_bounds as page_bounds
from sparsejax.attention._quest import page_scores as page_scores
from sparsejax.attention._quest import quest as quest
from sparsejax.attention._seer import SeerGate as SeerGate
from sparsejax.attention._seer import init_seer_gate as init_seer_gate
from sparsejax.attention._seer import seer_scores as seer_scores
from sparsejax.attention._seer_decode import SeerCache as SeerCache
from sparsejax.attention._seer_decode import SeerDecodeGate as SeerDecodeGate
from sparsejax.attention._seer_decode import (
    append_to_seer_cache as append_to_seer_cache,
)
from sparsejax.attention._seer_decode import (
    init_seer_decode_gate as init_seer_decode_gate,
)
from sparsejax.attention._seer_decode import seer_cache as seer_cache
from sparsejax.attention._seer_decode import seer_cached_scores as seer_cached_scores
from sparsejax.attention._seer_decode import seer_decode_scores as seer_decode_scores
from sparsejax.attention._seer_decode import (
    seer_decode_threshold as seer_decode_threshold,
)
from sparsejax.attention._seer_decode import seer_decode_topk as seer_decode_topk
from sparsejax.attention._seer_select import seer_threshold as seer_threshold
from sparsejax.attention._seer_select import seer_topk as seer_topk
from sparsejax.attention._seer_target import seer_decode_target as seer_decode_target
from sparsejax.attention._seer_target import seer_loss as seer_loss
from sparsejax.attention._seer_target import seer_target as seer_target
from sparsejax.attention._slots import change_slots as change_slots
from sparsejax.attention._snapkv import ada_snapkv as ada_snapkv
from sparsejax.attention._snapkv import snapkv as snapkv
from sparsejax.attention._spark import scaled_scores as scaled_scores
from sparsejax.attention._spark import spark_attention as spark_attention
from sparsejax.attention._spark import spark_selection as spark_selection
from sparsejax.attention._sparsed import sparsed as sparsed
from sparsejax.attention._sparsed import sparsed_denoise as sparsed_denoise
from sparsejax.attention._sparsed import sparsed_dense_steps as sparsed_dense_steps
from sparsejax.attention._vertical_slash import vertical_slash as vertical_slash
