"""CETT: how much of a layer's output its weakly contributing neurons make up.

It measures the sparsity of any activation function: neurons count as inactive not
when they are zero but when leaving them out changes little.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32

from sparsejax._promotion import to_rank
from sparsejax._tokens import token_mask

# An output below this share of the sum of its terms' norms is rounding error.
_CANCELLED = 1e-6


def cett(
    a: Float[Array, "*tokens d_ff"],
    w_out: Float[Array, "d_ff d_model"],
    threshold: ArrayLike,
    *,
    where: Bool[Array, "*tokens"] | None = None,
) -> Float32[Array, ""]:
    """Cumulative error of tail truncation: what dropping the weak neurons costs.

    Neuron i adds `a_i * w_out[i]` to the output of the FFN. It is weak for a token if
    the norm of that is at most `threshold`. The error of a token is the norm of the sum
    of its weak neurons over the norm of the whole output; CETT is the mean over tokens.

    It is 0 where no weak neuron contributes and 1 where all neurons are weak. In
    between it mostly rises with the threshold, but terms may cancel, so neither that
    nor a value below 1 is certain. Gradients hold the set of weak neurons constant.

    Args:
      a: what the output projection multiplies, neurons last: after the nonlinearity,
        and in a gated FFN after the gate.
      w_out: kernel of the output projection; neuron i writes row i.
      threshold: scalar, >= 0, in the unit of the output's norm.
      where: tokens that count, broadcast to the leading axes of `a`; default: all.

    Returns:
      A fraction, computed in float32. Tokens whose output has a norm of at most 1e-6
      of the sum of the neurons' norms (all zero, or cancelled down to rounding error)
      are left out; 0 if no token is left. NaN activations give NaN.

    Raises:
      ValueError: if `a`, `w_out` and `where` do not fit, or `threshold` is no scalar.
      TypeError: if `where` is not bool.

    Example:
      >>> a, w_out = jnp.array([[4.0, 3.0]]), jnp.eye(2)
      >>> cett(a, w_out, 3.5)
      Array(0.6, dtype=float32)

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the CETT metric, with `w_out`
      transposed. Departure: tokens without an output are left out.
    """
    a, w_out, valid = _checked(a, w_out, where)
    _check_scalar(threshold, name="threshold")
    threshold = jnp.asarray(threshold, jnp.float32)
    row_norms = _norm(w_out)
    output_norms, counted = _outputs(a, w_out, row_norms, valid)
    return _cett(a, w_out, row_norms, output_norms, counted, threshold)


def cett_threshold(
    a: Float[Array, "*tokens d_ff"],
    w_out: Float[Array, "d_ff d_model"],
    target: ArrayLike,
    *,
    where: Bool[Array, "*tokens"] | None = None,
    num_steps: int = 24,
) -> Float32[Array, ""]:
    """The largest threshold with `cett` at most `target`, by bisection.

    One search for each layer, all with the same target, each on the activations of the
    dense model. Costs `num_steps + 2` products of `a` and `w_out`, and memory for a few
    arrays like `a` in float32. Stacked layers: `jax.vmap`.

    The threshold is bisected as the bits of a float, so the precision is relative: the
    bracket ends within 2**-16 of the threshold for 24 steps, half of that for each
    further one, and 31 find the very last float.

    Args:
      a: what the output projection multiplies, over calibration tokens, neurons last.
      w_out: kernel of the output projection; neuron i writes row i.
      target: scalar, >= 0; from 1 on every neuron is dropped.
      where: tokens that count, broadcast to the leading axes of `a`; default: all.
      num_steps: halvings of the bracket, 1 to 31.

    Returns:
      A threshold for `cett` and `cett_neuron_thresholds`, with `cett` at most `target`.
      Where cancelling terms make CETT fall in places there may be a larger one. 0 if no
      token counts, NaN if an activation is not finite.

    Raises:
      ValueError: if `a`, `w_out` and `where` do not fit, `target` is no scalar, a
        concrete one is negative or NaN, or `num_steps` is out of range.
      TypeError: if `where` is not bool.

    Example:
      >>> a, w_out = jnp.array([[4.0, 3.0]]), jnp.eye(2)
      >>> threshold = cett_threshold(a, w_out, 0.7)
      >>> bool(3.0 <= threshold < 4.0), float(cett(a, w_out, threshold)) <= 0.7
      (True, True)

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the CETT metric. Departure:
      the official code searches 65,536 thresholds spread evenly from the smallest norm
      to the 0.99 quantile of a sample, so a few large neurons do not coarsen its grid;
      the search here has no grid, no upper quantile and no sample.
    """
    a, w_out, valid = _checked(a, w_out, where)
    _check_scalar(target, name="target")
    if not isinstance(target, Tracer) and not np.asarray(target) >= 0:
        raise ValueError(
            f"`target` must be at least 0, a share of the output's norm; got {target}."
        )
    if not 1 <= num_steps <= 31:
        raise ValueError(f"`num_steps` must be in [1, 31]; got {num_steps}.")
    a, w_out = jax.lax.stop_gradient((a, w_out))
    row_norms = _norm(w_out)
    output_norms, counted = _outputs(a, w_out, row_norms, valid)
    largest = jnp.max(
        _contributions(a, row_norms), where=counted[..., None], initial=jnp.float32(0)
    )

    def few_enough(threshold):
        error = _cett(a, w_out, row_norms, output_norms, counted, threshold)
        return error <= target

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) // 2
        fits = few_enough(_from_bits(middle))
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    # Floats that are not negative have the order of their bits.
    bracket = jnp.zeros([], jnp.int32), jax.lax.bitcast_convert_type(largest, jnp.int32)
    low, _ = jax.lax.fori_loop(0, num_steps, halve, bracket)
    threshold = jnp.where(few_enough(largest), largest, _from_bits(low))
    return jnp.where(jnp.isfinite(largest), threshold, jnp.nan)


def cett_neuron_thresholds(
    threshold: ArrayLike, w_out: Float[Array, "*layers d_ff d_model"]
) -> Float32[Array, "*layers d_ff"]:
    """The activation of each neuron below which it is weak.

    A sparse forward pass keeps `a_i` where `abs(a_i) > tau_i`, which needs no norms.
    Up to rounding these are the neurons that `cett` does not call weak.

    Args:
      threshold: from `cett_threshold`: a scalar, or one for each of the layers.
      w_out: kernel of the output projection; neuron i writes row i.

    Returns:
      `tau_i = threshold / norm(w_out[i])`; inf for a row of zeros, which is always
      weak.

    Raises:
      ValueError: if `w_out` has fewer than two axes or `threshold` is neither a
        scalar nor of the shape of the axes before these.

    Example:
      >>> a, w_out = jnp.array([4.0, 3.0]), jnp.eye(2)
      >>> tau = cett_neuron_thresholds(3.5, w_out)
      >>> jnp.where(jnp.abs(a) > tau, a, 0.0)
      Array([4., 0.], dtype=float32)

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335, official code. Departure:
      it keeps a neuron whose activation equals tau_i; here it is weak, as in `cett`.
    """
    w_out, threshold = jnp.asarray(w_out), jnp.asarray(threshold, jnp.float32)
    if w_out.ndim < 2 or threshold.shape not in ((), w_out.shape[:-2]):
        raise ValueError(
            "`w_out` must be [..., d_ff, d_model], and `threshold` a scalar or one for "
            f"each of the leading axes; got w_out {jax.typeof(w_out)} and threshold "
            f"{jax.typeof(threshold)}."
        )
    norms = _norm(w_out.astype(jnp.float32))
    return jnp.where(
        norms > 0, threshold[..., None] / jnp.where(norms > 0, norms, 1), jnp.inf
    )


def _checked(a, w_out, where) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The operands in float32, and the tokens that count."""
    a, w_out = jnp.asarray(a), jnp.asarray(w_out)
    if a.ndim == 0 or w_out.ndim != 2 or a.shape[-1] != w_out.shape[0]:
        raise ValueError(
            "`a` must be [..., d_ff] and `w_out` [d_ff, d_model]; got a "
            f"{jax.typeof(a)} and w_out {jax.typeof(w_out)}. Transpose a `w_out` that "
            "is [d_model, d_ff]; use `jax.vmap` for stacked layers."
        )
    valid = token_mask(where, a.shape[:-1])
    # first of all: where padding is not finite, no gradient sees it
    a = jnp.where(valid[..., None], a.astype(jnp.float32), 0.0)
    return a, w_out.astype(jnp.float32), valid


def _check_scalar(value: ArrayLike, *, name: str) -> None:
    if jnp.ndim(value):
        raise ValueError(
            f"`{name}` must be a scalar; got shape {jnp.shape(value)}. Use `jax.vmap` "
            "for several."
        )


def _outputs(a, w_out, row_norms, valid) -> tuple[jax.Array, jax.Array]:
    """Norms of the dense outputs, and the tokens that count and have an output."""
    norms = _norm(_matmul(a, w_out))
    terms = _matmul(jnp.abs(a), row_norms)
    # written so that NaN counts and shows in the mean
    return norms, valid & ~(norms <= _CANCELLED * terms)


def _contributions(a, row_norms) -> jax.Array:
    """The norm of what each neuron adds to the output."""
    return jnp.abs(a) * to_rank(row_norms, a.ndim)


def _cett(a, w_out, row_norms, output_norms, counted, threshold) -> jax.Array:
    weak = _contributions(a, row_norms) <= threshold
    errors = _norm(_matmul(jnp.where(weak, a, 0.0), w_out))
    ratios = jnp.where(counted, errors / jnp.where(counted, output_norms, 1.0), 0.0)
    return jnp.sum(ratios) / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1)


def _norm(x: jax.Array) -> jax.Array:
    """Norms along the last axis, with gradient 0, not NaN, at zero."""
    squares = jnp.sum(x * x, axis=-1)
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """In true float32: in fewer bits CETT is not monotone and bisection fails."""
    x_sharding, y_sharding = jax.typeof(x).sharding, jax.typeof(y).sharding
    out_sharding = None
    # Only a mesh with explicit axes shows; there JAX asks where a sum over it lies.
    for neurons, there in (
        (x_sharding.spec[-1], x_sharding),
        (y_sharding.spec[0], y_sharding),
    ):
        if neurons is not None:
            spec = PartitionSpec(*x_sharding.spec[:-1], *y_sharding.spec[1:])
            out_sharding = NamedSharding(there.mesh, spec)
    return jnp.matmul(
        x, y, precision=jax.lax.Precision.HIGHEST, out_sharding=out_sharding
    )


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
