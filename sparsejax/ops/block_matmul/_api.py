"""`block_matmul`: checks, then the reference or a kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax.formats import BlockMask, BlockSparse
from sparsejax.ops._activations import Activation
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops.block_matmul import _reference


def block_matmul(
    x: Float[Array, "*batch d_in"],
    w: Float[Array, "d_in d_out"] | BlockSparse,
    block_mask: BlockMask | None = None,
    *,
    bias: Float[Array, " d_out"] | None = None,
    activation: Activation | None = None,
    full_dw: ArrayLike = False,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    """`activation(x @ where(mask, w, 0) + bias)`, skipping blocks that are not kept.

    No block outside of the mask is read, forward or backward, and none of `w` is moved
    or transposed. The gradient of `w` is computed at kept blocks and 0 elsewhere. Sums
    are float32. The mask is an operand: another topology needs no new trace.

    What no kept block meets, in `x` or in the gradient of the result, is not read
    either, unless `full_dw`, and may be NaN. What some blocks meet must be finite: the
    reference multiplies it by zeros for the others, which a kernel skips.

    Several devices: XLA cannot cut a kernel, so on sharded arrays under a plain `jit`
    None takes the reference and a named kernel does not lower ("Mosaic kernels cannot
    be automatically partitioned"). Call it inside of `jax.shard_map` over all axes of
    the mesh, and build the mask there from the device's own blocks. Where d_in is
    sharded, `psum` the result, and bias and activation come after the sum:

        def local(x, w, kept):  # x P("data", "k"), w and kept P("k", "n")
            y = block_matmul(x, w, BlockMask.from_blocks(kept, block_shape))
            return jax.lax.psum(y, "k")  # P("data", "n")

    Args:
      x: any leading axes; bfloat16, float16 or float32. Sums of float64 are float32.
      w: `[d_in, d_out]` of the dtype of `x`, or the kept blocks alone.
      block_mask: which blocks of `w` are kept, without leading axes; None if `w` is
        `BlockSparse` and has its own. A mask that overflowed is used as it is.
      bias: added in float32.
      activation: elementwise and jittable, applied to the float32 sums, for example
        `jax.nn.silu`; it may close over arrays, and they get their gradients. A kernel
        fuses it where no gradient is taken, if it closes over none and has none but
        operations of kernels, see `sj.ops.Activation`. Else the sums are written,
        4 bytes for each entry of the result, and XLA applies it; for the backward they
        are held. A kernel multiplies their gradient in `x.dtype`: in float16 it must
        not exceed 65504, as a loss scale may make it.
      full_dw: the gradient of `w` is dense, as a growth step by gradient needs it. May
        be traced, for example `sj.is_mask_update(opt_state)`: the dense product is then
        computed on these steps only.
      implementation: "reference" (dense product), "pallas_tpu", "mosaic_gpu" (Hopper),
        or None for the fastest that serves. The kernel for TPU rounds float32 operands
        to bfloat16 unless `jax.default_matmul_precision` asks for more; whatever more
        that is, it does not round them then.

    Returns:
      Of `x.dtype`; 0 (or what bias and activation make of it) at a block column without
      kept blocks. A kernel is differentiable in reverse mode, once; the reference as
      often as its activation is.

    Raises:
      TypeError: if `x` and `w` are not floating and of one dtype, or the mask is no
        `BlockMask`.
      ValueError: if shapes disagree, or the implementation is unknown.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> mask = sj.BlockMask.from_blocks(jnp.array([[True], [False]]), (2, 3))
      >>> w = jnp.ones((4, 3)).at[2:].set(jnp.nan)  # never read
      >>> print(block_matmul(jnp.ones((1, 4)), w, mask))
      [[2. 2. 2.]]
      >>> dw = jax.grad(lambda w: block_matmul(jnp.ones((1, 4)), w, mask).sum())(w)
      >>> print(dw[:, 0])
      [1. 1. 0. 0.]

    References:
      Gale et al., 2022, https://arxiv.org/abs/2211.15841, section 5: transposed lists,
      so that the data never moves. There the block lists change on the host, here
      inside jit.
    """
    x = jnp.asarray(x)
    if isinstance(w, BlockSparse):
        if block_mask is not None:
            raise ValueError("`block_mask` must be None: a `BlockSparse` has its own.")
        w, block_mask = w.values, w.mask
    elif block_mask is None:
        raise ValueError("`block_mask` must be given with a dense `w`.")
    w = jnp.asarray(w)
    _check(x, w, block_mask, bias, full_dw)
    batch, d_in = x.shape[:-1], x.shape[-1]
    operands = [x.reshape(math.prod(batch), d_in), w, block_mask, bias]
    settings: dict[str, Any] = {"activation": activation}
    if isinstance(full_dw, bool):  # known, so the other gradient is not compiled
        settings["full_dw"] = full_dw
    else:
        operands.append(jnp.asarray(full_dw))
    y = dispatch(
        operands,
        implementation,
        reference=functools.partial(_reference.block_matmul, **settings),
        kernels={
            "pallas_tpu": functools.partial(_tpu, settings),
            "mosaic_gpu": functools.partial(_gpu, settings),
        },
    )
    return y.reshape(*batch, y.shape[-1])


def _tpu(settings: dict[str, Any]) -> Kernel:
    from sparsejax.ops.block_matmul import _pallas_tpu

    return _kernel(_pallas_tpu, settings)


def _gpu(settings: dict[str, Any]) -> Kernel:
    from sparsejax.ops.block_matmul import _mosaic_gpu

    return _kernel(_mosaic_gpu, settings)


def _kernel(module: Any, settings: dict[str, Any]) -> Kernel:
    run = functools.partial(module.block_matmul, **settings)
    return Kernel(run, module.unsupported_reason)


def _check(x, w, block_mask, bias, full_dw) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"`block_mask` must be a BlockMask; got {type(block_mask).__name__}. Build "
            "one by `sj.BlockMask.from_dense`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != w.dtype:
        raise TypeError(
            "`x` and `w` must be floating and of one dtype; got x "
            f"{jax.typeof(x)} and w {jax.typeof(w)}. Cast one."
        )
    if len(block_mask.shape) != 2:
        raise ValueError(
            "`block_mask` must have no leading axes; got one of shape "
            f"{block_mask.shape}. Call once for each matrix."
        )
    d_in, d_out = block_mask.shape
    if w.ndim == 3:
        if w.shape[1:] != block_mask.block_shape:
            raise ValueError(
                f"the values of `w` must be blocks of {block_mask.block_shape}, as its "
                f"mask says; got shape {w.shape}."
            )
        if full_dw is not False:
            raise ValueError(
                "`full_dw` must be False for a `BlockSparse`, which stores no other "
                "blocks. Hold a dense `w` while blocks are grown by gradient."
            )
    elif w.shape != (d_in, d_out):
        raise ValueError(
            f"`w` must have the shape of its mask; got w {w.shape} and a mask of "
            f"{block_mask.shape}, blocks of {block_mask.block_shape}."
        )
    if not x.ndim or x.shape[-1] != d_in:
        raise ValueError(
            f"`x` and `w` must agree on d_in; got x {jax.typeof(x)} and d_in={d_in}."
        )
    if bias is not None and jnp.shape(bias) != (d_out,):
        raise ValueError(
            f"`bias` must have shape ({d_out},), as d_out; got {jnp.shape(bias)}."
        )
    if jnp.ndim(full_dw) or jnp.result_type(full_dw) != jnp.bool_:
        raise TypeError(f"`full_dw` must be one bool; got {full_dw!r}.")
