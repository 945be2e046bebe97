"""Counting the arithmetic of training and inference: one multiply-add is 2 FLOPs.

Only matrix products and convolutions count, masked or not. Norms, activations, softmax
and embedding look-ups do not, nor do mask updates: report them beside these numbers.
With `f_D` the dense forward and `f_S` the sparse one, per example, training takes:

| method                                  | FLOPs per example | `cost`                |
|-----------------------------------------|-------------------|-----------------------|
| static masks, SET                       | 3 f_S             | `sparse_cost`         |
| RigL                                    | between the two   | `rigl_cost(...)`      |
| STE, SR-STE, any dense gradient (SNFS)  | 2 f_S + f_D       | `dense_gradient_cost` |
| gradual pruning                         | mean over steps   | one of the above      |
| dense; AdamS; `mask_decay` while it is  | 3 f_D             | any, at densities 1   |
| above 0                                 |                   |                       |

These are theoretical numbers: a masked dense matmul saves none of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeAlias

from sparsejax.patterns import governed
from sparsejax.typing import Params, Where

Cost: TypeAlias = Callable[[float, float], float]
"""From the sparse and the dense forward FLOPs to those of a training step."""


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The size of one layer's matrix products.

    Make one by `from_kernel` or `attention`.

    Attributes:
      name: for reports.
      num_weights: weights of the kernel; 0 for an attention product.
      macs: multiply-adds per example of the dense layer.

    Example:
      >>> LayerSpec.from_kernel("conv", (7, 7, 3, 64), positions=112 * 112).macs
      118013952
    """

    name: str
    num_weights: int
    macs: int

    @classmethod
    def from_kernel(
        cls, name: str, shape: Sequence[int], *, positions: int = 1
    ) -> Self:
        """A kernel of any number of axes, each weight used once at each position.

        Args:
          name: for reports.
          shape: of the kernel.
          positions: how often the kernel is applied to an example: tokens of a
            sequence, output pixels of a convolution.
        """
        size = math.prod(shape)
        return cls(name, size, size * positions)

    @classmethod
    def attention(
        cls,
        name: str,
        *,
        num_heads: int,
        head_dim: int,
        num_queries: int,
        num_keys: int,
    ) -> Self:
        """Both products of attention, scores and values; their density is their own.

        Args:
          name: for reports.
          num_heads: query heads.
          head_dim: entries of a head.
          num_queries: tokens that attend.
          num_keys: tokens attended to; the share that a mask leaves, a causal one
            included, is the density.
        """
        return cls(name, 0, 2 * num_heads * head_dim * num_queries * num_keys)


def kernel_specs(
    params: Params, *, positions: int, where: Where = None
) -> tuple[LayerSpec, ...]:
    """The kernels of a model in which each is applied at equally many positions.

    That is a transformer, with `positions` the tokens of an example. Attention has no
    kernel: add `LayerSpec.attention` for each layer. A tied embedding is a matmul too,
    as the head: choose it by `where`.

    Args:
      params: arrays or `ShapeDtypeStruct`s; only paths and shapes are read. Stacked
        layers count as one kernel.
      positions: tokens of an example.
      where: which leaves are kernels, as in `patterns.governed`; None for its default.

    Returns:
      One spec for each kernel, in the order of the leaves.

    Raises:
      ValueError: if `where` chooses no leaf.

    Example:
      >>> params = {"kernel": jnp.ones((4, 8)), "scale": jnp.ones(8)}
      >>> kernel_specs(params, positions=10)
      (LayerSpec(name="['kernel']", num_weights=32, macs=320),)
    """
    return tuple(
        LayerSpec.from_kernel(leaf.name, leaf.shape, positions=positions)
        for leaf in governed(params, where=where)
        if leaf is not None
    )


def forward_flops(
    specs: Sequence[LayerSpec], densities: Sequence[float] | None = None
) -> float:
    """FLOPs of the forward pass of one example.

    Args:
      specs: of all layers, masked or not.
      densities: share of nonzeros of each layer, in [0, 1]; None for all dense.

    Returns:
      `sum(2 * macs * density)`; exact for integers up to 2**53.

    Raises:
      ValueError: if there is not one density a layer, or one is out of range.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> specs = kernel_specs(params, positions=1)
      >>> forward_flops(specs), forward_flops(specs, [0.5, 1.0])
      (96.0, 64.0)

    References:
      The conventions of Evci et al., 2020, https://arxiv.org/abs/1911.11134.
    """
    if densities is None:
        densities = [1.0] * len(specs)
    if len(densities) != len(specs):
        raise ValueError(
            f"`densities` must hold one entry for each of the {len(specs)} layers; got "
            f"{len(densities)}."
        )
    for spec, density in zip(specs, densities, strict=True):
        if not 0 <= density <= 1:
            raise ValueError(
                f"a density must be in [0, 1]; got {density} at {spec.name}."
            )
    return math.fsum(
        2 * spec.macs * float(density)
        for spec, density in zip(specs, densities, strict=True)
    )


def sparse_cost(sparse: float, dense: float) -> float:
    """`3 f_S`: forward and both gradients are sparse, as for static masks and SET.

    Args:
      sparse: FLOPs of the sparse forward pass of one example.
      dense: of the dense one; not read.

    Returns:
      FLOPs of a training step on one example.

    Example:
      >>> sparse_cost(0.5, 1.0)
      1.5
    """
    del dense
    return 3 * sparse


def dense_gradient_cost(sparse: float, dense: float) -> float:
    """`2 f_S + f_D`: the weights' gradient is dense at every step, as for STE.

    Args:
      sparse: FLOPs of the sparse forward pass of one example.
      dense: of the dense one.

    Returns:
      FLOPs of a training step on one example.

    Example:
      >>> dense_gradient_cost(0.5, 1.0)
      2.0
    """
    return 2 * sparse + dense


def rigl_cost(update_every: int) -> Cost:
    """`(3 f_S T + 2 f_S + f_D) / (T + 1)`: dense gradients at mask updates only.

    Args:
      update_every: steps between mask updates, T.

    Returns:
      A cost, for `training_flops`.

    Raises:
      ValueError: unless `update_every` is at least 1.

    Example:
      >>> f"{rigl_cost(100)(0.4, 1.0):.4f}"  # 1.2 without mask updates, 3 dense
      '1.2059'

    References:
      Evci et al., 2020, https://arxiv.org/abs/1911.11134. It takes T ordinary steps to
      each mask update; in `rigl` the update is one of every T steps, which makes the
      share of dense gradients 1 / T instead of 1 / (T + 1).
    """
    if update_every < 1:
        raise ValueError(f"`update_every` must be at least 1; got {update_every}.")

    def cost(sparse: float, dense: float) -> float:
        steps = sparse_cost(sparse, dense) * update_every
        return (steps + dense_gradient_cost(sparse, dense)) / (update_every + 1)

    return cost


def training_flops(
    specs: Sequence[LayerSpec],
    densities: Sequence[float] | None = None,
    *,
    cost: Cost = sparse_cost,
) -> float:
    """FLOPs of one training step on one example, forward and backward.

    Args:
      specs: of all layers, masked or not.
      densities: share of nonzeros of each layer; None for dense training.
      cost: the row of the table, a function of sparse and dense forward FLOPs.

    Returns:
      FLOPs per example.

    Raises:
      ValueError: as `forward_flops` does.

    Example:
      >>> specs = [LayerSpec.from_kernel("a", (4, 8))]
      >>> training_flops(specs, [0.5]) / training_flops(specs)
      0.5
      >>> training_flops(specs, [0.5], cost=dense_gradient_cost) / training_flops(specs)
      0.6666666666666666
    """
    return cost(forward_flops(specs, densities), forward_flops(specs))


def gradual_training_flops(
    specs: Sequence[LayerSpec],
    densities_by_step: Iterable[Sequence[float]],
    *,
    cost: Cost = sparse_cost,
) -> float:
    """FLOPs of a training step on one example, averaged over a run of pruning.

    Args:
      specs: of all layers, masked or not.
      densities_by_step: the densities of all layers, at each step of the run or at
        evenly spaced ones.
      cost: as for `training_flops`; `dense_gradient_cost` if the gradient stays dense.

    Returns:
      FLOPs per example, the mean over the steps.

    Raises:
      ValueError: if there is no step, and as `forward_flops` does.

    Example:
      >>> specs = [LayerSpec.from_kernel("a", (4, 8))]
      >>> gradual_training_flops(specs, [[1.0], [0.5]]) / training_flops(specs)
      0.75
    """
    flops = [training_flops(specs, step, cost=cost) for step in densities_by_step]
    if not flops:
        raise ValueError("`densities_by_step` must hold at least one step.")
    return math.fsum(flops) / len(flops)
