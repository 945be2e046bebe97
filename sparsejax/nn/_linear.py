"""The linear layer that all our layers are made of."""

from typing import Any

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
