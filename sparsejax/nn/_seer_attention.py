"""SeerAttention: a gate beside each attention layer selects its blocks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsejax import attention, ops
from sparsejax._ints import check_int
from sparsejax.formats import BlockMask
from sparsejax.nn._attention import Attention, filled
from sparsejax.nn._block_attention import attend_to_blocks


class GateParam(nnx.Param):
    """A weight of a gate; a filter of its own sets it apart from the model's."""


class GateLoss(nnx.Variable):
    """What a call with `distill` leaves in a layer, for `pop_gate_losses`."""


class SeerAttention(Attention):
    """Causal attention to the blocks of keys that a learned gate selects.

    The kernels are those of `Attention`, drawn likewise, and so is the result without
    `select`; the gate adds `gate_key` and, where `d_gate` is not `head_dim`,
    `gate_query`. With `distill` a call also computes how far the gate is from the
    layer's own attention, over all blocks, for `pop_gate_losses`. That loss reaches the
    gate alone, and the gate gets no other gradient: the selection has none.

    - A gate for a frozen model: `distill=True` and no `select`; load the model's
      kernels, differentiate `GateParam` alone.
    - From scratch: `distill=True` and `select`; add the gate's losses to the model's.
    - In use: `select` alone.

    `select` and `distill` are attributes and may be set later. Decoding by `sj.decode`
    attends to all tokens; the gate for it is `sj.attention.seer_decode_scores`, and
    `sj.decode.Seer` selects by it.

    Args:
      d_model: width of input and output.
      num_heads: query heads.
      block: tokens of a block; a sequence has at least so many.
      select: called as `select(scores, block=block)`, and with `lengths=` where
        sequences are filled up: `sj.attention.seer_topk` or `seer_threshold` with the
        budget bound. None attends to all blocks.
      distill: see above.
      d_gate: width of what the gate compares; even. `head_dim` by default; that of the
        paper is 128, for heads of 128.
      num_kv_heads: key and value heads; divides `num_heads`. All of them by default.
      head_dim: width of a head; even. `d_model / num_heads` by default.
      rope_base: see `apply_rope`; the gate turns its own width by it.
      implementation: of `sj.ops.block_attention`, by which `select` attends.
      dtype: of the computation; the gate's is float32.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      ValueError: As `Attention`, or if `block` or `d_gate` is out of range.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> select = functools.partial(
      ...     sj.attention.seer_topk, num_kept=2, dense_last_rows=0
      ... )
      >>> layer = SeerAttention(32, 2, block=16, select=select, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
      >>> y, density = layer(x, jnp.arange(64)[None], with_density=True)
      >>> print(density[0, 31], density[0, 63])
      1.0 0.5

    References:
      Gao et al., 2024, https://arxiv.org/abs/2410.13276. There training from scratch is
      not shown; a model that is fine-tuned with its gate is.
    """

    decodes = True  # to all tokens

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        block: int,
        select: Callable[..., BlockMask] | None = None,
        distill: bool = False,
        d_gate: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10_000.0,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_int("block", block, least=1)
        super().__init__(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.block = block
        self.select = select
        self.implementation: ops.Implementation | None = implementation
        self.distill = distill
        gate = attention.init_seer_gate(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            d_gate=self.head_dim if d_gate is None else d_gate,
            key=rngs.params(),
        )
        self.gate_key = GateParam(gate.key.astype(param_dtype))
        self.gate_query = (
            None if gate.query is None else GateParam(gate.query.astype(param_dtype))
        )

    def gate(self) -> attention.SeerGate:
        """Gives the gate's weights as the pure functions take them."""
        query = self.gate_query
        return attention.SeerGate(
            None if query is None else query[...], self.gate_key[...]
        )

    def scores(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch heads blocks blocks"]:
        """Scores blocks by the gate, see `sj.attention.seer_scores`."""
        return attention.seer_scores(
            self.gate(),
            *self.unrotated(x)[:2],
            block=self.block,
            rotate=self.rotate,
            positions=positions,
            lengths=lengths,
        )

    def mix(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `Attention`, to the selected blocks.

        What comes after `lengths` has no part in the scores, nor in the loss of a gate
        that learns, for which blocks of queries count that are whole.

        Raises:
          ValueError: If the gate is needed and `x` is shorter than a block.
        """
        query, key, value = self.project(x, positions)
        if self.distill or self.select is not None:
            scores = self.scores(x, positions, lengths=lengths)
            if self.distill:
                target = attention.seer_target(query, key, block=self.block)
                num_rows = None if lengths is None else lengths // self.block
                loss = attention.seer_loss(scores, target, num_rows=num_rows)
                self.gate_loss = GateLoss(loss)
            if self.select is not None:
                mask = self.select(scores, block=self.block, **filled(lengths))
                return attend_to_blocks(
                    query, key, value, mask, implementation=self.implementation
                )
        return self.attend(query, key, value, **filled(lengths))


def pop_gate_losses(model: nnx.Module) -> Float[Array, " layers"]:
    """Takes from a model the gate losses that its last call left in its layers.

    Call it in the function that is differentiated, after the model.

    Args:
      model: with `SeerAttention` layers that `distill`.

    Returns:
      float32, for each such layer `sj.attention.seer_loss` by rows, in nats. The
      paper's loss is the sum of 10 times the mean over all blocks: this sum times 10
      over the number of blocks of the keys, which matters where other losses are beside
      it or gradients are clipped together.

    Raises:
      ValueError: if no layer left one.

    Example:
      >>> from flax import nnx
      >>> layer = SeerAttention(32, 2, block=16, distill=True, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
      >>> y = layer(x, jnp.arange(64)[None])
      >>> pop_gate_losses(layer).shape
      (1,)
    """
    losses = jax.tree.leaves(nnx.pop(model, GateLoss))
    if not losses:
        raise ValueError(
            "no layer of `model` left a gate loss; set `distill` of its SeerAttention "
            "layers and call the model first."
        )
    return jnp.concatenate([jnp.ravel(loss) for loss in losses])  # scanned layers too
