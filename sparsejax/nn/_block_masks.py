"""The way from the optimizer's masks to the layers that skip blocks."""

import collections
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from sparsejax._blocks import kept_blocks
from sparsejax._governed import GovernedLeaf, governed_twice, mask_sources, no_state
from sparsejax.formats import BlockMask
from sparsejax.nn._block_sparse_linear import BlockSparseLinear
from sparsejax.typing import plain_path

Path: TypeAlias = tuple[str, ...]


def set_block_masks(model: nnx.Module, opt_state: Any) -> None:
    """Gives every block-sparse layer of a model the mask that the optimizer has for it.

    Call it in the train step before the loss, eagerly or under `jit`: it writes the
    layers' `block_mask`, and `full_dw`, which is True if the next update grows weights
    by their gradient (RigL, when `sj.is_mask_update`). Shapes stay, so that one trace
    serves all topologies. A layer computes with the kept blocks alone and its gradient
    equals that of the masked dense layer there, so its kernel needs no
    `sj.forward_params`; other layers that a method governs still do, and passing all
    params through it does no harm.

    In a functional loop, make the model anew where it is used, and call this on it:
    `model = nnx.merge(graph, params, rest, copy=True)`; without `copy`, Flax refuses to
    write to variables from outside of `jax.grad`.

    Layers and masks meet by path: the optimizer must have been initialised with
    `nnx.state(model, nnx.Param)` or a tree of the same names, as `nnx.Optimizer` does.
    A block-sparse layer that no method governs keeps the mask that it has, at first all
    blocks. Layers stacked by `nnx.vmap` for a scan get stacked masks; layers that share
    one kernel get its mask.

    Args:
      model: a module that holds `sj.nn.BlockSparseLinear`s; changed in place.
      opt_state: of one or more sparsejax methods, or any optax state or `nnx.Optimizer`
        state that holds them; packed masks are unpacked.

    Raises:
      ValueError: if the model has no block-sparse layer, the state no masks, or none
        for such a layer; if a layer is governed twice, by a method whose forward is not
        masked (`sr_ste`, `mask_decay`, `structure_decay`, `adams`: all their weights
        stay in use while training), or under a pattern that does not keep whole blocks
        of the layer's shape; or if a concrete mask does not fit in the lists of a
        layer. (A traced one that does not fit sets `block_mask.get_value().overflowed`;
        lists are full by default and always fit.)

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> model = sj.nn.BlockSparseFFN(16, 32, block_shape=(8, 8), rngs=nnx.Rngs(0))
      >>> tx = sj.rigl(optax.adamw(1e-3), 0.75, update_every=100, stop_step=750,
      ...              pattern=sj.Block((8, 8)), key=jax.random.key(0))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     sj.nn.set_block_masks(model, optimizer.opt_state)
      ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> loss = train_step(model, optimizer, jnp.ones((4, 16)))
      >>> print(model.gate.block_mask.get_value().density(), model.gate.full_dw[...])
      0.25 True
    """
    layers = {
        plain_path(path): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, BlockSparseLinear)
    }
    if not layers:
        raise ValueError(
            "`model` must hold block-sparse layers; found none in "
            f"{type(model).__name__}. Build them by `sj.nn.BlockSparseLinear` or "
            "`sj.nn.BlockSparseFFN`."
        )
    leaves = _governed(opt_state)
    # a kernel that layers share has the path of one of them alone
    by_kernel = {
        id(layer.kernel): leaves[(*path, "kernel")]
        for path, layer in layers.items()
        if (*path, "kernel") in leaves
    }
    pairs = {
        path: (layer, by_kernel[id(layer.kernel)])
        for path, layer in layers.items()
        if id(layer.kernel) in by_kernel
    }
    if not pairs:
        raise ValueError(
            "a block-sparse layer of `model` must be governed by a method; got layers "
            f"at {_listed(layers)} and masks at {_listed(leaves)}. Pass the whole "
            "model, and initialise the optimizer with `nnx.state(model, nnx.Param)`."
        )
    for path, mask in _block_masks(pairs).items():
        layer, leaf = pairs[path]
        if not isinstance(mask.overflowed, Tracer) and mask.overflowed.any():
            raise ValueError(
                "a mask must fit in the lists of its layer; got "
                f"{mask.indices.shape[-1]} and {mask.indices_t.shape[-1]} entries a "
                f"block row and block column at {_listed([path])}. Set a `block_mask` "
                "with a larger `capacity`."
            )
        layer.block_mask.set_value(mask)
        full_dw = jnp.broadcast_to(leaf.needs_dense_gradient, layer.full_dw.shape)
        layer.full_dw.set_value(full_dw)


def _governed(opt_state: Any) -> dict[Path, GovernedLeaf]:
    """The leaves that any state governs, by path."""
    found: dict[Path, GovernedLeaf] = {}
    for source in mask_sources(opt_state):
        for leaf in source.governed_leaves():
            if leaf.path in found:
                methods = (found[leaf.path].method, leaf.method)
                raise governed_twice(_listed([leaf.path]), *methods)
            found[leaf.path] = leaf
    if not found:
        raise no_state(opt_state)
    return found


def _block_masks(
    pairs: Mapping[Path, tuple[BlockSparseLinear, GovernedLeaf]],
) -> dict[Path, BlockMask]:
    """Builds the lists; those of equal layers together, to launch few small kernels."""
    alike = collections.defaultdict(dict)
    for path, (layer, leaf) in pairs.items():
        _check(path, layer, leaf)
        old = layer.block_mask.get_value()
        kept = kept_blocks(leaf.mask, old.blocks_shape)
        capacity = (old.indices.shape[-1], old.indices_t.shape[-1])
        alike[old.block_shape, old.blocks_shape, capacity][path] = kept
    found = {}
    for (block_shape, _, capacity), kept in alike.items():
        built = BlockMask.from_blocks(
            jnp.stack(list(kept.values())), block_shape, capacity=capacity
        )
        for i, path in enumerate(kept):
            found[path] = jax.tree.map(lambda lists, i=i: lists[i], built)
    return found


def _check(path: Path, layer: BlockSparseLinear, leaf: GovernedLeaf) -> None:
    height, width = layer.block_mask.get_value().block_shape
    at = _listed([leaf.path])
    if not leaf.is_masked:
        raise ValueError(
            "the forward of a block-sparse layer must be masked; got the method "
            f"`{leaf.method}`, in which all weights stay in use, at {at}. Exclude the "
            "layer by `where`, build it dense while this method trains, or take "
            "`sj.rigl`, `sj.sparse_evolution`, `sj.magnitude_prune` or "
            "`sj.static_sparse`."
        )
    if leaf.mask.shape != layer.kernel.shape:
        raise ValueError(
            "a mask must have the shape of its kernel; got a mask "
            f"{leaf.mask.shape} of `{leaf.method}` and a kernel {layer.kernel.shape} "
            f"at {at}. Pass the state that belongs to this model."
        )
    if len(leaf.unit) < 2 or leaf.unit[-2] % height or leaf.unit[-1] % width:
        raise ValueError(
            "the pattern of a block-sparse layer must keep or drop its blocks whole; "
            f"got {leaf.pattern} of `{leaf.method}` and blocks of {(height, width)} at "
            f"{at}. Pass pattern=sj.Block({(height, width)}) for this leaf."
        )


def _listed(paths: Any) -> str:
    names = ["/".join(path) or "the top" for path in paths]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
