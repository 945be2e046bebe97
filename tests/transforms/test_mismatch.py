"""A state, params and a method that do not belong together raise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj

KEY = jax.random.key(5)
KEYS = jax.random.split(KEY, 12)
AS_LIST = [{"kernel": jax.random.normal(key, (4, 4))} for key in KEYS]
AS_DICT = {str(place): layer for place, layer in enumerate(AS_LIST)}  # "10" before "2"


@pytest.mark.parametrize(
    "use",
    [
        lambda tx, state: sj.sparse_params(state, AS_DICT),
        lambda tx, state: sj.forward_params(state, AS_DICT),
        lambda tx, state: tx.update(AS_DICT, state, AS_DICT),
        lambda tx, state: sj.apply_masks(AS_DICT, sj.prune(AS_LIST, 0.5)),
        lambda tx, state: sj.sad(sj.prune(AS_LIST, 0.5), sj.prune(AS_DICT, 0.5)),
    ],
)
def test_the_same_names_in_another_order(use):
    tx = sj.sr_ste(optax.sgd(0.1), pattern=sj.NM(2, 4))
    with pytest.raises(ValueError, match=r"one order; got (2|10)/kernel where"):
        use(tx, tx.init(AS_LIST))


def test_other_names_align_by_order():
    state = sj.static_sparse(optax.sgd(0.1), 0.5, key=KEY).init(AS_LIST)
    renamed = {f"layer_{place:02}": layer for place, layer in enumerate(AS_LIST)}
    got = jax.tree.leaves(sj.sparse_params(state, renamed))
    want = jax.tree.leaves(sj.sparse_params(state, AS_LIST))
    np.testing.assert_array_equal(got, want)


FRAMES = sj.NM(3, 4), sj.NM(1, 4)


def rigl(pattern=sj.Unstructured(), **options):  # noqa: B008
    options = {"update_every": 2, "stop_step": 8, "key": KEY} | options
    sparsity = None if isinstance(pattern, sj.NM) else 0.5
    return sj.rigl(optax.sgd(0.1), sparsity, pattern=pattern, **options)


def adams(pattern=sj.NM(2, 4), **options):  # noqa: B008
    return sj.adams(1e-3, 10, 1e-2, pattern=pattern, **options)


def sr_ste(pattern=sj.NM(2, 4), **options):  # noqa: B008
    return sj.sr_ste(optax.sgd(0.1), pattern=pattern, **options)


def half(sparsity=0.5, **options):
    return sr_ste(sj.Unstructured(), sparsity=sparsity, **options)


def mask_decay(**options):
    return sj.mask_decay(
        optax.sgd(0.1), lambda step: 0.0 * step, pattern=sj.NM(2, 4), **options
    )


def frames(patterns=FRAMES, **options):
    starts = range(len(patterns))
    return sj.structure_decay(optax.sgd(0.1), patterns, starts, **options)


def every(path, leaf):
    del path, leaf
    return True


@pytest.mark.parametrize(
    ("make", "other", "said"),
    [
        (rigl, {"update_every": 3}, "update_every=3, .* update_every=2"),
        (rigl, {"stop_step": 100}, "stop_step=100, .* stop_step=8"),
        (rigl, {"pattern": sj.Block((2, 2))}, "pattern=Block"),
        (sr_ste, {"pattern": sj.NM(1, 4)}, "pattern=NM"),
        (adams, {"pattern": sj.NM(1, 4)}, "pattern=NM"),
        (adams, {"mask_period": 3}, "mask_period=3, .* mask_period=10"),
        (half, {"stacked": 1, "where": every}, "stacked=1 at .*0.* stacked=0"),
        (half, {"sparsity": 0.75}, "sparsity=0.75 at .*0.* sparsity=0.5"),
        (mask_decay, {"straight_through": True}, "straight_through=True"),
        (frames, {"patterns": (sj.NM(2, 4), sj.NM(1, 4))}, r"pattern=NM\(n=2"),
        (frames, {"patterns": (sj.NM(1, 4),)}, r"len\(patterns\)=1"),
    ],
)
def test_other_options_than_those_of_the_state(make, other, said):
    params = AS_LIST[:2]
    before, after = make(), make(**other)
    state = before.init(params)
    with pytest.raises(ValueError, match=said):
        after.update(params, state, params)
    # as the message says
    template = jax.tree.structure(after.init(params))
    moved = jax.tree.unflatten(template, jax.tree.leaves(state))
    updates, moved = after.update(params, moved, params)
    after.update(updates, moved, params)


def test_options_that_say_the_same():
    params = AS_LIST[:2]
    before, after = sr_ste(), sr_ste(lambda path, leaf: sj.NM(2, 4), sparsity=0.5)
    after.update(params, before.init(params), params)


def by_norm(params, sparsity, **how):
    norms = jax.tree.map(jnp.linalg.norm, sj.uniform(params, sparsity, **how))
    return jax.tree.map(lambda _, norm: float(norm), params, norms)


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": by_norm},
        {"where": lambda path, leaf: float(jnp.std(leaf)) > 0},
        {"where": lambda path, leaf: leaf.sharding is not None},
        {"where": [{"kernel": True}] * 2, "stacked": [{"kernel": 0}] * 2},
        {"sparsity": [{"kernel": 0.5}, {"kernel": 0.75}]},
    ],
)
def test_functions_and_trees_are_asked_once(options):
    """In `update` weights are traced and names may be others."""
    params = AS_LIST[:2]
    tx = half(**options)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    renamed = {f"layer_{place}": layer for place, layer in enumerate(params)}
    jax.jit(tx.update)(renamed, state, renamed)


@pytest.mark.parametrize("make", [sr_ste, adams, rigl, mask_decay, frames])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_stay_stored_as_they_are(make, packed):
    params = AS_LIST[:2]
    before, after = make(pack_masks=packed), make(pack_masks=not packed)
    state = before.init(params)

    def step(state, _):
        return after.update(params, state, params)[1], None

    got, _ = jax.lax.scan(step, state, length=3)
    want = state
    for _ in range(3):
        _, want = before.update(params, want, params)
    jax.tree.map(np.testing.assert_array_equal, sj.masks_of(got), sj.masks_of(want))


def test_a_key_of_another_implementation():
    params = AS_LIST[:2]
    state = rigl().init(params)
    with pytest.raises(ValueError, match="`key` must be of the implementation"):
        rigl(key=jax.random.key(0, impl="rbg")).update(params, state, params)


def test_one_in_four_of_a_state_of_two_in_four():
    params = AS_LIST[:2]
    before, after = rigl(sj.NM(2, 4), update_every=1), rigl(sj.NM(1, 4), update_every=1)
    template = jax.tree.structure(after.init(params))
    state = jax.tree.unflatten(template, jax.tree.leaves(before.init(params)))
    _, state = after.update(params, state, params)
    for layer in sj.masks_of(state):
        np.testing.assert_array_equal(jnp.sum(layer["kernel"], axis=0), 1)
