"""A decoder in training on random tokens: what the benchmarks of a step have in common.

Forward, backward and update in one program that donates its state.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks.parts import scanned_decoder, timing
from sparsejax import models

_COMPILING = 6  # programs at a time, as each is tuned in memory of its own


class Training:
    """Takes a step at each call and gives its loss; compiled from shapes alone.

    `start` makes the state and `stop` frees it. `weights` says which weights the loss
    uses, from the optimizer's state and the params; `prepare` may write into the model,
    from that state, before it is used.
    """

    def __init__(
        self,
        config: models.DecoderConfig,
        tokens: jax.Array,
        tx: optax.GradientTransformation,
        *,
        weights: Callable[[Any, Any], Any] = lambda opt_state, params: params,
        prepare: Callable[[nnx.Module, Any], None] = lambda model, opt_state: None,
    ):
        def make():
            return models.Decoder(config, rngs=nnx.Rngs(0))

        def split(model):
            return nnx.split(model, nnx.Param, ...)

        graph, params, rest = split(nnx.eval_shape(make))

        def loss_fn(params, opt_state, rest):
            model = nnx.merge(graph, weights(opt_state, params), rest, copy=True)
            prepare(model, opt_state)
            return scanned_decoder.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

        def step(state, rest):
            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(params, opt_state, rest)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        def first():
            _, params, rest = split(make())
            return (params, tx.init(params)), rest

        self.graph = graph
        self.num_params = sum(x.size for x in jax.tree.leaves(params))
        self.state: Any = None
        self.rest: Any = None
        self._first = timing.compile_alone(jax.jit(first).lower())
        state = params, jax.eval_shape(tx.init, params)
        lowered = jax.jit(step, donate_argnums=0).lower(state, rest)
        self._step = timing.compile_alone(lowered)

    def start(self) -> None:
        self.state, self.rest = self._first()

    def stop(self) -> None:
        self.state = self.rest = None

    @property
    def memory_gb(self) -> float:
        """Of the weights, the optimizer's state and what a step needs besides."""
        found = self._step.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return (held - found.alias_size_in_bytes + found.temp_size_in_bytes) / 1e9

    def __call__(self) -> jax.Array:
        self.state, loss = self._step(self.state, self.rest)
        return loss


def compiled(make: Callable[[Any], Any], cases: Iterable[Any]) -> list[Any]:
    """`make(case)` for each, some at a time, as compiling is most of the time."""
    return timing.side_by_side(make, cases, threads=_COMPILING)


def random_tokens(batch: int, seq: int, vocab_size: int) -> jax.Array:
    """Inputs and labels of a step, `[batch, seq + 1]`."""
    return jax.random.randint(jax.random.key(0), (batch, seq + 1), 0, vocab_size)
