"""Eight devices: states are sharded like the params, masks do not depend on the mesh,
and no step gathers a governed leaf."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparsejax as sj
from tests.conformance import suite

LR = 1e-2
STEPS = 3
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {
    "first": {
        "bias": PartitionSpec("model"),
        "kernel": PartitionSpec("data", "model"),
    },
    "second": {"kernel": PartitionSpec("model", "data")},
}
LARGEST_REDUCTION = 64  # entries; top-k reduces counts


def pattern(path, leaf):
    """2:4 for the second layer."""
    del path
    return sj.NM(2, 4) if leaf.shape[-1] == 32 else sj.Unstructured()


def make_mesh(shape=(4, 2), axis_type=AxisType.Auto):
    devices = jax.devices()[: math.prod(shape)]
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, ("data", "model"), axis_types=types, devices=devices)


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {
            "bias": jax.random.normal(keys[0], (64,)),
            "kernel": jax.random.normal(keys[1], (64, 64)),
        },
        "second": {"kernel": jax.random.normal(keys[2], (32, 32))},
    }


def shard(tree, mesh):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
    )


def specs(tree):
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def sharded_like_params(tree, params):
    """Every leaf under a param's path and of its shape is sharded as the param is."""
    wanted = {name: leaf for name, leaf in with_names(params)}
    found = 0
    for name, leaf in with_names(tree):
        for param_name, param in wanted.items():
            if name.endswith(param_name) and leaf.shape == param.shape:
                assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), name
                found += 1
    return found


def with_names(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def communications(compiled):
    """(operation, entries of its largest result) in a compiled program."""
    operations = (
        "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|"
        "collective-broadcast|ragged-all-to-all"
    )
    found = re.findall(rf"= (.*?) ({operations})(?:-start)?\(", compiled.as_text())
    return [
        (
            operation,
            max(
                math.prod(int(d) for d in dims.split(",") if d)
                for dims in re.findall(r"\w+\[([\d,]*)\]", result)
            ),
        )
        for result, operation in found
    ]


@pytest.mark.parametrize("method", suite.METHODS)
def test_sharded_steps(method):
    # the kinds of axes take turns
    turn = list(suite.METHODS).index(method) % len(AXIS_TYPES)
    axis_type = list(AXIS_TYPES)[turn]
    mesh = make_mesh(axis_type=AXIS_TYPES[axis_type])
    tx = suite.build(method, optax.adam(LR), pattern=pattern)
    traces = suite.Traces()

    def plain_step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def gradient(params):
        return jax.tree.map(lambda p: jnp.cos(7 * p), params)

    step = jax.jit(traces(plain_step))

    @jax.jit
    def read(state, params):
        return sj.forward_params(state, params), sj.sparse_params(state, params)

    params = make_params()
    grads_of, step_alone = map(suite.fast_jit, (gradient, plain_step))
    alone = [(params, tx.init(params))]
    grads = []
    for _ in range(STEPS):
        grads.append(grads_of(alone[-1][0]))
        alone.append(step_alone(grads[-1], *alone[-1][::-1]))
    with jax.set_mesh(mesh):
        state = tx.init(shard(params, mesh))
        for i in range(STEPS):
            # from equal params each time: sums may round differently
            params = shard(alone[i][0], mesh)
            params, state = step(shard(grads[i], mesh), state, params)
            same = (
                suite.find_state(state).masks,
                suite.find_state(alone[i + 1][1]).masks,
            )
            jax.tree.map(np.testing.assert_array_equal, *same)
            found = sharded_like_params(suite.find_state(state), params)
            assert found == 2 * 3 + 2  # two moments of three leaves, two masks
        forward, sparse = read(state, params)
        programs = (
            step.lower(shard(grads[0], mesh), state, params).compile(),
            read.lower(state, params).compile(),
        )
    assert traces.count == 1
    for tree in (forward, sparse):
        assert sharded_like_params(tree, params) == 3
    for operation, entries in (c for p in programs for c in communications(p)):
        assert operation == "all-reduce" and entries <= LARGEST_REDUCTION, operation


@pytest.mark.parametrize("method", suite.METHODS)
def test_first_masks_are_sharded(method):
    """Eager `init` on sharded params shards the state, as optax shards its moments."""
    mesh = make_mesh()
    params = shard(make_params(), mesh)
    for pack_masks in (False, True):
        tx = suite.build(method, optax.sgd(LR), pattern=pattern, pack_masks=pack_masks)
        masks = suite.find_state(tx.init(params)).masks
        for (_, mask), name in zip(with_names(masks), ("first", "second"), strict=True):
            wanted = params[name]["kernel"].sharding
            assert mask.sharding.is_equivalent_to(wanted, mask.ndim)


@pytest.mark.parametrize("pack_masks", [False, True], ids=["bools", "packed"])
def test_resume_on_another_mesh(pack_masks, tmp_path):
    """The restored state is bit-equal; the next update gives bit-equal masks."""
    key = jax.random.key(5)
    tx = sj.sparse_evolution(
        optax.adam(LR),
        0.5,
        update_every=1,
        stop_step=100,
        key=key,
        pattern=pattern,
        pack_masks=pack_masks,
    )
    update = jax.jit(tx.update)
    params = shard(make_params(), make_mesh())
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    _, state = update(grads, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        _, first = update(grads, state, params)
        for mesh in (make_mesh((1, 8)), make_mesh((1, 1))):
            other = shard(make_params(), mesh)
            template = jax.tree.map(
                lambda x, mesh=mesh: jax.ShapeDtypeStruct(
                    x.shape,
                    x.dtype,
                    sharding=x.sharding
                    if isinstance(x.sharding, NamedSharding)
                    else NamedSharding(mesh, PartitionSpec()),
                ),
                (other, tx.init(other)),
            )
            got = checkpointer.restore(tmp_path / "state", template)
            jax.tree.map(np.testing.assert_array_equal, got, (params, state))
            _, second = update(shard(grads, mesh), got[1], got[0])
            jax.tree.map(np.testing.assert_array_equal, second.masks, first.masks)
