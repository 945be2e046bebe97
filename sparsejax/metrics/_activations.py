"""How many activations are not zero: per token, per neuron, per group of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32

from sparsejax._tokens import token_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationCounts:
    """How often each neuron was active, and over how many tokens.

    Counts add up exactly, however the data are split: over batches by
    `jax.tree.map(jnp.add, x, y)`, over devices by `jax.lax.psum`. Shares do not:
    averaging them is wrong as soon as two batches have different numbers of tokens.
    `scan` and `vmap` over layers put a leading axis on both fields; every property
    then has that axis too.

    The fields hold 2**32 - 1 tokens. Sums over neurons would overflow long before, so
    they are not stored.

    Attributes:
      per_neuron: uint32[..., d_ff]; tokens for which the neuron is not zero.
      tokens: uint32[...]; tokens counted.
    """

    per_neuron: jax.Array
    tokens: jax.Array

    @property
    def density(self) -> Float32[Array, "*layers"]:
        """Share of activations that are not zero; 0 if no token was counted."""
        return jnp.mean(self.neuron_frequency, axis=-1)

    @property
    def neuron_frequency(self) -> Float32[Array, "*layers d_ff"]:
        """Share of tokens that use each neuron; a dead neuron has 0."""
        tokens = jnp.maximum(self.tokens, 1).astype(jnp.float32)
        return self.per_neuron.astype(jnp.float32) / tokens[..., None]

    @property
    def nonzeros(self) -> np.ndarray | np.uint64:
        """Activations that are not zero: exact, on the host, so not under jit."""
        return np.asarray(self.per_neuron).sum(axis=-1, dtype=np.uint64)

    @property
    def entries(self) -> np.ndarray | np.uint64:
        """Activations counted: exact, on the host, so not under jit."""
        d_ff = np.uint64(self.per_neuron.shape[-1])
        return np.asarray(self.tokens).astype(np.uint64) * d_ff


def activation_counts(
    a: Float[Array, "*tokens d_ff"], *, where: Bool[Array, "*tokens"] | None = None
) -> ActivationCounts:
    """Counts the activations that are exactly nonzero, over all tokens.

    Says both how sparse a layer is (`.density`) and in which way
    (`.neuron_frequency`): dead neurons show as a spike at 0, sparsity that depends on
    the input does not.

    Args:
      a: activations after the nonlinearity, neurons last. NaN counts as nonzero. No
        tokens, `jnp.zeros((0, d_ff))`, gives the zero to start a sum from.
      where: tokens to count, broadcast to the leading axes of `a`; default: all. Leave
        padding out.

    Returns:
      Counts to add up, fewer than 2**32 tokens in all.

    Raises:
      ValueError: if `a` has no axis, `where` does not fit it, or there are 2**32
        tokens or more.
      TypeError: if `where` is not bool.

    Example:
      >>> first = activation_counts(jnp.array([[0.0, 2.0], [0.0, 0.5]]))
      >>> second = activation_counts(jnp.array([[1.0, 0.0]]))
      >>> counts = jax.tree.map(jnp.add, first, second)
      >>> counts.density, counts.per_neuron, counts.tokens
      (Array(0.5, dtype=float32), Array([1, 2], dtype=uint32), Array(3, dtype=uint32))

    References:
      Li et al., 2022, https://arxiv.org/abs/2210.06313: the percentage of nonzero
      entries of the activation map, and the activation frequency of each neuron. Here
      both are fractions.
    """
    a = _with_neurons(a)
    valid = token_mask(where, a.shape[:-1])
    if valid.size >= 2**32:
        raise ValueError(
            f"one count holds fewer than 2**32 tokens; got {valid.size}. Count in "
            "parts, and add them on the host."
        )
    axes = tuple(range(valid.ndim))
    active = (a != 0) & valid[..., None]
    return ActivationCounts(
        per_neuron=jnp.sum(active, axis=axes, dtype=jnp.uint32),
        tokens=jnp.sum(valid, dtype=jnp.uint32),
    )


def activation_density(
    a: Float[Array, "..."],
    *,
    where: Bool[Array, "..."] | None = None,
    axis: int = -1,
) -> Float32[Array, "..."]:
    """The share of each token's activations that are exactly nonzero.

    For the density of a data set add up `activation_counts` instead: it weighs every
    token alike whatever the batches.

    Args:
      a: activations after the nonlinearity. NaN counts as nonzero.
      where: tokens to measure, broadcast to the shape of `a` without `axis`; default:
        all. The others get 0; average by `jnp.mean(density, where=where)`.
      axis: of the neurons.

    Returns:
      A fraction in [0, 1] for each token: the shape of `a` without `axis`.

    Raises:
      ValueError: if `a` has no such axis, the axis is empty, or `where` does not fit.
      TypeError: if `where` is not bool.

    Example:
      >>> activation_density(jnp.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]]))
      Array([0.5 , 0.25], dtype=float32)

    References:
      Li et al., 2022, https://arxiv.org/abs/2210.06313.
    """
    a = jnp.asarray(a)
    if not -a.ndim <= axis < a.ndim or a.shape[axis] == 0:
        raise ValueError(
            f"`axis` must name the neurons, at least one; got axis={axis} for shape "
            f"{a.shape}."
        )
    axis %= a.ndim
    valid = token_mask(where, a.shape[:axis] + a.shape[axis + 1 :])
    nonzeros = jnp.sum(a != 0, axis=axis, dtype=jnp.int32)
    density = nonzeros.astype(jnp.float32) / a.shape[axis]
    return jnp.where(valid, density, 0.0)


def union_density(
    a: Float[Array, "*lead tokens d_ff"],
    batch: int,
    *,
    where: Bool[Array, "*lead tokens"] | None = None,
) -> Float32[Array, "*lead groups"]:
    """The share of neurons that at least one of `batch` consecutive tokens uses.

    A decoder that serves `batch` tokens at once must load the weights of all neurons in
    the union, so this, not the density of one token, bounds what it can skip. Groups do
    not overlap; `batch=1` is `activation_density`.

    Args:
      a: activations after the nonlinearity, neurons last, tokens before them.
      batch: tokens in a group, a divisor of the number of tokens.
      where: tokens that count, broadcast to the leading axes of `a`; default: all. The
        others use no neuron.

    Returns:
      A fraction in [0, 1] for each of the `tokens / batch` groups.

    Raises:
      ValueError: if `batch` is not such a divisor, `a` has fewer than two axes or no
        neuron, or `where` does not fit.
      TypeError: if `where` is not bool.

    Example:
      >>> a = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
      >>> union_density(a, 2)
      Array([0.5], dtype=float32)
    """
    a = _with_neurons(a)
    if a.ndim < 2:
        raise ValueError(f"`a` must be [..., tokens, d_ff]; got shape {a.shape}.")
    *lead, tokens, d_ff = a.shape
    if batch < 1 or tokens % batch:
        raise ValueError(
            f"`batch` must divide the number of tokens, {tokens}; got {batch}. Cut the "
            "last tokens off, or pad and leave the padding out by `where`."
        )
    active = (a != 0) & token_mask(where, a.shape[:-1])[..., None]
    groups = active.reshape(*lead, tokens // batch, batch, d_ff)
    used = jnp.sum(jnp.any(groups, axis=-2), axis=-1, dtype=jnp.int32)
    return used.astype(jnp.float32) / d_ff


def _with_neurons(a: ArrayLike) -> jax.Array:
    a = jnp.asarray(a)
    if a.ndim == 0 or a.shape[-1] == 0:
        raise ValueError(
            f"`a` must be [..., d_ff] with at least one neuron; got shape {a.shape}."
        )
    return a
