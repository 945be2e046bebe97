"""A decoder made ready for decoding: weights by neuron, and how much is gathered."""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax import nn
from sparsejax.decode._selector import KeySelector
from sparsejax.models import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """A `Decoder` as a pytree, from `prepare`.

    Attributes:
      state: the weights of the model.
      up: for each layer the kernel of `up` as `[d_ff, d_in]`, a neuron's weights side
        by side; None where the layer is computed densely.
      select_keys: for each layer who chooses the keys that it reads; None for all.
      graph: the model without its weights.
      sparse: skip what is not active.
      capacity_factor: room for active neurons and attended keys, over the expected.
    """

    state: nnx.State
    up: tuple[jax.Array | None, ...]
    select_keys: tuple[KeySelector | None, ...]
    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    sparse: bool = dataclasses.field(metadata={"static": True})
    capacity_factor: float = dataclasses.field(metadata={"static": True})

    def decoder(self) -> Decoder:
        """The model, over the same weights."""
        return nnx.merge(self.graph, self.state)


def prepare(
    model: Decoder,
    *,
    sparse: bool = True,
    capacity_factor: float = 2.0,
    select_keys: KeySelector | Sequence[KeySelector | None] | None = None,
) -> DecodeModel:
    """Makes a trained model ready for `generate`.

    Of a `SparkFFN` whose threshold leaves neurons out, the kernel of `up` is stored a
    second time, a row for each neuron (that of `down` has such rows already). Kernels
    are stored in the dtype of the computation, those of queries, keys and values side
    by side.

    Args:
      model: any `sj.models.Decoder`; dense and sparse layers may be mixed.
      sparse: False computes sparse layers densely: the same tokens, to compare with. It
        leaves `select_keys` aside too.
      capacity_factor: room for active neurons and attended keys, as a multiple of the
        expected number; at least 1. A step that needs more is computed densely, and
        counted: results do not depend on it.
      select_keys: which keys of the cache attention reads: `Quest`, `DoubleSparsity`,
        `Seer`, `SnapKV`, `AdaSnapKV` or a `KeySelector` of your own; or a sequence with
        one for each layer, None where it reads all. All by default. It is for layers of
        `nn.Attention` and those that attend as it does with a cache, such as
        `nn.BlockAttention` and `nn.SeerAttention`, without a window: others have a rule
        of their own. One for a whole model passes by these, of a sequence they must
        have None. Prompts are read as without it.

    Returns:
      A pytree, to be passed through `jax.jit` as any other.

    Raises:
      TypeError: if `model` is no `Decoder`, a layer attends in a way of its own that
        has no step, or a selector is not a pytree of arrays.
      ValueError: if `capacity_factor` is below 1, there are selectors for another
        number of layers, or there is one for a layer with a rule of its own, or for a
        model of nothing else.

    Example:
      >>> from flax import nnx
      >>> config = sj.models.DecoderConfig(num_layers=1)
      >>> model = sj.decode.prepare(sj.models.Decoder(config, rngs=nnx.Rngs(0)))
      >>> prompt = jnp.array([[72, 101]])
      >>> sj.decode.generate(model, prompt, num_tokens=3).tokens.shape
      (1, 3)
    """
    if not isinstance(model, Decoder):
        raise TypeError(
            f"`model` must be an `sj.models.Decoder`; got {type(model).__name__}. Put "
            "layers of your own into one by its `DecoderConfig`."
        )
    if not capacity_factor >= 1:
        raise ValueError(
            f"`capacity_factor` must be at least 1; got {capacity_factor}."
        )
    model = nnx.clone(model)  # that of the caller stays as it is
    for at, block in enumerate(model.blocks):
        _check_attention(block.attention, at)
        block.attention.join()
    dtype = jnp.dtype(model.config.dtype)
    for _, module in nnx.iter_modules(model):
        _cast_matrices(module, dtype)
    graph, state = nnx.split(model)
    up = tuple(
        jnp.asarray(block.ffn.up.kernel[...], dtype).T
        if sparse and is_sparse_ffn(block.ffn)
        else None
        for block in model.blocks
    )
    selectors = _selectors(model, select_keys if sparse else None)
    return DecodeModel(state, up, selectors, graph, sparse, float(capacity_factor))


def _selectors(model: Decoder, select_keys) -> tuple[KeySelector | None, ...]:
    """Who chooses the keys that each layer reads; None where nobody does."""
    layers = [block.attention for block in model.blocks]
    # a `NamedTuple` may be a selector itself
    is_own = hasattr(select_keys, "select")
    is_one = is_own or not isinstance(select_keys, list | tuple)
    each: list[Any] = [select_keys] * len(layers) if is_one else list(select_keys)
    if len(each) != len(layers):
        raise ValueError(
            f"`select_keys` must be one, or one for each of {len(layers)} layers; got "
            f"{len(each)}. Calibrate on this model, or fill up by None."
        )
    for leaf in jax.tree.leaves(each):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                "`select_keys` must be pytrees of arrays; got a leaf of type "
                f"{type(leaf).__name__}. Register its class, without arrays by "
                "`jax.tree_util.register_static`."
            )
    rules = [_own_rule(layer) for layer in layers]
    # one for a mixed model is for the layers that can use it
    strict = not is_one or all(rules)
    for at, (rule, selector) in enumerate(zip(rules, each, strict=True)):
        if strict and rule is not None and selector is not None:
            raise ValueError(
                "`select_keys` must be for layers that read all keys; got "
                f"{type(selector).__name__} for blocks.{at}, where {rule}. Pass None "
                f"for {'this model' if is_one else 'this layer'}, or build it with "
                "`nn.Attention` without a window."
            )
    return tuple(
        selector if rule is None else None
        for selector, rule in zip(each, rules, strict=True)
    )


def _own_rule(layer: Any) -> str | None:
    """What chooses the keys that a layer reads; None where it reads all."""
    if layer.selects_keys:
        return f"{type(layer).__name__} chooses its keys itself"
    if layer.window is not None:
        return f"a window of {layer.window} chooses them"
    return None


def _cast_matrices(module: nnx.Module, dtype: jnp.dtype) -> None:
    """Stores what a layer would cast in every step, and read whole for it."""
    # an embedding looks up in another dtype than that of what it gives
    computes_in = getattr(module, "rows_dtype", getattr(module, "dtype", None))
    if computes_in is None or jnp.dtype(computes_in) != dtype:
        return
    for name in ("kernel", "embedding"):
        param = getattr(module, name, None)
        if isinstance(param, nnx.Param) and jnp.issubdtype(param.dtype, jnp.floating):
            param.set_value(param[...].astype(dtype))


def is_sparse_ffn(ffn: Any) -> bool:
    """Whether a feed-forward layer leaves out neurons, and does so as ours does."""
    own = ("parts", "gate_values", "gate_scores", "hidden", "__call__")
    return (
        _computes_as(ffn, nn.SparkFFN, *own)
        and nn.is_plain_linear(ffn.up)
        and nn.is_plain_linear(ffn.down)
        and ffn.k < ffn.gate.out_features
    )


def is_sparse_attention(layer: object) -> bool:
    """Whether attention leaves out keys as Spark attention does."""
    return _computes_as(layer, nn.SparkAttention, "attend")


def _computes_as(layer: Any, base: type, *methods: str) -> bool:
    """Whether a layer is of a class, or of a subclass that left these as they are."""
    return isinstance(layer, base) and all(
        getattr(type(layer), name) is getattr(base, name) for name in methods
    )


def _check_attention(layer: object, at: int) -> None:
    """Raises unless a layer can attend to a cache."""
    if not isinstance(layer, nn.Attention):
        raise TypeError(
            "each layer must attend by a subclass of `sj.nn.Attention`, whose parts "
            f"decoding needs one by one; got {type(layer).__name__} in blocks.{at}."
        )
    if not layer.decodes:
        raise TypeError(
            "each layer must attend in decoding as in training; got a "
            f"{type(layer).__name__} in blocks.{at}, which overrides `__call__`, "
            "`project` or `mix`, and decoding calls none of these. Override what it "
            "calls, `unrotated`, `rotate`, `attend` or `combine`; or set `decodes = "
            "True` in the class, if they give the same."
        )
    try:
        inspect.signature(layer.attend).bind(None, None, None, lengths=None)
    except TypeError:
        raise TypeError(
            "`attend` must take `lengths`, those of prompts that differ; that of "
            f"{type(layer).__name__} in blocks.{at} does not. Add `lengths=None`."
        ) from None


def expected_neurons(ffn: nn.SparkFFN, batch: int) -> float:
    """Number of neurons in the union of a choice of `k` for each of `batch` tokens."""
    d_ff = ffn.gate.out_features
    return d_ff * -math.expm1(batch * math.log1p(-ffn.k / d_ff))
