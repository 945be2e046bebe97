"""Erdos-Renyi allocations: small layers stay denser, the budget is met exactly."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparsejax.patterns import StackedTree, check_sparsity, governed
from sparsejax.typing import Params, SparsityTree, Where, is_none


def erdos_renyi(
    params: Params,
    sparsity: ArrayLike,
    *,
    where: Where = None,
    stacked: StackedTree = 0,
) -> SparsityTree:
    """Density proportional to `(d_in + d_out) / (d_in * d_out)`.

    The last two axes of a leaf are `d_in` and `d_out`; the other axes of a convolution
    are ignored, so that every kernel position gets the same density. Of an attention
    kernel `[d_in, heads, head_dim]` or `[heads, head_dim, d_out]` the axes do not say
    which are which, so it raises.

    Args:
      params: arrays or `ShapeDtypeStruct`s; only paths and shapes are read.
      sparsity: share of zeros over all governed weights, in [0, 1). A Python number
        is solved in float64; a traced value in float32.
      where: which leaves are governed, as in `patterns.governed`.
      stacked: leading axes that are stacked layers; the formula is per layer.

    Returns:
      A tree of sparsities, None where not governed. The fractions add up to
      `sparsity` exactly, though masks round the zeros of each leaf by itself; a leaf
      whose density would pass 1 is dense and the others make up.

    Raises:
      ValueError: if the sparsity is out of range, no leaf is governed, or a leaf has
        more axes than a matrix and is no convolution.
      TypeError: if it is no number.

    Example:
      >>> params = {"a": jnp.ones((784, 300)), "b": jnp.ones((300, 100))}
      >>> tree = erdos_renyi(params, 0.95)
      >>> print(f"{1 - tree['a']:.4f} {1 - tree['b']:.4f}")
      0.0412 0.1191

    References:
      Mocanu et al., 2018, https://arxiv.org/abs/1707.04780, equation 3.
    """
    for leaf in governed(params, where=where, stacked=stacked):
        if leaf is not None and leaf.own_axes > 2 and not leaf.is_convolution:
            raise ValueError(
                "`erdos_renyi` needs matrices and convolutions; got shape "
                f"{leaf.shape} with {leaf.own_axes} axes beyond the {leaf.stacked} "
                f"stacked ones at {leaf.name}. Merge its heads, exclude it by `where`, "
                "or take `erdos_renyi_kernel` or `uniform`."
            )
    return _allocate(
        params, sparsity, where, stacked, lambda shape: _sum_over_product(shape[-2:])
    )


def erdos_renyi_kernel(
    params: Params,
    sparsity: ArrayLike,
    *,
    where: Where = None,
    stacked: StackedTree = 0,
) -> SparsityTree:
    """Density proportional to `sum(shape) / prod(shape)` over all axes (ERK).

    For matrices it equals `erdos_renyi`. An attention kernel `[d_in, heads, head_dim]`
    counts as three axes and gets sparser than its merged form `[d_in, heads*head_dim]`,
    at head_dim 64 and eight heads half as dense; to avoid it, merge them.

    Args:
      params: arrays or `ShapeDtypeStruct`s; only paths and shapes are read.
      sparsity: share of zeros over all governed weights, in [0, 1). A Python number
        is solved in float64; a traced value in float32.
      where: which leaves are governed, as in `patterns.governed`.
      stacked: leading axes that are stacked layers; the formula is per layer.

    Returns:
      A tree of sparsities, None where not governed. The fractions add up to
      `sparsity` exactly, though masks round the zeros of each leaf by itself; a leaf
      whose density would pass 1 is dense and the others make up.

    Raises:
      ValueError: if the sparsity is out of range or no leaf is governed.
      TypeError: if it is no number.

    Example:
      >>> params = {"conv": jnp.ones((3, 3, 16, 16)), "head": jnp.ones((32, 10))}
      >>> tree = erdos_renyi_kernel(params, 0.9)
      >>> print(f"{1 - tree['conv']:.4f} {1 - tree['head']:.4f}")
      0.0541 0.4305

    References:
      Evci et al., 2020, https://arxiv.org/abs/1911.11134, section 3 (1).
    """
    return _allocate(params, sparsity, where, stacked, _sum_over_product)


def _sum_over_product(shape: Sequence[int]) -> float:
    return sum(shape) / max(math.prod(shape), 1)


def _allocate(params, sparsity, where, stacked, raw_density) -> SparsityTree:
    check_sparsity(sparsity)
    leaves = governed(params, where=where, stacked=stacked)
    own = [leaf for leaf in leaves if leaf is not None]
    sizes = [math.prod(leaf.shape) for leaf in own]
    raw = [raw_density(leaf.shape[leaf.stacked :]) for leaf in own]
    found = iter(_solve(raw, sizes, sparsity))
    treedef = jax.tree.structure(params, is_leaf=is_none)
    return treedef.unflatten([None if leaf is None else next(found) for leaf in leaves])


def _solve(
    raw: Sequence[float], sizes: Sequence[int], sparsity: ArrayLike
) -> list[Any]:
    """Scales raw densities to the budget, those that would pass 1 set to 1.

    With the leaves ordered by falling raw density the dense ones are a prefix. For
    each length of it the scale of the rest follows from the budget; the shortest
    prefix under which nothing else passes 1 is the solution of the published
    iteration, and this form of it takes a traced sparsity.
    """
    static = isinstance(sparsity, numbers.Real)
    xp = np if static else jnp
    dtype = np.float64 if static else np.float32
    order = np.argsort(-np.asarray(raw, np.float64), kind="stable")
    p = np.asarray(raw, np.float64)[order]
    n = np.asarray(sizes, np.float64)[order]
    dense_before = np.concatenate([[0.0], np.cumsum(n)[:-1]]).astype(dtype)
    weight_after = np.cumsum((p * n)[::-1])[::-1].astype(dtype)
    p = p.astype(dtype)
    kept = (1 - sparsity) * dtype(n.sum())
    scale = (kept - dense_before) / np.maximum(weight_after, np.finfo(dtype).tiny)
    # rounding must not leave the all-dense case without a solution
    fits = xp.concatenate([(p * scale <= 1)[:-1], xp.ones(1, bool)])
    first = xp.argmax(fits)
    density = xp.where(xp.arange(len(p)) < first, 1, p * xp.take(scale, first))
    by_leaf = (1 - xp.clip(density, 0, 1))[np.argsort(order, kind="stable")]
    return [float(s) for s in by_leaf] if static else list(by_leaf)
