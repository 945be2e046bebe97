"""Spark FFN: a slice of the input decides which neurons are needed at all."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from sparsejax import activations, ops
from sparsejax._ints import check_int
from sparsejax.nn._gated_ffn import apply_down
from sparsejax.nn._linear import check_input, linear


class SparkFFN(nnx.Module):
    """`down(gelu(statistical_topk(gate(x[:split]))) * up(x[split:]))`, no biases.

    The gate sees the first `split` inputs and `up` the others, so the gate is a cheap
    predictor: where it is 0, the neuron's columns of `up` and rows of `down` are not
    needed. In training all of them are computed; `sj.decode` reads only the active.

    With `split=d_model / 2` the weights are as many as those of a `GatedFFN` with two
    thirds of `d_ff`. `split=None` is the form of Gemma 3n: gate and up both see all of
    the input.

    Args:
      d_model: width of input and output.
      d_ff: number of neurons.
      k: expected number of active neurons of a token, see `sj.statistical_topk`: at
        least 1; `d_ff` and above keeps all (and the gate is not shifted).
      split: inputs that the gate sees, in `[1, d_model - 1]`, or None.
      activation: of the gate, elementwise, 0 at 0; GELU in its tanh form, as in Gemma.
      implementation: of `sj.statistical_topk` and `sj.statistical_glu`.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      TypeError: If `k` is not a number, or `split` not an int.
      ValueError: If `k` or `split` is out of its range.

    Example:
      >>> from flax import nnx
      >>> ffn = sj.nn.SparkFFN(64, 512, k=41, split=32, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1000, 64))
      >>> y, density = ffn(x, with_density=True)
      >>> print(f"{density.mean():.2f}")
      0.08

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3. The width of the
      initialization is not stated there: each kernel is LeCun normal in its own fan-in.
      `split=None`: Gemma 3n, transformers `Gemma3nTextMLP`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        k: float,
        split: int | None,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.k = activations.check_k(k)
        self.split = None if split is None else check_int("split", split)
        if split is not None and not 0 < split < d_model:
            raise ValueError(
                "`split` must be in [1, d_model - 1], or None for a gate that sees all "
                f"of the input; got split={split} and d_model={d_model}."
            )
        make = functools.partial(
            linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.d_model = d_model
        self.activation = activation
        self.implementation: ops.Implementation | None = implementation
        self.gate = make(split or d_model, d_ff)
        self.up = make(d_model - (split or 0), d_ff)
        self.down = make(d_ff, d_model)

    def parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the gate and what `up` sees of the input."""
        check_input(self, x, axes="[*batch, d_model]")
        return x[..., : self.split], x[..., self.split or 0 :]

    def gate_values(
        self, x: Float[Array, "*batch d_model"], *, k: ArrayLike | None = None
    ) -> Float[Array, "*batch d_ff"]:
        """Computes the activated gate; a neuron is active where it is not 0."""
        kept = activations.statistical_topk(
            self.gate(self.parts(x)[0]),
            self.k if k is None else k,
            implementation=self.implementation,
        )
        return self.activation(kept)

    def gate_scores(
        self, x: Float[Array, "*batch d_model"], *, k: ArrayLike | None = None
    ) -> tuple[Float[Array, "*batch d_ff"], Float[Array, "*batch 1"]]:
        """Computes what `gate_values` is made of, for `sj.ops.gated_ffn` to make it.

        Args:
          x: activations, any leading axes.
          k: instead of the layer's own.

        Returns:
          scores and their threshold: the gate is `activation(max(scores - threshold,
          0))`, or `activation(scores)` where the threshold is -inf.
        """
        scores = self.gate(self.parts(x)[0])
        threshold = activations.statistical_threshold(
            scores, self.k if k is None else k
        )
        return scores, threshold

    def hidden(
        self, x: Float[Array, "*batch d_model"], *, k: ArrayLike | None = None
    ) -> Float[Array, "*batch d_ff"]:
        """Computes the activations of the neurons, the input of `down`."""
        first, second = self.parts(x)
        return activations.statistical_glu(
            self.gate(first),
            self.up(second),
            self.k if k is None else k,
            activation=self.activation,
            implementation=self.implementation,
        )

    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        *,
        k: ArrayLike | None = None,
        with_density: bool = False,
    ) -> Any:
        """Applies the layer.

        Args:
          x: activations, any leading axes.
          k: instead of the layer's own; may be traced, so that layers of different `k`
            can share one `nnx.scan`.
          with_density: return `(y, density)`.

        Returns:
          y `[*batch, d_model]`; density float32 `[*batch]`, for each token the share of
          neurons whose activation is not 0.
        """
        return apply_down(self.down, self.hidden(x, k=k), with_density)
