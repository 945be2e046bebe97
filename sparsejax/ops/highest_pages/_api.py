"""`highest_pages`: checks, then the reference or the kernel."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax._ints import check_int
from sparsejax.formats import KeyLists
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops.highest_pages import _reference


def highest_pages(
    query: Float[Array, "batch heads head_dim"],
    low: Float[Array, "batch pages kv_heads head_dim"],
    high: Float[Array, "batch pages kv_heads head_dim"],
    lengths: Int[Array, " batch"],
    *,
    page_size: int,
    num_kept: int,
    per_head: bool = False,
    implementation: Implementation | None = None,
) -> KeyLists:
    """Lists the pages whose keys may have the highest products with a query.

    The last page that has a key is always listed; of the others those with the highest
    bounds, `sum_c max(q_c low_c, q_c high_c)` in float32, of equal ones those further
    left.

    Args:
      query: `kv_heads` divides its heads.
      low: the least entries of the keys of each page; of pages without keys anything.
      high: likewise the greatest.
      lengths: keys of each sequence.
      page_size: keys of a page.
      num_kept: pages of a list, in `[1, pages]`; fewer where fewer have keys.
      per_head: a list for each query head; else the query heads of a key head share
        one, by the sum of their bounds.
      implementation: "reference", "mosaic_gpu" (Hopper: one kernel, for bounds of 16
        bits and up to 1024 pages, a multiple of 64), or None for the fastest that
        serves.

    Returns:
      Lists `[batch, heads|kv_heads, num_kept]`. No gradient.

    Raises:
      ValueError: if shapes disagree, `lengths` are not integers, or `page_size` or
        `num_kept` is out of range.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> query, low = jnp.ones((1, 1, 2)), jnp.zeros((1, 4, 1, 2))
      >>> high = jnp.array([3.0, 5.0, 4.0, 1.0])[None, :, None, None] * jnp.ones(2)
      >>> lists = highest_pages(
      ...     query, low, high, jnp.array([7]), page_size=2, num_kept=3
      ... )
      >>> print(lists.indices)  # the last page holds the seventh key
      [[[1 2 3]]]
    """
    query, low, high, lengths = jax.lax.stop_gradient(
        tuple(map(jnp.asarray, (query, low, high, lengths)))
    )
    if (
        query.ndim != 3
        or low.ndim != 4
        or low.shape != high.shape
        or lengths.shape != low.shape[:1]
        or not jnp.issubdtype(lengths.dtype, jnp.integer)
        or query.shape[::2] != low.shape[::3]
        or query.shape[1] % low.shape[2]
    ):
        raise ValueError(
            "`query` must be [batch, heads, head_dim], `low` and `high` [batch, pages, "
            "kv_heads, head_dim] and `lengths` integers [batch], where kv_heads "
            f"divides heads; got {query.shape}, {low.shape}, {high.shape} and "
            f"{jax.typeof(lengths)}."
        )
    check_int("page_size", page_size, least=1)
    if not 1 <= num_kept <= low.shape[1]:
        raise ValueError(
            f"`num_kept` must be in [1, {low.shape[1]}], the pages; got {num_kept}."
        )
    options = {"page_size": page_size, "num_kept": num_kept, "per_head": per_head}
    return dispatch(
        (query, low, high, lengths.astype(jnp.int32)),
        implementation,
        reference=functools.partial(_reference.highest_pages, **options),
        kernels={"mosaic_gpu": functools.partial(_gpu, options)},
    )


def _gpu(options) -> Kernel:
    from sparsejax.ops.highest_pages import _mosaic_gpu

    run = functools.partial(_mosaic_gpu.highest_pages, **options)
    return Kernel(run, _mosaic_gpu.unsupported_reason)
