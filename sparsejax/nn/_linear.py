"""The linear layer that all our layers are made of."""

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
