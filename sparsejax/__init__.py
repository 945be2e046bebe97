"""sparsejax: sparse training for JAX and Flax.

Weight sparsity is an optax transformation around your optimizer: `sj.rigl`,
`sj.adams`, `sj.sr_ste` and the others take an optax optimizer and return one. Patterns
say what may be zero, masks are trees of bools, everything is a pure function.

- methods: `static_sparse`, `magnitude_prune`, `sparse_evolution` (SET), `rigl`,
  `sr_ste`, `mask_decay`, `structure_decay`, `adams`, `scale_by_adams`
- what a method's state tells: `forward_params`, `sparse_params`, `masks_of`,
  `is_mask_update`
- beside a method: `weight_scaling`, `distillation_loss`, `schedules`
- patterns: `Unstructured`, `NM`, `Block`, `Channel`; more in `patterns`
- allocations: `uniform`, `erdos_renyi`, `erdos_renyi_kernel`
- masks: `prune`, `apply_masks`, `topk_mask`, `nm_mask`, `block_mask`, `global_topk`;
  more in `masks`, scores in `scores`
- `typing`: names of trees, and what gives the names along the path of a leaf
- measures: `sparsity_report`, `sad`; FLOPs, activations and pictures in `metrics`
- sparse activations: `statistical_topk`, `statistical_threshold`, `statistical_glu`,
  `topk_activation`, `block_statistical_topk`; more in `activations`
- what kernels read: `BlockMask`, `BlockSparse`; more in `formats`
- rooms of their own: `attention` (which blocks and keys), `ops` (kernels); and, loaded
  with Flax when they are first used, `nn` (layers), `models` (a decoder, checkpoints),
  `decode` (generation), `training` (a loop)

Example:
  >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
  >>> tx = sj.sr_ste(optax.sgd(0.1), pattern=sj.NM(2, 4))
  >>> opt_state = tx.init(params)
  >>> sj.forward_params(opt_state, params)["kernel"]  # what the loss is computed with
  Array([[0., 0.],
         [0., 0.],
         [4., 5.],
         [6., 7.]], dtype=float32)
"""

import importlib
from typing import TYPE_CHECKING

from sparsejax import activations as activations
from sparsejax import attention as attention
from sparsejax import formats as formats
from sparsejax import masks as masks
from sparsejax import metrics as metrics
from sparsejax import ops as ops
from sparsejax import patterns as patterns
from sparsejax import schedules as schedules
from sparsejax import scores as scores
from sparsejax import typing as typing
from sparsejax.activations import block_statistical_topk as block_statistical_topk
from sparsejax.activations import statistical_glu as statistical_glu
from sparsejax.activations import statistical_threshold as statistical_threshold
from sparsejax.activations import statistical_topk as statistical_topk
from sparsejax.activations import topk_activation as topk_activation
from sparsejax.allocation import erdos_renyi as erdos_renyi
from sparsejax.allocation import erdos_renyi_kernel as erdos_renyi_kernel
from sparsejax.allocation import uniform as uniform
from sparsejax.formats import BlockMask as BlockMask
from sparsejax.formats import BlockSparse as BlockSparse
from sparsejax.masks import apply_masks as apply_masks
from sparsejax.masks import block_mask as block_mask
from sparsejax.masks import global_topk as global_topk
from sparsejax.masks import nm_mask as nm_mask
from sparsejax.masks import topk_mask as topk_mask
from sparsejax.metrics import sad as sad
from sparsejax.metrics import sparsity_report as sparsity_report
from sparsejax.patterns import NM as NM
from sparsejax.patterns import Block as Block
from sparsejax.patterns import Channel as Channel
from sparsejax.patterns import Unstructured as Unstructured
from sparsejax.penalties import distillation_loss as distillation_loss
from sparsejax.transforms import adams as adams
from sparsejax.transforms import forward_params as forward_params
from sparsejax.transforms import is_mask_update as is_mask_update
from sparsejax.transforms import magnitude_prune as magnitude_prune
from sparsejax.transforms import mask_decay as mask_decay
from sparsejax.transforms import masks_of as masks_of
from sparsejax.transforms import prune as prune
from sparsejax.transforms import rigl as rigl
from sparsejax.transforms import scale_by_adams as scale_by_adams
from sparsejax.transforms import sparse_evolution as sparse_evolution
from sparsejax.transforms import sparse_params as sparse_params
from sparsejax.transforms import sr_ste as sr_ste
from sparsejax.transforms import static_sparse as static_sparse
from sparsejax.transforms import structure_decay as structure_decay
from sparsejax.transforms import weight_scaling as weight_scaling

_LAZY = ("decode", "models", "nn", "training")  # load flax

if TYPE_CHECKING:
    from sparsejax import decode as decode
    from sparsejax import models as models
    from sparsejax import nn as nn
    from sparsejax import training as training
else:  # not seen by type checkers, which take it for any name

    def __getattr__(name: str):
        if name in _LAZY:
            return importlib.import_module(f"sparsejax.{name}")
        raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")


__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
