"""`active_ffn`: checks, then the reference, the loop or the kernel."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops.active_ffn import _checks, _reference, _xla


def active_ffn(
    x: Float[Array, "batch d_in"],
    gate: Float[Array, "batch capacity"],
    indices: Int[Array, " capacity"],
    num_active: ArrayLike,
    up: Float[Array, "d_ff d_in"],
    down: Float[Array, "d_ff d_model"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "batch d_model"]:
    """The up and the down projection of a gated FFN, for its active neurons alone.

    With j over the first `num_active` entries of `indices`,
    `y[b] = sum_j gate[b, j] * dot(up[indices[j]], x[b]) * down[indices[j]]`. A decode
    step is bound by reading weights, and this reads the rows of active neurons only.
    It is made for a batch of 1 to 8: the union of active neurons grows with the batch.
    Sums are float32. For inference: it has no gradient.

    Args:
      x: what the up projection sees, a slice or all of the input of the FFN.
      gate: activated gate values at `indices`; 0 where a row of the batch does not use
        the neuron. Values beyond `num_active` are not used.
      indices: int32, active neurons in `[0, d_ff)`, each once: the union over the
        batch, as from `active_indices`. Entries beyond `num_active` add exactly 0.
      num_active: int32, how many entries of `indices` count, in `[0, capacity]`. A
        traced value outside is clipped.
      up: up projection, a row for each neuron.
      down: down projection, a row for each neuron.
      implementation: "reference" (gathers), "xla" (a loop over rows, the fast form on a
        CPU), "mosaic_gpu" (one fused kernel for Hopper), or None for the fastest.

    Returns:
      Of `x.dtype`.

    Raises:
      TypeError: if an operand is not of the kind above.
      ValueError: if shapes disagree, a concrete `num_active` lies outside its range, or
        the implementation is unknown.
      NotImplementedError: if the named implementation cannot take these operands; or
        when differentiated. Train with the masked dense products.

    Example:
      >>> x, up, down = jnp.ones((1, 2)), jnp.ones((4, 2)), jnp.eye(4, 3)
      >>> gate = jnp.array([[0.0, 1.0, 0.0, 0.5]])
      >>> indices, num_active, _ = sj.ops.active_indices(gate[0] != 0, capacity=3)
      >>> print(active_ffn(x, gate[:, indices], indices, num_active, up, down))
      [[0. 2. 0.]]

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644: the decode kernels, a
      vector-masked and a sparse-vector product. Here one pass does both, over a list
      of neurons instead of a mask.
    """
    x, gate, indices, up, down = map(jnp.asarray, (x, gate, indices, up, down))
    _check(x, gate, indices, num_active, up, down)
    num_active = jnp.asarray(num_active, jnp.int32)
    operands = (x, gate, indices.astype(jnp.int32), num_active, up, down)
    return _run(implementation, *operands)


@_checks.for_inference("active_ffn")
def _run(implementation, *operands):
    return dispatch(
        operands,
        implementation,
        reference=_plain if implementation is None else _reference.active_ffn,
        others={"xla": _xla.active_ffn},
        kernels={"mosaic_gpu": _gpu},
    )


def _gpu() -> Kernel:
    from sparsejax.ops.active_ffn import _mosaic_gpu

    return Kernel(_mosaic_gpu.active_ffn, _mosaic_gpu.unsupported_reason)


def _plain(*operands):
    """The fastest form without a kernel."""
    if operands[0].shape[0] > _xla.MAX_BATCH:
        return _reference.active_ffn(*operands)
    return jax.lax.platform_dependent(
        *operands, cpu=_xla.active_ffn, default=_reference.active_ffn
    )


def _check(x, gate, indices, num_active, up, down) -> None:
    ffn = {"x": (x, 2), "gate": (gate, 2), "up": (up, 2), "down": (down, 2)}
    _checks.check_arrays(**ffn)
    _checks.check_arrays(jnp.integer, indices=(indices, 1))
    _checks.check_ffn(x, gate, up, down)
    _checks.check_equal("gate", gate, 1, "indices", indices, 0, "capacity")
    if jnp.ndim(num_active) or not jnp.issubdtype(
        jnp.result_type(num_active), jnp.integer
    ):
        raise TypeError(
            "`num_active` must be one integer, for the whole batch; got "
            f"{jax.typeof(num_active)}."
        )
    if not isinstance(num_active, Tracer) and not 0 <= int(num_active) <= indices.size:
        raise ValueError(
            f"`num_active` must be in [0, {indices.size}], the length of `indices`; "
            f"got {num_active}."
        )
