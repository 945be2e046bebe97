"""Causal grouped-query attention with rotary positions."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax._ints import check_int
from sparsejax.nn._linear import check_input, is_plain_linear, linear
from sparsejax.nn._rope import apply_rope


class Attention(nnx.Module):
    """Causal attention in which `num_heads / num_kv_heads` queries share a key head.

    Four kernels `[d_in, d_out]` without bias: `query`, `key`, `value`, `out`; after
    `join`, two: `joined` and `out`. Softmax is taken in float32.

    `sj.decode` calls `unrotated`, `rotate`, `attend` and `combine` alone. Of a subclass
    that overrides `__call__`, `project` or `mix`, `decodes` is therefore False, unless
    the class says that the others give the same: `decodes = True`. One that attends to
    some of the valid keys only says so too: `selects_keys = True`.

    Args:
      d_model: width of input and output.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`. All of them by default.
      head_dim: width of a head; even. `d_model / num_heads` by default, which must then
        be whole.
      window: see only the last `window` tokens, oneself included; all by default.
      rope_base: see `apply_rope`.
      implementation: of attention within a sequence, as in
        `jax.nn.dot_product_attention`: "cudnn" keeps no scores in memory, and takes 16
        bit types on an NVIDIA GPU alone; "xla"; None is JAX's choice.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      ValueError: If `num_kv_heads` does not divide `num_heads`, `head_dim` is odd or no
        whole number, or a number is below 1.

    Example:
      >>> from flax import nnx
      >>> attention = sj.nn.Attention(64, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
      >>> attention(jnp.ones((2, 5, 64)), positions).shape
      (2, 5, 64)
    """

    decodes: ClassVar[bool] = True
    selects_keys: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "decodes" not in vars(cls):
            base = next(base for base in cls.__bases__ if issubclass(base, Attention))
            cls.decodes = base.decodes and all(
                getattr(cls, name) is getattr(base, name)
                for name in ("__call__", "project", "mix")
            )

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float = 10_000.0,
        implementation: Literal["xla", "cudnn"] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, self.num_kv_heads) < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                "`num_kv_heads` must divide `num_heads`, both at least 1; got "
                f"num_kv_heads={num_kv_heads} and num_heads={num_heads}."
            )
        if head_dim is None and d_model % num_heads:
            raise ValueError(
                "`num_heads` must divide `d_model` where no `head_dim` is given; got "
                f"num_heads={num_heads} and d_model={d_model}."
            )
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                "`head_dim` must be even, for rotary pairs, and at least 2; got "
                f"{self.head_dim}, with d_model={d_model} and num_heads={num_heads}."
            )
        self.window = None if window is None else check_int("window", window, least=1)
        self.rope_base = rope_base
        # not `implementation`: layers that inherit have another, of their own operation
        self.dense_implementation: Literal["xla", "cudnn"] | None = implementation
        make = functools.partial(
            linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query = make(d_model, self.num_heads * self.head_dim)
        self.key = make(d_model, self.num_kv_heads * self.head_dim)
        self.value = make(d_model, self.num_kv_heads * self.head_dim)
        self.is_joined = False
        self.out = make(self.num_heads * self.head_dim, d_model)

    def join(self) -> None:
        """Puts the kernels of queries, keys and values side by side, for one product.

        For inference: a step of decoding is bound by reading weights, and XLA reads a
        narrow kernel at a fifth of the rate of a wide one. Layers that were replaced by
        others stay apart, and so do those that a subclass uses in its own way.
        """
        if self.is_joined or type(self).unrotated is not Attention.unrotated:
            return
        layers = (self.query, self.key, self.value)
        if not all(is_plain_linear(layer) for layer in layers):
            return
        self.is_joined = True
        kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
        self.joined = self.query
        self.joined.kernel = nnx.Param(kernel)
        self.joined.out_features = kernel.shape[1]
        del self.query, self.key, self.value

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Gives queries or keys `[batch, seq, heads, head_dim]` their positions."""
        return apply_rope(x, positions, base=self.rope_base)

    def unrotated(
        self, x: Float[Array, "batch seq d_model"]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes queries, keys and values: `[batch, seq, heads, head_dim]` each."""
        check_input(self, x, axes="[batch, seq, d_model]")
        if not self.is_joined:
            parts = self.query(x), self.key(x), self.value(x)
            query, key, value = map(self._heads, parts)
        else:
            ends = self.num_heads, self.num_heads + self.num_kv_heads
            joined = self._heads(self.joined(x))
            query, key, value = jnp.split(joined, ends, axis=-2)
        return query, key, value

    def _heads(self, y: jax.Array) -> jax.Array:
        heads = y.shape[-1] // self.head_dim
        return y.reshape(*y.shape[:-1], heads, self.head_dim)

    def project(
        self, x: Float[Array, "batch seq d_model"], positions: Int[Array, "batch seq"]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes rotated queries and keys, and values: `[batch, seq, heads, dim]`."""
        query, key, value = self.unrotated(x)
        return self.rotate(query, positions), self.rotate(key, positions), value

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        valid: Bool[Array, "#batch 1 queries keys"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Attends to the keys that are valid; causal within the sequence by default.

        Args:
          query: rotated.
          key: rotated.
          value: as the keys.
          valid: which keys each query sees; None for those up to its own.
          lengths: tokens of each sequence; what comes after them only fills it up, and
            its outputs are not used. Here causality keeps it from the others; a layer
            that selects for several tokens at once leaves it out. All by default.

        Returns:
          The outputs `[batch, queries, heads, head_dim]`, and the share of the valid
          keys that were attended, a mean over heads, float32 `[batch, queries]`: 1.
        """
        del lengths
        window = None
        if valid is None and self.window is not None:
            window = (self.window - 1, 0)
        implementation = self.dense_implementation if valid is None else None

        def attended(query, key, value, valid):
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=valid,
                is_causal=valid is None,
                local_window_size=window,
                implementation=implementation,
            )

        if query.dtype == jnp.float16 and implementation != "cudnn":
            attended = functools.partial(_attended_in_float16, attended)
        y = attended(query, key, value, valid)
        return y, jnp.ones(query.shape[:2])

    def mix(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Attends within the sequence; `lengths` and what it returns as `attend`."""
        return self.attend(*self.project(x, positions), **filled(lengths))

    def combine(
        self, y: Float[Array, "batch seq heads head_dim"]
    ) -> Float[Array, "batch seq d_model"]:
        """Projects what the heads give, side by side, back to the model's width."""
        *lead, heads, head_dim = y.shape
        return self.out(y.reshape(*lead, heads * head_dim))

    @overload
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        with_density: Literal[False] = False,
        **options: Any,
    ) -> Float[Array, "batch seq d_model"]: ...

    @overload
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        with_density: Literal[True],
        **options: Any,
    ) -> tuple[Float[Array, "batch seq d_model"], Float[Array, "batch seq"]]: ...

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        with_density: bool = False,
        **options: Any,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
          x: activations; a token sees itself and those before it.
          positions: of each token, for the rotation.
          lengths: see `attend`.
          with_density: return `(y, density)`.
          **options: for `mix`, where a subclass takes more.

        Returns:
          y `[batch, seq, d_model]`; density float32 `[batch, seq]`, the share of the
          tokens in sight that was attended, a mean over heads.
        """
        y, density = self.mix(x, positions, **filled(lengths), **options)
        y = self.combine(y)
        return (y, density) if with_density else y


def _attended_in_float16(
    attended: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """On a CPU in float32: there JAX refuses products that are wider than their terms.

    It does so in `jax.jit` alone, of what its own attention asks for.
    """

    def widened(query, key, value, valid):
        wide = (x.astype(jnp.float32) for x in (query, key, value))
        return attended(*wide, valid).astype(query.dtype)

    return jax.lax.platform_dependent(
        query, key, value, valid, cpu=widened, default=attended
    )


def filled(lengths: jax.Array | None) -> dict[str, jax.Array]:
    """The argument `lengths`, or none: what a user wrote need not take it then."""
    return {} if lengths is None else {"lengths": lengths}
