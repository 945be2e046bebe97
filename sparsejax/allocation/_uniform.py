"""The same sparsity for every governed leaf."""

import jax
from jax.typing import ArrayLike

from sparsejax.patterns import StackedTree, check_sparsity, governed
from sparsejax.typing import Params, SparsityTree, Where, is_none


def uniform(
    params: Params,
    sparsity: ArrayLike,
    *,
    where: Where = None,
    stacked: StackedTree = 0,
) -> SparsityTree:
    """Gives every governed leaf the same sparsity.

    Args:
      params: arrays or `ShapeDtypeStruct`s; only paths and shapes are read.
      sparsity: share of zeros, in [0, 1); a traced value works.
      where: which leaves are governed, as in `patterns.governed`.
      stacked: leading axes that are stacked layers, as in `patterns.governed`.

    Returns:
      A tree of sparsities, None where not governed.

    Raises:
      ValueError: if the sparsity is out of range or no leaf is governed.
      TypeError: if it is no number.

    Example:
      >>> uniform({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, 0.5)
      {'bias': None, 'kernel': 0.5}
    """
    check_sparsity(sparsity)
    leaves = governed(params, where=where, stacked=stacked)
    treedef = jax.tree.structure(params, is_leaf=is_none)
    return treedef.unflatten([None if leaf is None else sparsity for leaf in leaves])
