"""`gated_ffn`: checks, then the dense products or the kernel."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops import _platform
from sparsejax.ops._activations import Activation
from sparsejax.ops._platform import Implementation
from sparsejax.ops.active_ffn import _checks
from sparsejax.ops.active_ffn._values import gate_values


def gated_ffn(
    x: Float[Array, "batch d_in"],
    gate: Float[Array, "batch d_ff"],
    up: Float[Array, "d_ff d_in"],
    down: Float[Array, "d_ff d_model"],
    *,
    threshold: Float[Array, "batch 1"] | None = None,
    activation: Activation | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch d_model"]:
    """The up and the down projection of a gated FFN whose gate is mostly 0.

    `y[b] = sum_j gate[b, j] * dot(up[j], x[b]) * down[j]` over the neurons j whose gate
    is not 0 for some row of the batch. It is `active_ffn` without a list: the kernel
    for Hopper finds the neurons itself and reads their rows alone, so that there is
    nothing to list and no capacity to exceed. It cuts the neurons into some hundred
    ranges of equal length, and takes as long as the one with most active neurons: their
    order should have no meaning, as training leaves it. The reference is the dense
    products; on devices without the kernel `active_ffn` reads less. Sums are float32.
    For inference: it has no gradient.

    Gate values may be left to it. With a threshold they are
    `activation(max(gate - threshold, 0))`, both steps in float32 and rounded to
    `gate.dtype`: with that of `sj.statistical_threshold` the gate of a Spark FFN. With
    an activation alone they are `activation(gate)`.

    Args:
      x: what the up projection sees, a slice or all of the input of the FFN.
      gate: activated gate values; or scores, see above. A NaN is not 0.
      up: up projection, a row for each neuron.
      down: down projection, a row for each neuron. Rows of neurons that are not used
        add exactly 0, whatever they hold.
      threshold: one for each row of the batch, cast to `gate.dtype`; a row with -inf
        exceeds it unchanged, as in `sj.statistical_topk`. None for no threshold.
      activation: elementwise; None for none. Which ones the kernel takes is in
        `sj.ops.Activation`.
      implementation: "reference", "mosaic_gpu" (one fused kernel for Hopper, batches of
        at most 16), or None for the fastest.

    Returns:
      Of `x.dtype`.

    Raises:
      TypeError: if an operand is not floating.
      ValueError: if shapes disagree, or the implementation is unknown.
      NotImplementedError: if the named implementation cannot take these operands; or
        when differentiated. Train with the masked dense products.

    Example:
      >>> x, up, down = jnp.ones((1, 2)), jnp.ones((4, 2)), jnp.eye(4, 3)
      >>> print(gated_ffn(x, jnp.array([[0.0, 1.0, 0.0, 0.5]]), up, down))
      [[0. 2. 0.]]
      >>> scores, at = jnp.array([[1.0, 4.0, 3.0, 1.0]]), jnp.array([[3.0]])
      >>> print(gated_ffn(x, scores, up, down, threshold=at, activation=jnp.square))
      [[0. 2. 0.]]

    References:
      As `active_ffn`.
    """
    x, gate, up, down = map(jnp.asarray, (x, gate, up, down))
    _checks.check_arrays(x=(x, 2), gate=(gate, 2), up=(up, 2), down=(down, 2))
    _checks.check_ffn(x, gate, up, down)
    _checks.check_equal("gate", gate, 1, "up", up, 0, "d_ff")
    if threshold is not None:
        threshold = jnp.asarray(threshold)
        _checks.check_threshold(threshold, gate)
        threshold = threshold.astype(gate.dtype)
    return _run((implementation, activation), x, gate, up, down, threshold)


def has_gated_ffn_kernel(
    x: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation | None = None,
) -> bool:
    """Whether `gated_ffn` runs a kernel on the visible devices, by its default.

    Args:
      x: `[batch, d_in]`; of all operands shapes and dtypes are read.
      up: `[d_ff, d_in]`.
      down: `[d_ff, d_model]`.
      activation: of the gate, if the kernel is to apply it.

    Returns:
      For a gate of the dtype of `x`, as in `gated_ffn`: True if None takes the kernel.

    Example:
      >>> has_gated_ffn_kernel(jnp.ones((1, 8)), jnp.ones((9, 8)), jnp.ones((9, 8)))
      False
    """
    if "mosaic_gpu" not in _platform.visible_kernels():
        return False
    gate = jax.ShapeDtypeStruct((x.shape[0], up.shape[0]), x.dtype)
    kernel = _kernel(activation)
    return kernel.unsupported_reason(x, gate, up, down) is None


@_checks.for_inference("gated_ffn")
def _run(static, *operands):
    implementation, activation = static
    return _platform.dispatch(
        operands,
        implementation,
        reference=functools.partial(_reference, activation=activation),
        kernels={"mosaic_gpu": functools.partial(_kernel, activation)},
    )


def _kernel(activation) -> _platform.Kernel:
    from sparsejax.ops.active_ffn import _mosaic_gpu  # loads pallas

    return _platform.Kernel(
        functools.partial(_mosaic_gpu.gated_ffn, activation=activation),
        functools.partial(_mosaic_gpu.gated_unsupported_reason, activation=activation),
    )


def _reference(x, gate, up, down, threshold=None, *, activation=None):
    """The dense products, with the rows of unused neurons replaced by 0."""
    gate = gate_values(gate, threshold, activation)
    used = jnp.any(gate != 0, axis=0)[:, None]
    product = functools.partial(
        jnp.einsum, precision="highest", preferred_element_type=jnp.float32
    )
    hidden = product("bi,fi->bf", x, jnp.where(used, up, 0))
    hidden *= gate.astype(jnp.float32)
    down = jnp.where(used, down, 0).astype(jnp.float32)
    return product("bf,fm->bm", hidden, down).astype(x.dtype)
