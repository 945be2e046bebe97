"""In-time over-parameterization: which weights were ever kept."""

from jaxtyping import Array, Float32

from sparsejax.metrics._aligned import map_aligned
from sparsejax.metrics._shares import kept_share
from sparsejax.typing import MaskTree


def update_explored(explored: MaskTree, masks: MaskTree) -> MaskTree:
    """Adds the weights kept now to those that were ever kept.

    Start from the masks of `init`; call it after each mask update, jitted or not.

    Args:
      explored: bool arrays, True = kept at some time; None stays None.
      masks: the masks now, aligned by the order of their leaves.

    Returns:
      A tree like `explored`.

    Raises:
      ValueError: if the trees do not align, naming the leaf.

    Example:
      >>> explored = {"a": jnp.array([True, False, False])}
      >>> update_explored(explored, {"a": jnp.array([False, False, True])})
      {'a': Array([ True, False,  True], dtype=bool)}

    References:
      Liu et al., 2021, https://arxiv.org/abs/2102.02887.
    """
    names = "explored", "masks"
    return map_aligned(lambda _, ever, now: ever | now, explored, masks, names)


def exploration_rate(explored: MaskTree) -> Float32[Array, ""]:
    """The share of governed weights that were ever kept (ITOP rate).

    It starts at the density and stays there for a static mask; dynamic sparse training
    that explores well comes close to 1.

    Args:
      explored: bool arrays from `update_explored`; None leaves are skipped.

    Returns:
      A fraction of all governed weights, not a mean over leaves; 1 where there is no
      mask, as everything is dense.

    Example:
      >>> float(exploration_rate({"a": jnp.array([True, False, True, True])}))
      0.75

    References:
      Liu et al., 2021, https://arxiv.org/abs/2102.02887, the rate R_s.
    """
    return kept_share(explored)
