"""The linear layer that all our layers are made of."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike


def linear(
    d_in: int,
    d_out: int,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A kernel `[d_in, d_out]` without bias; LeCun normal, so its fan-in is `d_in`."""
    return nnx.Linear(
        d_in, d_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def check_input(layer: Any, x: jax.Array, *, axes: str) -> None:
    """Raises unless what a layer is given ends with an axis of its `d_model`.

    Args:
      layer: with an attribute `d_model`.
      x: its input.
      axes: of the input, such as `[batch, seq, d_model]`; `*` stands for any.

    Raises:
      ValueError: if the input has another width, or another number of axes.
    """
    num_axes = axes.count(",") + 1
    if x.shape[-1:] != (layer.d_model,) or ("*" not in axes and x.ndim != num_axes):
        raise ValueError(
            f"`x` must be {axes}; got shape {x.shape} for {type(layer).__name__} of "
            f"d_model={layer.d_model}."
        )


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer is its kernel alone, which then may be read without it.

    Example:
      >>> from flax import nnx
      >>> is_plain_linear(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
      True
      >>> is_plain_linear(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      False
    """
    return type(layer) is nnx.Linear and layer.bias is None
