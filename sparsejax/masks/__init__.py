"""Scores and a pattern make masks: selection, trees of masks, packing, gradients."""

from sparsejax._straight_through import straight_through as straight_through
from sparsejax.masks._block import block_mask as block_mask
from sparsejax.masks._check import check_scores as check_scores
from sparsejax.masks._nm import nm_mask as nm_mask
from sparsejax.masks._packing import is_packable as is_packable
from sparsejax.masks._packing import pack as pack
from sparsejax.masks._packing import unpack as unpack
from sparsejax.masks._select import drop_and_grow as drop_and_grow
from sparsejax.masks._select import is_made_of as is_made_of
from sparsejax.masks._select import num_kept as num_kept
from sparsejax.masks._select import select as select
from sparsejax.masks._select import select_across as select_across
from sparsejax.masks._topk import global_topk as global_topk
from sparsejax.masks._topk import topk_mask as topk_mask
from sparsejax.masks._trees import apply_masks as apply_masks
from sparsejax.masks._trees import check_masks as check_masks
from sparsejax.masks._trees import map_masked as map_masked
