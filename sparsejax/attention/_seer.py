"""SeerAttention: a small gate learns which blocks carry a model's attention.

The gate scores blocks from pooled queries and keys before their rotation. What it is
trained on is in `_seer_target`, what is kept of the scores in `_seer_select`, and the
form that decodes token by token in `_seer_decode`. Causal self-attention throughout.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sparsejax.attention import _blocks
from sparsejax.attention._arguments import check_sequences, prompt_lengths

Rotate: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""Gives `[batch, seq, heads, dim]` the positions `[1 | batch, seq]`; the model's own
`sj.nn.apply_rope` with its `base` bound."""

KEY_POOLS = (jnp.max, jnp.min, jnp.mean)  # of the gate's key features, in this order


class SeerGate(NamedTuple):
    """Weights of the gate of one layer.

    Attributes:
      query: `[heads, head_dim, d_gate]`, or None: pooled queries are used as they are,
        and `d_gate` is `head_dim`.
      key: `[heads, 3 head_dim, d_gate]` where `query` is None, else `[kv_heads, ..]`.
    """

    query: jax.Array | None
    key: jax.Array


def init_seer_gate(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    key: jax.Array,
    d_gate: int = 128,
    project_query: bool | None = None,
) -> SeerGate:
    """Draws a gate from Normal(0, 0.02).

    Args:
      num_heads: query heads; each has scores of its own.
      num_kv_heads: key heads; divides `num_heads`.
      head_dim: width of queries and keys.
      key: random key.
      d_gate: width of what the gate compares; even, for the rotation.
      project_query: whether queries have a kernel; by default only where `d_gate` is
        not `head_dim`, where they need one.

    Returns:
      float32 weights.

    Raises:
      ValueError: if `num_kv_heads` does not divide `num_heads`, a size is below 1,
        `d_gate` is odd, or another `d_gate` than `head_dim` has no projection.

    References:
      Gao et al., 2024, https://arxiv.org/abs/2410.13276. Pooling, kernels and draw are
      those of the code released with it.
    """
    check_sizes(num_heads, num_kv_heads, head_dim, d_gate)
    if project_query is None:
        project_query = d_gate != head_dim
    if not project_query and d_gate != head_dim:
        raise ValueError(
            "without `project_query`, `d_gate` must be `head_dim`; got "
            f"d_gate={d_gate} and head_dim={head_dim}."
        )
    of_query, of_key = jax.random.split(key)
    width = len(KEY_POOLS) * head_dim
    key_heads = num_kv_heads if project_query else num_heads

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.float32)

    kernel = draw(of_key, key_heads, width, d_gate)
    if not project_query:
        return SeerGate(None, kernel)
    return SeerGate(draw(of_query, num_heads, head_dim, d_gate), kernel)


def seer_scores(
    gate: SeerGate,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
    rotate: Rotate,
    positions: Int[Array, "#batch seq"] | None = None,
    lengths: ArrayLike | None = None,
) -> Float[Array, "batch heads blocks blocks"]:
    """Scores each block of keys for each block of queries, by the gate.

    Queries are pooled by their mean, keys by maximum, minimum and mean side by side;
    the last block pools the tokens that it has. The projected are rotated to the
    position of the first token of their block: pooling what is rotated already would
    average the phases away. Arithmetic is float32.

    Args:
      gate: weights.
      query: before rotation; query head `i` uses key head `i // (heads / kv_heads)`.
      key: before rotation; `kv_heads` divides `heads`.
      block: tokens of a block, in `[1, seq]`; the paper has 64.
      rotate: see `Rotate`; called with blocks of width `d_gate`.
      positions: of the tokens; 0, 1, 2, ... by default.
      lengths: see `block_scores`; what comes after them is not pooled.

    Returns:
      float32; -inf where a block lies after the queries. Gradients reach `gate` alone.

    Raises:
      ValueError: if shapes disagree, also those of `gate` and `positions`, or `block`
        or `lengths` are out of range.

    Example:
      >>> gate = init_seer_gate(2, 2, 8, d_gate=8, key=jax.random.key(0))
      >>> x = jax.random.normal(jax.random.key(1), (1, 64, 2, 8))
      >>> import functools
      >>> rotate = functools.partial(sj.nn.apply_rope, base=1e4)
      >>> scores = seer_scores(gate, x, x, block=16, rotate=rotate)
      >>> print(jnp.isfinite(scores[0, 0]).astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 1 1]]

    References:
      Gao et al., 2024, https://arxiv.org/abs/2410.13276, and the code released with it:
      its default pooling, `Qavg_Kmaxminavg`.
    """
    check_sequences(query, key, block)
    _check_gate(gate, query, key)
    if positions is None:
        positions = jnp.arange(query.shape[1])[None]
    if positions.shape not in ((1, query.shape[1]), query.shape[:2]):
        raise ValueError(
            f"`positions` must be {query.shape[:2]}, one for each token, or of batch "
            f"1; got shape {positions.shape}."
        )
    lengths = prompt_lengths(query, key, lengths)
    query, key = jax.lax.stop_gradient((query, key))
    gated_query = _blocks.pooled(query, block, jnp.mean, lengths)
    if gate.query is not None:
        gated_query = jnp.einsum("bnhi,hio->bnho", gated_query, gate.query)
    features = key_features(key, block, lengths)
    # a kernel for each query head, or for each key head
    kernels = gate.key.reshape(key.shape[2], -1, *gate.key.shape[1:])
    gated_key = jnp.einsum("bnki,kgio->bnkgo", features, kernels)
    sizes = *gated_key.shape[:2], len(gate.key), gated_key.shape[-1]
    gated_key = gated_key.reshape(sizes)
    gated_key = _blocks.to_heads(gated_key, query.shape[2])
    starts = positions[:, ::block]
    gated_query, gated_key = rotate(gated_query, starts), rotate(gated_key, starts)
    scores = jnp.einsum("bihd,bjhd->bhij", gated_query, gated_key)
    scores *= gated_key.shape[-1] ** -0.5
    return jnp.where(jnp.tri(scores.shape[-1], dtype=jnp.bool_), scores, -jnp.inf)


def key_features(
    key: jax.Array, block: int, lengths: jax.Array | None = None
) -> jax.Array:
    """Pooled keys `[batch, blocks, kv_heads, 3 head_dim]`, float32."""
    pools = [_blocks.pooled(key, block, pool, lengths) for pool in KEY_POOLS]
    # else XLA pools for the concatenation too, and reads the keys twice
    return jnp.concatenate(jax.lax.optimization_barrier(pools), axis=-1)


def check_sizes(num_heads: int, num_kv_heads: int, head_dim: int, d_gate: int) -> None:
    """Raises unless a gate can be made for these heads."""
    if min(num_heads, num_kv_heads, head_dim, d_gate) < 1 or d_gate % 2:
        raise ValueError(
            "heads and widths must be at least 1 and `d_gate` even; got "
            f"num_heads={num_heads}, num_kv_heads={num_kv_heads}, "
            f"head_dim={head_dim}, d_gate={d_gate}."
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            "`num_kv_heads` must divide `num_heads`; got "
            f"num_kv_heads={num_kv_heads} and num_heads={num_heads}."
        )


def check_weights(
    gate: Any, wanted: Mapping[str, tuple[int, ...]], heads: tuple[int, int], dim: int
) -> None:
    """Raises unless the named weights of a gate have the shapes that are wanted.

    Args:
      gate: of whichever form.
      wanted: shapes by name.
      heads: query and key heads that it is used for.
      dim: their width.
    """
    for name, want in wanted.items():
        got = getattr(gate, name).shape
        if got != want or heads[0] % heads[1]:
            raise ValueError(
                f"`gate.{name}` must have shape {want} for {heads[0]} query and "
                f"{heads[1]} key heads of width {dim}; got {got}. Is it the gate of "
                "another model?"
            )


def _check_gate(gate: SeerGate, query: jax.Array, key: jax.Array) -> None:
    heads, dim = query.shape[2:]
    width, d_gate = len(KEY_POOLS) * dim, gate.key.shape[-1]
    if gate.query is None:
        wanted = {"key": (heads, width, dim)}
    else:
        wanted = {"query": (heads, dim, d_gate), "key": (key.shape[2], width, d_gate)}
    check_weights(gate, wanted, (heads, key.shape[2]), dim)
