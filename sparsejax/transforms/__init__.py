"""Weight sparsity in training: optax wrappers, one file a method."""

from sparsejax.transforms import _weight_scaling as weight_scaling  # noqa: F401
from sparsejax.transforms._adams import adams as adams
from sparsejax.transforms._adams import scale_by_adams as scale_by_adams
from sparsejax.transforms._dynamic import rigl as rigl
from sparsejax.transforms._dynamic import sparse_evolution as sparse_evolution
from sparsejax.transforms._forward import forward_params as forward_params
from sparsejax.transforms._forward import is_mask_update as is_mask_update
from sparsejax.transforms._forward import masks_of as masks_of
from sparsejax.transforms._forward import sparse_params as sparse_params
from sparsejax.transforms._magnitude import magnitude_prune as magnitude_prune
from sparsejax.transforms._progressive import mask_decay as mask_decay
from sparsejax.transforms._progressive import structure_decay as structure_decay
from sparsejax.transforms._prune import prune as prune
from sparsejax.transforms._sr_ste import sr_ste as sr_ste
from sparsejax.transforms._state import SparseState as SparseState
from sparsejax.transforms._static import static_sparse as static_sparse
