"""How many weights a stretch of training left as they were."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparsejax.metrics._aligned import map_aligned
from sparsejax.metrics._report import SparsityReport, sparsity_report
from sparsejax.typing import MaskTree, Params

NAMES = "before", "after"


def changed_weights(
    before: Params,
    after: Params,
    *,
    mode: Literal["exact", "atol", "ulp"] = "exact",
    atol: float = 1e-5,
    ulps: int = 1,
    dtype: DTypeLike | None = None,
) -> MaskTree:
    """Which weights differ between two checkpoints: masks, True = changed.

    They are masks like any other: `sad` tells how far the changes of two runs differ.

    Args:
      before: floating arrays; other leaves, and None, give None.
      after: as many leaves of the same shapes. Trees align by the order of leaves.
      mode: "exact": weights differ; "atol": by more than `atol`; "ulp": by `ulps` or
        more units in the last place, at the larger of the two. NaN differs from all.
      atol: at least 0. The spacing of bfloat16 is above 1e-5 from 2e-3 on, where
        that tolerance does nothing; of float32 weights it hides small updates.
      ulps: at least 1.
      dtype: a floating dtype that both sides are rounded to first, as checkpoints are.
        None: that of the leaf in `before`. Differences are taken in float32, or in
        float64 of leaves that have it.

    Returns:
      A tree like `before`.

    Raises:
      ValueError: if the trees do not align, naming the leaf; on a mode, `atol`, `ulps`
        or `dtype` that is not among the above.

    Example:
      >>> before = {"kernel": jnp.array([1.0, 1.0, 0.0])}
      >>> after = {"kernel": jnp.array([1.0, 1.001, 0.5])}
      >>> changed_weights(before, after)
      {'kernel': Array([False,  True,  True], dtype=bool)}
      >>> changed_weights(before, after, dtype=jnp.bfloat16)  # 1.001 rounds to 1
      {'kernel': Array([False, False,  True], dtype=bool)}

    References:
      Mukherjee et al., 2025, https://arxiv.org/abs/2505.11711, whose checkpoints are
      bfloat16: `dtype=jnp.bfloat16, mode="atol"`.
    """
    if mode not in ("exact", "atol", "ulp"):
        raise ValueError(f'`mode` must be "exact", "atol" or "ulp"; got {mode!r}.')
    if not atol >= 0 or not ulps >= 1:
        raise ValueError(
            f"`atol` must be at least 0 and `ulps` at least 1; got {atol} and {ulps}."
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be a floating one; got {jnp.dtype(dtype)}.")

    def changed(path: str, a: jax.Array, b: jax.Array) -> jax.Array | None:
        del path
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return None
        rounded = a.dtype if dtype is None else jnp.dtype(dtype)
        wide = jnp.promote_types(a.dtype, jnp.float32)
        a, b = (x.astype(rounded).astype(wide) for x in (a, b))
        if mode == "exact":
            return a != b
        apart = jnp.abs(a - b)
        if mode == "atol":
            return ~(apart <= atol) & (a != b)  # infinities of one sign are equal
        spacing = _spacing(jnp.maximum(jnp.abs(a), jnp.abs(b)), rounded)
        return ~(apart < ulps * spacing) & (a != b)

    return map_aligned(changed, before, after, NAMES)


def update_sparsity(
    before: Params,
    after: Params,
    *,
    mode: Literal["exact", "atol", "ulp"] = "exact",
    atol: float = 1e-5,
    ulps: int = 1,
    dtype: DTypeLike | None = None,
) -> SparsityReport:
    """The share of weights that training left as they were, exactly, leaf by leaf.

    Much of it may be rounding: a small update of every weight is lost in bfloat16. Look
    at the float32 weights as well, and at what a dense update of the same size leaves,
    `update_sparsity(before, dense_update(before, after, key=key), dtype=...)`. Rows of
    an embedding whose token never came are unchanged too: see the leaf by itself.

    Args:
      before: see `changed_weights`, also for the other arguments.
      after: likewise.
      mode: likewise.
      atol: likewise.
      ulps: likewise.
      dtype: likewise.

    Returns:
      A report in which `num_kept` counts the changed weights of a leaf and `sparsity`
      is the share of the others; in total it is of all weights, not a mean over leaves.

    Raises:
      ValueError: see `changed_weights`; if no leaf is floating.

    Example:
      >>> before = {"kernel": jnp.full((100, 100), 0.02)}
      >>> after = {"kernel": before["kernel"] + 1e-6}
      >>> update_sparsity(before, after).sparsity
      0.0
      >>> update_sparsity(before, after, dtype=jnp.bfloat16).sparsity
      1.0

    References:
      Mukherjee et al., 2025, https://arxiv.org/abs/2505.11711: 1 - |changed| / n. That
      it is rounding: Shenfeld et al., 2025, https://arxiv.org/abs/2509.04259.
    """
    options = {"mode": mode, "atol": atol, "ulps": ulps, "dtype": dtype}
    return sparsity_report(changed_weights(before, after, **options))


def dense_update(before: Params, after: Params, *, key: jax.Array) -> Params:
    """`before`, each weight changed by as much as those of its leaf were on average.

    What `update_sparsity` then shows comes of rounding alone.

    Args:
      before: floating arrays of float32 or wider, so that the update is not lost; other
        leaves, and None, stay.
      after: as many leaves of the same shapes. Trees align by the order of leaves.
      key: draws the signs.

    Returns:
      A tree like `before`: plus or minus the root mean square of the leaf's update.

    Raises:
      ValueError: if the trees do not align, naming the leaf.
      TypeError: if a leaf of `before` is narrower than float32.

    Example:
      >>> before, after = {"w": jnp.ones(4)}, {"w": jnp.array([1.0, 1.0, 1.0, 3.0])}
      >>> jnp.abs(dense_update(before, after, key=jax.random.key(0))["w"] - 1)
      Array([1., 1., 1., 1.], dtype=float32)
    """
    keys = iter(jax.random.split(key, max(len(jax.tree.leaves(before)), 1)))

    def moved(path: str, a: jax.Array, b: jax.Array) -> jax.Array:
        own = next(keys)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        if jnp.finfo(a.dtype).bits < 32:
            raise TypeError(
                f"`before` must be float32 or wider; got {a.dtype} at {path}, which "
                "rounds a small update away. Pass the float32 weights."
            )
        rms = jnp.sqrt(jnp.mean(jnp.square(b.astype(a.dtype) - a)))
        return a + rms * jax.random.rademacher(own, a.shape, a.dtype)

    return map_aligned(moved, before, after, NAMES)


def _spacing(magnitude: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """From a number to the next of that dtype, away from 0."""
    info = jnp.finfo(dtype)
    _, exponent = jnp.frexp(jnp.maximum(magnitude, info.tiny))
    return jnp.ldexp(jnp.asarray(info.eps, magnitude.dtype), exponent - 1)
