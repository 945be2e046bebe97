"""The generation loop: prefill, then one token at a time, in one compiled program."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from sparsejax._ints import check_int
from sparsejax._lengths import of_sequences
from sparsejax.decode._cache import slots_for
from sparsejax.decode._model import DecodeModel
from sparsejax.decode._step import Overflows, decode_step, prefill

_LEAST = float(np.finfo(np.float32).tiny)  # temperatures below come to 0 or nearly


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 `[batch, num_tokens]`; after a stop token, stop tokens.
      overflows: for each layer the steps in which more was active than there was room
        for.
    """

    tokens: jax.Array
    overflows: Overflows


def generate(
    model: DecodeModel,
    prompts: Int[Array, "batch seq"],
    lengths: ArrayLike | None = None,
    *,
    num_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    stop_token: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
) -> Generated:
    """Continues each prompt by `num_tokens` tokens.

    Every shape is static: one compilation serves all prompts of a shape. The cache
    lives on the device; nothing returns to the host before the end.

    Args:
      model: from `sj.decode.prepare`.
      prompts: tokens in `[0, vocab_size)`, filled up at the end with anything.
        Under `jax.jit`, where they are not known, their range is not checked.
      lengths: int32 `[batch]` or one integer, in `[1, seq]`: tokens of each prompt. All
        are full by default.
      num_tokens: tokens to generate, at least 1.
      temperature: 0, the default, takes the likeliest token (of equal ones the lowest);
        above 0, tokens are drawn from the softmax of `logits / temperature`.
      top_k: draw from the `top_k` likeliest tokens only (of equal ones the lowest);
        `temperature` must be given.
      stop_token: a token, or several of them: a sequence that drew one repeats it to
        its end.
      key: for drawing; needed if `temperature` is above 0, and only where one is given.

    Returns:
      The tokens, and what overflowed.

    Raises:
      TypeError: if `model` is not from `prepare`, `prompts` are not integers, or a
        number of tokens is none.
      ValueError: if an argument is out of its range.

    Example:
      >>> from flax import nnx
      >>> config = sj.models.DecoderConfig(num_layers=1)
      >>> model = sj.decode.prepare(sj.models.Decoder(config, rngs=nnx.Rngs(0)))
      >>> prompts = jnp.array([[72, 105, 33], [72, 0, 0]])
      >>> out = sj.decode.generate(model, prompts, jnp.array([3, 1]), num_tokens=5)
      >>> out.tokens.shape
      (2, 5)
    """
    if not isinstance(model, DecodeModel):
        raise TypeError(
            f"`model` must come from `sj.decode.prepare`; got a {type(model).__name__}."
        )
    prompts = jnp.asarray(prompts)
    if not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise TypeError(f"`prompts` must be integers; got {jax.typeof(prompts)}.")
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(
            "`prompts` must be [batch, seq], neither of them 0; got shape "
            f"{prompts.shape}."
        )
    batch, seq = prompts.shape
    lengths = seq if lengths is None else lengths
    lengths = of_sequences("lengths", lengths, batch, 1, seq)
    vocab = model.decoder().config.vocab_size
    _check_tokens(prompts, lengths, vocab)
    num_tokens = check_int("num_tokens", num_tokens, least=1)
    if top_k is not None and not 1 <= (top_k := check_int("top_k", top_k)) <= vocab:
        raise ValueError(f"`top_k` must be in [1, {vocab}]; got {top_k}.")
    if temperature is None:
        for name, given in (("top_k", top_k), ("key", key)):
            if given is not None:
                raise ValueError(
                    f"`{name}` is for drawing tokens, and without `temperature` the "
                    "likeliest are taken; pass `temperature=1.0` to draw, or leave "
                    f"`{name}` out."
                )
        temperature = 0.0
    temperature = float(temperature)
    if not temperature >= 0:
        raise ValueError(f"`temperature` must be at least 0; got {temperature}.")
    if temperature > 0 and key is None:
        raise ValueError(
            f"`key` is needed to draw tokens at temperature={temperature}; pass "
            "`key=jax.random.key(0)`, or temperature=0 for the likeliest."
        )
    stop_tokens = () if stop_token is None else np.atleast_1d(stop_token).tolist()
    for token in stop_tokens:
        if not isinstance(token, int) or not 0 <= token < vocab:
            raise ValueError(
                f"`stop_token` must be a token, in [0, {vocab}), or some; got {token}."
            )
    return _generate(
        model,
        prompts,
        lengths,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        greedy=temperature < _LEAST,
        top_k=top_k,
        num_tokens=num_tokens,
        stop_tokens=tuple(stop_tokens),
    )


@functools.partial(
    jax.jit, static_argnames=("greedy", "top_k", "num_tokens", "stop_tokens")
)
def _generate(
    model, prompts, lengths, key, temperature, *, greedy, top_k, num_tokens, stop_tokens
):
    def sample(logits, step):
        if greedy:
            return jnp.argmax(logits, axis=-1)
        step_key = jax.random.fold_in(key, step)
        if top_k is None:
            logits -= jnp.max(logits, axis=-1, keepdims=True)  # none becomes infinite
            return jax.random.categorical(step_key, logits / temperature)
        logits, tokens = jax.lax.top_k(logits, top_k)
        logits -= logits[:, :1]
        drawn = jax.random.categorical(step_key, logits / temperature)
        return jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]

    def body(carry, step):
        token, stopped, cache, total = carry
        logits, cache, overflows = decode_step(model, token, cache)
        token, stopped = choose(logits, step, token, stopped)
        total = jax.tree.map(jnp.add, total, overflows)
        return (token, stopped, cache, total), token

    def choose(logits, step, before, stopped):
        token = sample(logits, step).astype(jnp.int32)
        if not stop_tokens:
            return token, stopped
        token = jnp.where(stopped, before, token)
        return token, jnp.isin(token, jnp.array(stop_tokens))

    num_slots = slots_for(prompts.shape[1] + num_tokens)
    logits, cache = prefill(model, prompts, lengths, num_slots=num_slots)
    nothing = jnp.zeros(len(prompts), jnp.int32)
    first, stopped = choose(logits, 0, nothing, nothing > 0)
    none = jnp.zeros(len(model.up), jnp.int32)
    carry = (first, stopped, cache, Overflows(none, none))
    (*_, total), rest = jax.lax.scan(body, carry, jnp.arange(1, num_tokens))
    return Generated(jnp.concatenate([first[None], rest]).T, total)


def _check_tokens(prompts: jax.Array, lengths: jax.Array, vocab: int) -> None:
    """Raises if a known prompt, without what fills it up, has what is no token."""
    if isinstance(prompts, Tracer) or isinstance(lengths, Tracer):
        return
    if not (prompts.is_fully_addressable and lengths.is_fully_addressable):
        return
    known = np.asarray(prompts)
    inside = np.arange(known.shape[1]) < np.asarray(lengths)[:, None]
    wrong = np.argwhere(inside & ((known < 0) | (known >= vocab)))
    if len(wrong):
        row, at = wrong[0]
        raise ValueError(
            f"`prompts` must be tokens in [0, {vocab}); got {known[row, at]} at "
            f"[{row}, {at}]. Use the tokenizer of this model, and `lengths` if it "
            "only fills up a shorter prompt."
        )
