"""Selectors that choose once, after the prompt: what they drop is never read again."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from sparsejax import attention
from sparsejax._promotion import along_last
from sparsejax.decode._selector import LayerTokens
from sparsejax.formats import KeyLists


class _ChosenOnce:
    """What both share; their fields are the options of `choose`."""

    choose: ClassVar[Callable[..., KeyLists]]

    def start(
        self, tokens: LayerTokens, lengths: jax.Array, num_slots: int
    ) -> KeyLists:
        """Chooses; raises where a setting is out of its range."""
        seq = tokens.key.shape[1]
        options = dataclasses.asdict(cast(Any, self))
        for name in ("num_kept", "window", "local", "sink"):
            options[name] = min(options[name], seq)  # all of a shorter prompt
        lists = self.choose(tokens.query, tokens.key, lengths=lengths, **options)
        return _with_room(lists, num_slots - seq)

    def append(self, known: KeyLists, tokens: LayerTokens) -> KeyLists:
        """Lists the next token."""
        return _appended(known, tokens.positions)

    def select(self, known: KeyLists, tokens: LayerTokens) -> KeyLists:
        """Gives the same lists to all queries."""
        return known


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SnapKV(_ChosenOnce):
    """Reads the keys of the prompt that its last queries attend to, and all later keys.

    The keys are chosen once; the others stay in the cache, but are read no more. Lists
    have room for as many later tokens as the cache has slots behind the longest prompt,
    which `generate` never exceeds. If `decode_step` continues a shorter prompt further,
    what is beyond is not read, and each such step is counted in `Overflows`.

    Attributes:
      num_kept: keys of the prompt that each key head keeps; all of one that has fewer.
      window: how many of the last queries are asked; all of a prompt that has fewer.
      pool_size: keys of the moving average of importance, odd.
      local: last keys of the prompt that are always kept.
      sink: first keys likewise.

    Example:
      >>> from flax import nnx
      >>> config = sj.models.DecoderConfig(num_layers=1)
      >>> model = sj.models.Decoder(config, rngs=nnx.Rngs(0))
      >>> select = sj.decode.SnapKV(8, window=4, pool_size=3, local=2)
      >>> ready = sj.decode.prepare(model, select_keys=select)
      >>> prompts = jnp.arange(20).reshape(1, 20)
      >>> sj.decode.generate(ready, prompts, num_tokens=3).overflows.attention
      Array([0], dtype=int32)

    References:
      See `sj.attention.snapkv`.
    """

    choose = staticmethod(attention.snapkv)

    num_kept: int = 1024
    window: int = 256
    pool_size: int = 21
    local: int = 128
    sink: int = 4


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AdaSnapKV(_ChosenOnce):
    """As `SnapKV`, with a budget that the key heads share, some of it for each.

    Attributes:
      num_kept: mean number of keys of the prompt that a key head keeps; all of a prompt
        that has fewer.
      min_share: of `num_kept`, what each head keeps at least.
      window: see `SnapKV`.
      pool_size: likewise.
      local: likewise.
      sink: likewise.

    References:
      See `sj.attention.ada_snapkv`.
    """

    choose = staticmethod(attention.ada_snapkv)

    num_kept: int = 1024
    min_share: float = 0.2
    window: int = 256
    pool_size: int = 21
    local: int = 128
    sink: int = 4


def _with_room(lists: KeyLists, num_later: int) -> KeyLists:
    """Lists with so many entries more, which repeat the last."""
    padding = [(0, 0)] * (lists.indices.ndim - 1) + [(0, num_later)]
    indices = jnp.pad(lists.indices, padding, mode="edge")
    return dataclasses.replace(lists, indices=indices)


def _appended(lists: KeyLists, positions: jax.Array) -> KeyLists:
    """Lists with one key more, `positions` `[batch, 1]`, behind all that they have."""
    capacity = lists.indices.shape[-1]
    places = along_last(capacity, lists.indices.ndim)
    free = places >= lists.num[..., None]
    return dataclasses.replace(
        lists,
        num=jnp.minimum(lists.num + 1, capacity),
        indices=jnp.where(free, positions[..., None], lists.indices),
        overflowed=lists.overflowed | (lists.num >= capacity),
    )
