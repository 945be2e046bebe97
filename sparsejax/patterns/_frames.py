"""Sequences of N:M patterns that tighten towards a target."""

from sparsejax.patterns._patterns import NM


def stepwise_frames(target: NM) -> tuple[NM, ...]:
    """Groups of `m` that keep `m-1`, then half as many each frame, down to `n`.

    Args:
      target: the last pattern; `m / n` must be a power of two.

    Returns:
      `log2(m / n) + 1` patterns, of non-increasing density.

    Raises:
      ValueError: if `m / n` is no power of two; pass your own tuple of patterns then.

    Example:
      >>> [(f.n, f.m) for f in stepwise_frames(NM(1, 16))]
      [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744, SdGf-Stepwise.
    """
    _check_halving(target)
    if target.n == target.m:
        return (target,)
    kept, halvings = target.n, []
    while kept < target.m:
        halvings.append(NM(kept, target.m, target.axis))
        kept *= 2
    return (NM(target.m - 1, target.m, target.axis), *reversed(halvings))


def geometric_frames(target: NM, *, first_factor: int = 8) -> tuple[NM, ...]:
    """Groups that shrink at constant density: `k n : k m` for k = first_factor .. 1.

    Args:
      target: the last pattern.
      first_factor: how much larger the first group is, a power of two. The leaf's
        axis must be divisible by `first_factor * m`.

    Returns:
      `log2(first_factor) + 1` patterns of equal density.

    Raises:
      ValueError: if `first_factor` is no power of two.

    Example:
      >>> [(f.n, f.m) for f in geometric_frames(NM(1, 8))]
      [(8, 64), (4, 32), (2, 16), (1, 8)]

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744, SdGf-Geometric; the
      released code starts at 8, a comment in it at 16.
    """
    if first_factor < 1 or first_factor & (first_factor - 1):
        raise ValueError(f"`first_factor` must be a power of two; got {first_factor}.")
    factors = [2**i for i in reversed(range(first_factor.bit_length()))]
    return tuple(NM(k * target.n, k * target.m, target.axis) for k in factors)


def _check_halving(target: NM) -> None:
    ratio, rest = divmod(target.m, target.n)
    if rest or ratio & (ratio - 1):
        raise ValueError(
            "stepwise frames halve the kept weights, so `m / n` must be a power of "
            f"two; got {target.n}:{target.m}. Pass your own tuple of patterns."
        )
