"""Which keys a query may see at all."""

from jaxtyping import Array, Bool, Int

from sparsejax._ints import check_int


def causal_mask(
    query_positions: Int[Array, "batch queries"],
    key_positions: Int[Array, "batch keys"],
    *,
    window: int | None = None,
) -> Bool[Array, "batch 1 queries keys"]:
    """Lets each query see the keys at its own position and before it.

    Args:
      query_positions: of the queries; `batch` may be 1 in either argument.
      key_positions: of the keys.
      window: see only the last `window` positions, the query's own included; at
        least 1. All of them by default.

    Returns:
      True where the query sees the key; the second axis stands for the heads.

    Raises:
      TypeError: if `window` is no whole number.
      ValueError: if it is below 1.

    Example:
      >>> positions = jnp.arange(4)[None]
      >>> sj.attention.causal_mask(positions, positions, window=2)[0, 0].astype(int)
      Array([[1, 0, 0, 0],
             [1, 1, 0, 0],
             [0, 1, 1, 0],
             [0, 0, 1, 1]], dtype=int32)
    """
    if window is not None:
        window = check_int("window", window, least=1)
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    seen = distance >= 0
    if window is None:
        return seen
    return seen & (distance < window)
