"""Two attentions over disjoint keys, merged into one over all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention(
    out_a: Float[Array, "batch queries heads head_dim"],
    lse_a: Float[Array, "batch queries heads"],
    out_b: Float[Array, "batch queries heads head_dim"],
    lse_b: Float[Array, "batch queries heads"],
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch queries heads"],
]:
    """Merges attention over two disjoint sets of keys by their log-sum-exp.

    Args:
      out_a: outputs over the first set.
      lse_a: float32, the log of the sum of the exponentials of the scores; -inf where
        a query sees none.
      out_b: outputs over the second set.
      lse_b: likewise.

    Returns:
      Outputs in the dtype of `out_a` and log-sum-exp over both sets: 0 and -inf where
      a query sees no key of either. Differentiable.

    Raises:
      ValueError: if shapes disagree.

    Example:
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
      >>> whole, _ = sj.ops.block_attention(q, k, v, with_lse=True)
      >>> parts = [
      ...     sj.ops.block_attention(q, k[:, s], v[:, s], with_lse=True)
      ...     for s in (slice(0, 32), slice(32, 64))
      ... ]
      >>> merged, _ = merge_attention(*parts[0], *parts[1])
      >>> bool(jnp.allclose(merged, whole, atol=1e-6))
      True

    References:
      Dao et al., 2022, https://arxiv.org/abs/2205.14135, section 3.1: the rescaling of
      two blocks.
    """
    if out_a.shape != out_b.shape or not lse_a.shape == lse_b.shape == out_a.shape[:3]:
        raise ValueError(
            "`out_a` and `out_b` must have one shape, `lse_a` and `lse_b` that without "
            f"head_dim; got {out_a.shape}, {out_b.shape}, {lse_a.shape} and "
            f"{lse_b.shape}."
        )
    top = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    share_a, share_b = (_exp(lse - top) for lse in (lse_a, lse_b))
    total = jnp.where(empty, 1, share_a + share_b)
    out = (
        out_a.astype(jnp.float32) * (share_a / total)[..., None]
        + out_b.astype(jnp.float32) * (share_b / total)[..., None]
    )
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return out.astype(out_a.dtype), lse


def _exp(x: jax.Array) -> jax.Array:
    """exp, with gradient 0 and not NaN at -inf."""
    finite = x > -jnp.inf
    return jnp.where(finite, jnp.exp(jnp.where(finite, x, 0)), 0)
