"""What `active_ffn` and `gated_ffn` ask of their operands and of who calls them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def check_arrays(kind: Any = jnp.floating, **arrays: tuple[jax.Array, int]) -> None:
    """By name an array and how many axes it must have; none may be empty."""
    for name, (array, ndim) in arrays.items():
        if not jnp.issubdtype(array.dtype, kind):
            raise TypeError(
                f"`{name}` must be {kind.__name__}; got {jax.typeof(array)}. Convert "
                "it."
            )
        if array.ndim != ndim:
            raise ValueError(
                f"`{name}` must have {ndim} axes; got shape {array.shape}. Without a "
                "batch, add an axis of size 1."
            )
        if 0 in array.shape:
            raise ValueError(f"`{name}` must not be empty; got shape {array.shape}.")


def check_ffn(x, gate, up, down) -> None:
    check_equal("x", x, 1, "up", up, 1, "d_in")
    check_equal("up", up, 0, "down", down, 0, "d_ff")
    check_equal("x", x, 0, "gate", gate, 0, "the batch")


def check_threshold(threshold, gate) -> None:
    check_arrays(threshold=(threshold, 2))
    want = (len(gate), 1)
    if threshold.shape != want:
        raise ValueError(
            f"`threshold` must have shape {want}, one for each row of `gate`; got "
            f"shape {threshold.shape}."
        )


def check_equal(name_a, a, axis_a, name_b, b, axis_b, what) -> None:
    if a.shape[axis_a] != b.shape[axis_b]:
        raise ValueError(
            f"`{name_a}` and `{name_b}` must agree on {what}; got {name_a} of shape "
            f"{a.shape} and {name_b} of shape {b.shape}. `up` and `down` hold a row "
            "for each neuron."
        )


def for_inference(name: str) -> Callable[[Callable], Callable]:
    """Makes the differentiation of a function an error that says what to do.

    Args:
      name: of the public function; the one decorated takes what is static, then arrays.
    """

    def decorate(run):
        guarded = jax.custom_jvp(run, nondiff_argnums=(0,))

        @guarded.defjvp
        def refuse(static, primals, tangents):
            raise NotImplementedError(
                f"`{name}` is for inference and has no gradient; got a differentiation "
                "of it. Train with the dense products under the gate's zeros, which "
                "give the same values, or wrap the operands in `jax.lax.stop_gradient`."
            )

        return guarded

    return decorate
