"""Which tokens count: the `where` of losses and of the metrics of activations.

Every room may import this module; it imports none of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def token_mask(
    where: Bool[Array, "..."] | None, tokens: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Broadcasts `where` to the token axes; all True if it is None.

    Args:
      where: bool, True = the token counts.
      tokens: sizes of the token axes.

    Returns:
      A bool array of shape `tokens`.

    Raises:
      ValueError: if it does not broadcast to them.
      TypeError: if it is not bool.

    Example:
      >>> token_mask(jnp.array([True, False]), (1, 2))
      Array([[ True, False]], dtype=bool)
    """
    if where is None:
        return jnp.ones(tokens, jnp.bool_)
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(
            f"`where` must be bool, True = the token counts; got {where.dtype}. Pass "
            "`where != 0`."
        )
    try:
        return jnp.broadcast_to(where, tokens)
    except ValueError:
        raise ValueError(
            "`where` has one entry for each token, none for what a token has: it must "
            f"broadcast to {tokens}; got {jax.typeof(where)}."
        ) from None
