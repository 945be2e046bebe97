"""A decoder made ready for decoding: weights by neuron, and how much is gathered."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax import nn
from sparsejax.decode._keys import KeySelector
from sparsejax.models import Decoder
from sparsejax.typing import KeyPath, plain_path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """A `Decoder` as a pytree, from `prepare`.

    Attributes:
      state: the weights of the model.
      up: for each layer the kernel of `up` as `[d_ff, d_in]`, a neuron's weights side
        by side; None where the layer is computed densely.
      graph: the model without its weights.
      sparse: skip what is not active.
      capacity_factor: room for active neurons and attended keys, over the expected.
      select_keys: which keys plain attention reads; None for all.
    """

    state: nnx.State
    up: tuple[jax.Array | None, ...]
    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    sparse: bool = dataclasses.field(metadata={"static": True})
    capacity_factor: float = dataclasses.field(metadata={"static": True})
    select_keys: KeySelector | None = dataclasses.field(metadata={"static": True})

    def decoder(self) -> Decoder:
        """The model, over the same weights."""
        return nnx.merge(self.graph, self.state)


def prepare(
    model: Decoder,
    *,
    sparse: bool = True,
    capacity_factor: float = 2.0,
    select_keys: KeySelector | None = None,
) -> DecodeModel:
    """Makes a trained model ready for `generate`.

    Of a `SparkFFN` whose threshold leaves neurons out, the kernel of `up` is stored a
    second time, a row for each neuron (that of `down` has such rows already). Kernels
    are stored in the dtype of the computation.

    Args:
      model: any `sj.models.Decoder`; dense and sparse layers may be mixed.
      sparse: False computes sparse layers densely: the same tokens, to compare with.
      capacity_factor: room for active neurons and attended keys, as a multiple of the
        expected number; at least 1. A step that needs more is computed densely, and
        counted: results do not depend on it.
      select_keys: which keys of the cache attention reads, `Quest(...)` or another
        `KeySelector`; all by default. It is for layers of `nn.Attention` and those that
        attend as it does with a cache, `nn.BlockAttention` say, without a window:
        others have a rule of their own. Prompts are read in full.

    Returns:
      A pytree, to be passed through `jax.jit` as any other.

    Raises:
      ValueError: if `capacity_factor` is below 1.

    Example:
      >>> from flax import nnx
      >>> config = sj.models.DecoderConfig(num_layers=1)
      >>> model = sj.decode.prepare(sj.models.Decoder(config, rngs=nnx.Rngs(0)))
      >>> prompt = jnp.array([[72, 101]])
      >>> sj.decode.generate(model, prompt, num_tokens=3).tokens.shape
      (1, 3)
    """
    if not capacity_factor >= 1:
        raise ValueError(
            f"`capacity_factor` must be at least 1; got {capacity_factor}."
        )
    graph, state = nnx.split(model)
    dtype = jnp.dtype(model.config.dtype)
    # layers would cast them in every step, and read them whole for it
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if _is_matrix(path) else leaf, state
    )
    up = tuple(
        jnp.asarray(block.ffn.up.kernel[...], dtype).T
        if sparse and is_sparse(block.ffn)
        else None
        for block in model.blocks
    )
    return DecodeModel(state, up, graph, sparse, float(capacity_factor), select_keys)


def key_selector(model: DecodeModel, layer: object) -> KeySelector | None:
    """Who chooses the keys that this layer reads; None if nobody does."""
    if not isinstance(layer, nn.Attention) or isinstance(layer, nn.SparkAttention):
        return None
    return model.select_keys if model.sparse and layer.window is None else None


def _is_matrix(path: KeyPath) -> bool:
    return plain_path(path)[-1] in ("kernel", "embedding")


def is_sparse(ffn: object) -> bool:
    """Whether a feed-forward layer leaves neurons out."""
    return isinstance(ffn, nn.SparkFFN) and ffn.k < ffn.gate.out_features


def expected_neurons(ffn: nn.SparkFFN, batch: int) -> float:
    """Number of neurons in the union of a choice of `k` for each of `batch` tokens."""
    d_ff = ffn.gate.out_features
    return d_ff * -math.expm1(batch * math.log1p(-ffn.k / d_ff))


def key_capacity(attention: nn.SparkAttention, factor: float) -> int:
    """Room for the keys that one query attends to."""
    return math.ceil(factor * attention.k)
