"""Where the frames of a structure decay begin."""


def frame_boundaries(
    num_frames: int, total_steps: int, *, dense_steps: int = 0, hard_steps: int = 0
) -> tuple[int, ...]:
    """First steps of frames of equal length between a dense and a hard phase.

    Args:
      num_frames: number of patterns, at least 1.
      total_steps: length of the run, steps.
      dense_steps: plain dense training before the first frame, at least 0.
      hard_steps: at the end, added to the last frame; at least 0.

    Returns:
      `num_frames` steps: `dense_steps + int(i * length)`.

    Raises:
      ValueError: if a phase is negative, or less than one step is left for each frame.

    Example:
      >>> frame_boundaries(4, 100, dense_steps=10, hard_steps=10)
      (10, 30, 50, 70)

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744, released code.
    """
    if min(dense_steps, hard_steps) < 0:
        raise ValueError(
            "`dense_steps` and `hard_steps` must be at least 0; got "
            f"dense_steps={dense_steps} and hard_steps={hard_steps}."
        )
    length = (total_steps - dense_steps - hard_steps) / max(num_frames, 1)
    if num_frames < 1 or length < 1:
        raise ValueError(
            "each frame needs at least one step; got "
            f"{total_steps} - {dense_steps} - {hard_steps} steps for {num_frames} "
            "frames."
        )
    return tuple(dense_steps + int(i * length) for i in range(num_frames))
