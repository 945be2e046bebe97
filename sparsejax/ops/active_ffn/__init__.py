"""Up and down projection of the active neurons alone: the FFN of a decode step."""

from sparsejax.ops.active_ffn._api import active_ffn as active_ffn
from sparsejax.ops.active_ffn._gated import gated_ffn as gated_ffn
from sparsejax.ops.active_ffn._gated import has_gated_ffn_kernel as has_gated_ffn_kernel
from sparsejax.ops.active_ffn._indices import active_indices as active_indices
