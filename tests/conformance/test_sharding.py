"""Eight devices: states are sharded like the params, masks do not depend on the mesh,
and no step gathers a governed leaf.

Each method meets two meshes here, one of automatic and one of explicit axes, and each
mesh and pattern comes up; `--hypothesis-profile=explore` runs all combinations.
"""

import dataclasses
import itertools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from tests.conformance import suite

LR = 1e-2
STEPS = 3
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
LARGEST_REDUCTION = 128  # entries; top-k reduces counts, on a CPU one a column


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh (data, model), and where the axes of the leaves lie on it.

    A device holds a multiple of 8 columns: of automatic axes a refresh cannot know, and
    packs what it changes by bytes, of which neighbours would then hold halves.
    """

    mesh: tuple[int, int]
    first: P  # [64, 64]
    second: P  # [64, 128]
    bias: P  # [64]
    stack: P  # [8, 16, 64], the first kernel where layers are stacked


LAYOUTS = {
    "data": Layout((8, 1), P(), P(), P(), P()),
    "fsdp": Layout((8, 1), P("data"), P("data"), P("data"), P("data")),
    "tensor": Layout(
        (1, 8), P(None, "model"), P("model"), P("model"), P(None, None, "model")
    ),
    "mixed": Layout(
        (4, 2),
        P("data", "model"),
        P("model", "data"),
        P("model"),
        P("data", None, "model"),
    ),
    "both": Layout(
        (4, 2),
        P(("data", "model")),
        P(None, ("model", "data")),
        P(),
        P(("data", "model")),
    ),
}
# of the first kernel; the second is 2:4
KINDS = {
    "unstructured": sj.Unstructured(),
    "block": sj.Block((4, 8)),
    "channel": sj.Channel(),
    "stacked": sj.Unstructured(),
}
MIXED = LAYOUTS["mixed"]


def make_mesh(shape=(4, 2), axis_type=AxisType.Auto):
    devices = jax.devices()[: math.prod(shape)]
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, ("data", "model"), axis_types=types, devices=devices)


def make_params(kind="unstructured"):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    kernel = (8, 16, 64) if kind == "stacked" else (64, 64)
    return {
        "first": {"bias": normal(64), "kernel": normal(*kernel)},
        "second": {"kernel": normal(64, 128)},
    }


def build(method, kind="unstructured", inner=None, **options):
    """A method on the params of `make_params`."""

    def pattern(path, leaf):
        del path
        return sj.NM(2, 4) if leaf.shape == (64, 128) else KINDS[kind]

    inner = optax.adam(LR) if inner is None else inner
    stacked = {"first": int(kind == "stacked"), "second": 0}
    return suite.build(method, inner, pattern=pattern, stacked=stacked, **options)


def shard(tree, mesh, layout=MIXED):
    def put(leaf, spec):
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    first = tree["first"]["kernel"]
    return {
        "first": {
            "bias": put(tree["first"]["bias"], layout.bias),
            "kernel": put(first, layout.stack if first.ndim == 3 else layout.first),
        },
        "second": {"kernel": put(tree["second"]["kernel"], layout.second)},
    }


def shard_like(state, params, mesh):
    """Puts each leaf of a state where the param lies whose path it ends with."""
    wanted = dict(with_names(params))

    def put(path, leaf):
        name = jax.tree_util.keystr(path)
        found = [p for key, p in wanted.items() if name.endswith(key)]
        sharding = found[0].sharding if found else NamedSharding(mesh, P())
        return jax.device_put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(put, state)


def sharded_like_params(tree, params):
    """Every leaf under a param's path and of its shape is sharded as the param is."""
    wanted = dict(with_names(params))
    found = 0
    for name, leaf in with_names(tree):
        for param_name, param in wanted.items():
            if name.endswith(param_name) and leaf.shape == param.shape:
                assert equally_sharded(leaf, param), name
                found += 1
    return found


def equally_sharded(leaf, other):
    if isinstance(leaf, jax.ShapeDtypeStruct):  # its mesh is abstract
        return axes_of(leaf) == axes_of(other)
    return leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


def axes_of(leaf):
    """The mesh axes of each axis of a leaf."""
    spec = () if leaf.sharding is None else tuple(leaf.sharding.spec)
    return spec + (None,) * (leaf.ndim - len(spec))


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


def cases():
    """(method, kind of axes, layout, kind of the first kernel)."""
    every = list(itertools.product(suite.METHODS, AXIS_TYPES, LAYOUTS, KINDS))
    if hypothesis.settings().max_examples > 100:  # the profile that explores
        return every
    turns = itertools.product(suite.METHODS, AXIS_TYPES)
    found = [
        (*pair, list(LAYOUTS)[i % len(LAYOUTS)], list(KINDS)[(i + i // 8) % len(KINDS)])
        for i, pair in enumerate(turns)
    ]
    # a mask of whole channels that no gradient meets shows no trace of the weight
    hard = ("mask_decay", "auto", "fsdp", "channel")
    return found if hard in found else [*found, hard]


@pytest.mark.parametrize(("method", "axis_type", "layout", "kind"), cases())
def test_sharded_steps(method, axis_type, layout, kind):
    """Masks equal to one device's; shardings equal to the params'; nothing gathered."""
    layout = LAYOUTS[layout]
    mesh = make_mesh(layout.mesh, AXIS_TYPES[axis_type])
    tx = build(method, kind)
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

    params = make_params(kind)
    grads_of, step_alone = map(suite.fast_jit, (gradient, plain_step))
    alone = [(params, suite.fast_jit(tx.init)(params))]
    grads = []
    for _ in range(STEPS):
        grads.append(grads_of(alone[-1][0]))
        alone.append(step_alone(grads[-1], *alone[-1][::-1]))
    with jax.set_mesh(mesh):
        state = shard_like(alone[0][1], shard(params, mesh, layout), mesh)
        for i in range(STEPS):
            # from equal params each time: sums may round differently
            params = shard(alone[i][0], mesh, layout)
            params, state = step(shard(grads[i], mesh, layout), state, params)
            same = (
                suite.find_state(state).masks,
                suite.find_state(alone[i + 1][1]).masks,
            )
            jax.tree.map(np.testing.assert_array_equal, *same)
            found = sharded_like_params(suite.find_state(state), params)
            assert found == 2 * 3 + 2  # two moments of three leaves, two masks
        forward, sparse = read(state, params)
        programs = (
            step.lower(shard(grads[0], mesh, layout), state, params).compile(),
            read.lower(state, params).compile(),
        )
    assert traces.count == 1
    for tree in (forward, sparse):
        assert sharded_like_params(tree, params) == 3
    check_communications(*programs)


def check_communications(*programs):
    """Nothing travels but small reductions."""
    for operation, entries in (c for p in programs for c in communications(p)):
        assert operation == "all-reduce" and entries <= LARGEST_REDUCTION, operation


@pytest.mark.parametrize("method", suite.METHODS)
def test_first_masks_are_sharded(method):
    """Eager `init` on sharded params shards the state, as optax shards its moments."""
    mesh = make_mesh()
    kind = list(KINDS)[list(suite.METHODS).index(method) % len(KINDS)]
    params = shard(make_params(kind), mesh)
    for pack_masks in (False, True):
        tx = build(method, kind, optax.sgd(LR), pack_masks=pack_masks)
        masks = suite.find_state(tx.init(params)).masks
        for (_, mask), name in zip(with_names(masks), ("first", "second"), strict=True):
            assert equally_sharded(mask, params[name]["kernel"])


@pytest.mark.parametrize("method", suite.METHODS)
def test_types_on_explicit_meshes(method):
    """`init` and `update` keep every sharding; tracing alone tells."""
    for layout, kind in zip(LAYOUTS.values(), itertools.cycle(KINDS)):
        tx = build(method, kind, pack_masks=layout is MIXED)
        mesh = make_mesh(layout.mesh, AxisType.Explicit)
        with jax.set_mesh(mesh):
            params = shard(make_params(kind), mesh, layout)
            state = jax.eval_shape(tx.init, params)
            updates, after = jax.eval_shape(tx.update, params, state, params)
        packed = layout is MIXED
        found = sharded_like_params(suite.find_state(state), params)
        assert found == (2 * 3 if packed else 2 * 3 + 2), (layout, kind)
        for got, want in ((state, after), (updates, params)):
            for (name, a), (_, b) in zip(
                with_names(got), with_names(want), strict=True
            ):
                same = a.shape == b.shape and equally_sharded(a, b)
                assert same, (layout, kind, name)
        masks = suite.find_state(state).masks
        for name, mask in with_names(masks) if packed else []:
            kernel = params["first" if "first" in name else "second"]["kernel"]
            assert axes_of(mask) == axes_of(kernel), (layout, kind)


@pytest.mark.parametrize("method", ["rigl", "sr_ste"])
def test_a_sharded_run_agrees(method):
    """A batch over all devices and sharded weights train as one device does."""
    mesh = make_mesh((8, 1))
    tx = suite.build(method, optax.adam(LR), pattern=suite.mixed)
    x, y = suite.batch()

    @jax.jit
    def run(params, x, y):
        def loss(params):
            return jnp.mean((suite.predict(params, x) - y) ** 2)

        def step(carry, _):
            value = loss(sj.forward_params(carry[1], carry[0]))
            return suite.take_step(tx, *carry, loss=loss), value

        carry = params, tx.init(params)
        (params, state), losses = jax.lax.scan(step, carry, length=12)
        return losses, params, sj.masks_of(state)

    params = suite.make_params()
    alone = run(params, x, y)
    rows = NamedSharding(mesh, P("data"))
    params["first"] = jax.device_put(params["first"], rows)
    sharded = run(params, *jax.device_put((x, y), rows))
    assert not sharded[1]["first"]["kernel"].is_fully_replicated
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        sharded,
        alone,
    )


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_global_topk(axis_type):
    """Across leaves that are sharded in different ways only counts travel."""
    params = make_params()
    wanted = sj.global_topk(params, 1000), sj.prune(params, 0.7, across_leaves=True)
    mesh = make_mesh(axis_type=AXIS_TYPES[axis_type])
    with jax.set_mesh(mesh):
        params = shard(params, mesh)

        @jax.jit
        def choose(params):
            pruned = sj.prune(params, 0.7, across_leaves=True)
            return sj.global_topk(params, 1000), pruned

        program = choose.lower(params).compile()
        got = program(params)
    check_communications(program)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert sharded_like_params(got[0], params) == 3
    assert sharded_like_params(got[1], params) == 2


CUT = {
    "group": (sj.NM(2, 4), (16, 64), P("data")),
    "large group": (sj.NM(1, 16), (16, 64), P("data")),
    "block": (sj.Block((2, 16)), (16, 64), P(None, "data")),
    "block in a stack": (sj.Block((4, 4)), (2, 16, 16), P(None, "data")),
}


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize(("pattern", "shape", "spec"), CUT.values(), ids=CUT)
def test_a_group_that_devices_cut(pattern, shape, spec, axis_type):
    """XLA would move the leaf to put groups together: `init` says so instead."""
    mesh = make_mesh((8, 1), AXIS_TYPES[axis_type])
    sharding = NamedSharding(mesh, spec)
    params = {"kernel": jax.device_put(jnp.ones(shape), sharding)}
    abstract = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    options = {
        "sparsity": getattr(pattern, "sparsity", 0.5),
        "pattern": pattern,
        "stacked": len(shape) - 2,
    }
    init = sj.sr_ste(optax.sgd(LR), **options).init
    match = r"whole on one device.*parts of \(.*at \['kernel'\]. Shard another axis"
    for call in (init, lambda params: sj.prune(params, **options)):
        for given in (params, abstract):
            with pytest.raises(ValueError, match=match):
                call(given)
    if axis_type == "explicit":  # the type of a traced leaf tells its sharding
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=match):
            jax.eval_shape(init, params)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("method", ["rigl", "sr_ste", "adams"])
def test_a_byte_that_devices_cut(method, axis_type):
    mesh = make_mesh((8, 1), AXIS_TYPES[axis_type])
    sharding = NamedSharding(mesh, P(None, "data"))
    params = {"kernel": jax.device_put(jnp.ones((8, 32)), sharding)}
    tx = suite.build(method, optax.sgd(LR), pattern=suite.two_four, pack_masks=True)
    words = r"whole bytes.*\(8, 32\), sharded in parts of \(8, 4\), at \['kernel'\]"
    with pytest.raises(ValueError, match=words):
        tx.init(params)


def test_brought_masks_are_sharded_as_the_weights_are():
    mesh = make_mesh()
    params = shard(make_params(), mesh)
    masks = {"first": None, "second": {"kernel": np.ones((64, 128), bool)}}
    state = sj.static_sparse(optax.sgd(LR), masks=masks).init(params)
    assert sharded_like_params(state.masks, params) == 1


def two_four_second(path, leaf):
    """2:4 for the second layer."""
    del path
    return sj.NM(2, 4) if leaf.shape[-1] == 128 else sj.Unstructured()


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
        pattern=two_four_second,
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
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                (other, shard_like(state, other, mesh)),
            )
            got = checkpointer.restore(tmp_path / "state", template)
            jax.tree.map(np.testing.assert_array_equal, got, (params, state))
            _, second = update(shard(grads, mesh), got[1], got[0])
            jax.tree.map(np.testing.assert_array_equal, second.masks, first.masks)
