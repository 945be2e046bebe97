"""A decoder whose equal blocks are stacked and scanned, and its loss in few logits.

Compiling takes as long as for one block, and an optimizer sees one leaf for each kernel
of a block in place of one for each layer. `unroll` gives up the former: a step has then
half of the kernels on a GPU, and moves a third to two thirds less bytes, as a scan
copies what it keeps for the gradient.

Weights are `{"blocks": .., "rest": ..}`, every leaf of the blocks `[num_layers, ..]`;
give methods `stacked=stacked_axes`. With `"masks"` beside them, of
`ScannedDecoder.block_masks`, block-sparse layers skip blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from sparsejax import models
from sparsejax.typing import KeyPath, Params, plain_path

Loss = Callable[..., jax.Array]  # (weights, batch, teacher=None) -> float32[], nats


def stacked_axes(path: KeyPath, leaf: Any) -> int:
    """What methods take as `stacked`, also of a tree that holds such weights."""
    del leaf
    return int("blocks" in plain_path(path))


@dataclasses.dataclass(frozen=True)
class ScannedDecoder:
    """What of a decoder are no weights; made by `scan_blocks`."""

    outer: Any  # graph and other state of all but the blocks
    block: Any  # graph of one block, and what the blocks hold besides, stacked
    unroll: bool = False  # the scan

    def hidden(self, weights: Params, tokens: jax.Array, **options: Any) -> Any:
        """The last block's output, `[batch, seq, d_model]`.

        With `with_density=True` also the densities, as `models.Decoder` gives them.
        """
        x, densities, _ = self._scan(weights, tokens, **options)
        return x if densities is None else (x, densities)

    def hidden_and_gate_losses(
        self, weights: Params, tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and the loss of each layer's gate, see `sj.nn.SeerAttention`."""
        x, _, losses = self._scan(
            weights, tokens, set_to={"distill": True}, pop=sj.nn.pop_gate_losses
        )
        return x, losses[:, 0]

    def block_masks(self, weights: Params, opt_state: Any) -> Any:
        """The optimizer's masks of all block-sparse layers, for `weights["masks"]`."""
        graph, other = self.block
        blocks = nnx.merge(graph, weights["blocks"], other, copy=True)
        sj.nn.set_block_masks(nnx.Dict(blocks=blocks), opt_state)
        return nnx.split(blocks, nnx.Param, ...)[2]

    def _scan(
        self,
        weights: Params,
        tokens: jax.Array,
        set_to: Mapping[str, Any] | None = None,
        pop: Callable[[nnx.Module], Any] = lambda block: None,
        **options: Any,
    ) -> tuple[jax.Array, Any, Any]:
        """The last block's output, and the densities and what `pop` takes, stacked.

        `set_to` are attributes of the blocks' layers, during the call.
        """
        graph, other = self.block
        x = self._rest(weights).embed(tokens)
        positions = jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])

        def layer(x, of_layer):
            block = nnx.merge(graph, *of_layer)
            if set_to:
                block.set_attributes(**set_to)
            found = block(x, positions, **options)
            x, density = found if isinstance(found, tuple) else (found, None)
            return x, (density, pop(block))

        layers = weights["blocks"], weights.get("masks", other)
        x, (densities, popped) = jax.lax.scan(layer, x, layers, unroll=self.unroll)
        return x, densities, popped

    def logits(self, weights: Params, hidden: jax.Array) -> jax.Array:
        return self._rest(weights).logits(hidden)

    def _rest(self, weights: Params) -> models.Decoder:
        graph, other = self.outer
        return nnx.merge(graph, weights["rest"], other)


def scan_blocks(
    model: models.Decoder, *, unroll: bool = False
) -> tuple[ScannedDecoder, Params]:
    """Takes a decoder apart, which stays as it is.

    Raises:
      ValueError: if its blocks are not all of one kind.
    """
    outer = nnx.clone(model)
    blocks = [nnx.split(block, nnx.Param, ...) for block in outer.blocks]
    outer.blocks = nnx.List()
    graph = blocks[0][0]
    for layer, (found, *_) in enumerate(blocks):
        if found != graph:
            raise ValueError(
                "blocks must be of one kind to be scanned; got another in layer "
                f"{layer} than in layer 0. Use one attention and one FFN for all."
            )
    weights, other = (
        jax.tree.map(lambda *x: jnp.stack(x), *layers)
        for layers in list(zip(*blocks, strict=True))[1:]
    )
    outer_graph, rest, outer_other = nnx.split(outer, nnx.Param, ...)
    decoder = ScannedDecoder((outer_graph, outer_other), (graph, other), unroll)
    return decoder, {"blocks": weights, "rest": rest}


def create(
    config: models.DecoderConfig,
    kind: Callable[..., models.Decoder] = models.Decoder,
    *,
    unroll: bool = False,
) -> tuple[ScannedDecoder, Callable[[int], Params]]:
    """A decoder, and seed -> its first weights, by one program.

    Raises:
      ValueError: as `scan_blocks`.
    """
    graphs = []

    @jax.jit
    def first(seed):
        rngs = nnx.Rngs(jax.random.key(seed))
        decoder, weights = scan_blocks(kind(config, rngs=rngs))
        graphs[:], others = zip(decoder.outer, decoder.block, strict=True)
        return weights, others

    _, others = first(0)
    outer, block = zip(graphs, others, strict=True)
    return ScannedDecoder(outer, block, unroll), lambda seed: first(seed)[0]


def token_loss(
    decoder: ScannedDecoder, *, rows: int, eta: float = 0.0, temperature: float = 1.0
) -> Loss:
    """The loss of the next token, a mean over a batch `[n * rows, seq + 1]`.

    Logits exist for `rows` sequences at once, and are computed again for the gradient
    unless these are the whole batch: of SmolLM2 they take 0.1 GB for 512 tokens,
    several times in a loss.

    Args:
      decoder: of the weights and of the teacher's.
      rows: sequences; divides those of a batch.
      eta: share of the teacher in the loss, see `sj.distillation_loss`. 0 runs none.
      temperature: of that share.
    """

    def loss(weights, batch, teacher=None):
        inputs, labels = batch[:, :-1], batch[:, 1:]
        hidden = decoder.hidden(weights, inputs)
        taught = decoder.hidden(teacher, inputs) if eta else None

        def of_rows(chunk):
            labels, hidden, taught = chunk
            logits = decoder.logits(weights, hidden)
            if taught is None:
                return cross_entropy(logits, labels)
            return sj.distillation_loss(
                logits,
                decoder.logits(teacher, taught),
                labels,
                eta=eta,
                temperature=temperature,
            )

        whole = labels, hidden, taught
        if len(batch) == rows:
            return of_rows(whole)
        chunks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), whole)
        return jnp.mean(jax.lax.map(jax.checkpoint(of_rows), chunks))

    return loss


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean; labels are one-hot, never in memory: its gradient needs no scatter."""
    labels = jax.nn.one_hot(labels, logits.shape[-1])
    return jnp.mean(optax.losses.softmax_cross_entropy(logits, labels))


def window_draw(batch_size: int, seq_len: int) -> Callable[..., jax.Array]:
    """(tokens, key) -> `[batch_size, seq_len + 1]` tokens from anywhere, int32."""

    def draw(tokens, key):
        starts = jax.random.randint(key, (batch_size, 1), 0, tokens.size - seq_len)
        return tokens[starts + jnp.arange(seq_len + 1)].astype(jnp.int32)

    return draw


def windows(tokens: np.ndarray, seq_len: int, *, multiple: int) -> np.ndarray:
    """`[n, seq_len + 1]`: one after another, each token a label once; a whole multiple.

    Raises:
      ValueError: if there are too few tokens.
    """
    num = (tokens.size - 1) // seq_len // multiple * multiple
    if not num:
        raise ValueError(
            f"tokens to judge on must fill {multiple} windows of {seq_len} + 1; got "
            f"{tokens.size}. Give more of them."
        )
    index = np.arange(num)[:, None] * seq_len + np.arange(seq_len + 1)
    return tokens[index].astype(np.int32)
