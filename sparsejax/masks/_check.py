"""NaN scores: an error where it can be seen, the lowest rank where it cannot."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from sparsejax.typing import ScoreTree


def check_floating(scores: ArrayLike, *, at: str = "") -> None:
    """Raises a TypeError unless scores are floating: the search reads their bits.

    Args:
      scores: any array.
      at: the leaf it is, for the message.
    """
    dtype = jnp.result_type(scores)
    if not jnp.issubdtype(dtype, jnp.floating):
        at = f" at {at}" if at else ""
        raise TypeError(f"`scores` must be floating; got {dtype}{at}. Convert them.")


def check_scores(scores: ScoreTree, name: str = "scores") -> None:
    """Raises if a concrete score is NaN; traced scores pass and rank NaN lowest.

    Args:
      scores: a tree of float arrays; None leaves are skipped.
      name: what the tree is called in an error.

    Raises:
      ValueError: naming the leaf and the number of NaNs.
      TypeError: if a leaf has a shape but no values.

    Example:
      >>> check_scores({"kernel": jnp.array([1.0, 2.0])})
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(scores)[0]:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"`{name}` must be arrays; got {leaf} at "
                f"{jax.tree_util.keystr(path)}. For shapes alone call "
                "`jax.eval_shape`, as in `jax.eval_shape(tx.init, params)`."
            )
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if isinstance(leaf, Tracer) or not floating:
            continue
        with jax.ensure_compile_time_eval():  # concrete arrays that a jit closes over
            num_nan = int(jnp.isnan(leaf).sum())
        if num_nan:
            at = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise ValueError(
                f"`{name}` must not be NaN; got {num_nan} of {jnp.size(leaf)} "
                f"NaN{at}. Find where they come from before pruning."
            )
