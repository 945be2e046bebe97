"""What the conformance tests share: methods, a small problem, and what must hold.

A step records what users read; the checks are NumPy on those records. The code under
test computes none of the expected values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax as sj
from sparsejax.transforms import SparseState

SPARSITY = 0.5
UPDATE_EVERY = 2  # hard methods and AdamS refresh at steps 0, 2, 4, ...
TOTAL_STEPS = 20
BOUNDARIES = (1, 3)  # structure_decay: dense, then 4:8, then 2:4
KEY = jax.random.key(7)
NAMES = ["['first']['kernel']", "['second']['kernel']"]


def two_four(path, leaf):
    """2:4 for every leaf."""
    del path, leaf
    return sj.NM(2, 4)


def mixed(path, leaf):
    """2:4 for leaves with four outputs, any weights for the others."""
    del path
    return sj.NM(2, 4) if leaf.shape[-1] == 4 else sj.Unstructured()


def decay(step):
    return 1 - 0.25 * jnp.minimum(step, 4).astype(jnp.float32)


# ---------------------------------------------------------------- the methods


def _static(inner, key, **options):
    return sj.static_sparse(inner, SPARSITY, key=key, **options)


def _magnitude(inner, key, **options):
    return sj.magnitude_prune(inner, SPARSITY, update_every=UPDATE_EVERY, **options)


def _dynamic(method, inner, key, **options):
    return method(
        inner,
        SPARSITY,
        update_every=UPDATE_EVERY,
        stop_step=TOTAL_STEPS,
        key=key,
        **options,
    )


def _sr_ste(inner, key, **options):
    return sj.sr_ste(inner, decay=1e-2, sparsity=SPARSITY, **options)


def _mask_decay(inner, key, **options):
    return sj.mask_decay(inner, decay, sparsity=SPARSITY, **options)


def _structure_decay(inner, key, *, pattern, **options):
    def coarse(path, leaf):
        last = pattern(path, leaf)
        return sj.NM(4, 8) if last == sj.NM(2, 4) else last

    return sj.structure_decay(
        inner, [coarse, pattern], BOUNDARIES, sparsity=SPARSITY, **options
    )


def _adams(inner, key, **options):
    del inner
    return sj.adams(
        1e-2,
        TOTAL_STEPS,
        1e-2,
        mask_period=UPDATE_EVERY,
        sparsity=SPARSITY,
        **options,
    )


METHODS = {
    "static_sparse": _static,
    "magnitude_prune": _magnitude,
    "sparse_evolution": functools.partial(_dynamic, sj.sparse_evolution),
    "rigl": functools.partial(_dynamic, sj.rigl),
    "sr_ste": _sr_ste,
    "mask_decay": _mask_decay,
    "structure_decay": _structure_decay,
    "adams": _adams,  # is an optimizer of its own: wraps none
}
WRAPPING = [name for name in METHODS if name != "adams"]
HARD = ("static_sparse", "magnitude_prune", "sparse_evolution", "rigl")
DYNAMIC = ("sparse_evolution", "rigl")


def build(method, inner, *, key=KEY, pattern=mixed, **options):
    """The method of that name around `inner`."""
    return METHODS[method](inner, key=key, pattern=pattern, **options)


# ---------------------------------------------------------------- a small problem


def make_params(seed=0, dtype=jnp.float32):
    """By NumPy, as the batch: what jax draws is compiled into each case."""
    rng = np.random.default_rng(seed)

    def kernel(*shape):  # no weight so near to 0 that rounding makes it 0
        weights = rng.uniform(0.1, 1, shape) * rng.choice((-1, 1), shape)
        return jnp.asarray(weights, dtype)

    return {
        "first": {"bias": jnp.zeros(8, dtype), "kernel": kernel(8, 8)},
        "second": {"kernel": kernel(8, 4)},
    }


def batch():
    rng = np.random.default_rng(100)
    return rng.normal(size=(16, 8)).astype("f"), rng.normal(size=(16, 4)).astype("f")


def predict(params, x):
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["second"]["kernel"]


def loss(params):
    x, y = batch()
    return jnp.mean((predict(params, x) - y).astype(jnp.float32) ** 2)


def no_extra(value, grads, value_fn):
    return {}


def take_step(tx, params, state, extra=no_extra, loss=loss):
    """One step of the loop that users write."""

    def value_fn(params):
        return loss(sj.forward_params(state, params))

    value, grads = jax.value_and_grad(value_fn)(params)
    updates, state = tx.update(grads, state, params, **extra(value, grads, value_fn))
    return optax.apply_updates(params, updates), state


def find_state(opt_state) -> SparseState:
    """The only method's state inside an optimizer state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparseState))
    (found,) = [node for node in nodes if isinstance(node, SparseState)]
    return found


def record(params, state):
    """What users read after a step, for `check_step`."""
    return {
        "params": params,
        "masks": sj.masks_of(state),
        "forward": sj.forward_params(state, params),
        "sparse": sj.sparse_params(state, params),
        "num_updates": find_state(state).step,
    }


def fast_jit(fn, **options):
    """`jax.jit` that compiles faster and runs slower."""
    compiler = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    return jax.jit(fn, compiler_options=compiler, **options)


# ---------------------------------------------------------------- what must hold


def top_of_groups(scores, n, m):
    """The n highest of each m along axis -2, ties to the lower index."""
    *lead, rows, columns = scores.shape
    groups = scores.reshape(*lead, rows // m, m, columns)
    order = np.argsort(-groups, axis=-2, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[..., :n, :], True, axis=-2)
    return mask.reshape(scores.shape)


def by_magnitude(weight, pattern):
    """The mask of the largest weights at half the size."""
    scores = np.abs(weight.astype(np.float64))
    if isinstance(pattern, sj.NM):
        return top_of_groups(scores, pattern.n, pattern.m)
    order = np.argsort(-scores.ravel(), kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[: scores.size // 2]] = True
    return mask.reshape(scores.shape)


def frame(weight, pattern, step):
    """The mask of `structure_decay` at a step."""
    if step < BOUNDARIES[0]:
        return np.ones(weight.shape, bool)
    if step < BOUNDARIES[1] and pattern == sj.NM(2, 4):
        pattern = sj.NM(4, 8)
    return by_magnitude(weight, pattern)


def soft_mask(method, weight, pattern, step):
    """The mask that update `step` uses with these weights; None where it may be old."""
    if method == "structure_decay":
        return frame(weight, pattern, step)
    if method == "adams" and step % UPDATE_EVERY:
        return None
    return by_magnitude(weight, pattern)


def soft_forward(method, weight, pattern, step):
    """What the forward before update `step` uses."""
    if method == "adams":
        return weight
    if method == "structure_decay":
        return np.where(frame(weight, pattern, step), weight, 0)
    factor = np.float32(decay(step) if method == "mask_decay" else 0)
    small = (weight.astype(np.float32) * factor).astype(weight.dtype)
    return np.where(by_magnitude(weight, pattern), weight, small)


def check_pattern(mask, shape, pattern, at=""):
    """The pattern, and exactly half of the weights."""
    assert mask.dtype == np.bool_, at
    assert mask.shape == tuple(shape), at
    if isinstance(pattern, sj.NM):
        groups = mask.reshape(-1, pattern.m, shape[-1])
        assert (groups.sum(axis=1) == pattern.n).all(), at
    assert mask.sum() == mask.size // 2, at


def flat(tree):
    """Leaves by name, None left out."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def check_step(
    method, seen, before=None, *, names=NAMES, pattern=mixed, ignore=(), at=""
):
    """Checks what a step recorded.

    Args:
      method: its name in METHODS.
      seen: a `record` of the new params and state.
      before: the params before the step, if it was a real update; the masks of soft
        methods are then compared with these.
      names: the governed leaves.
      pattern: of `(path, leaf)`, as given to `build`.
      ignore: leaves that the wrapper under test hides from the method.
      at: what to say if something does not hold.
    """
    params, masks, forward, sparse = (
        flat(seen[key]) for key in ("params", "masks", "forward", "sparse")
    )
    before = flat(before)
    num_updates = int(seen["num_updates"])
    assert sorted(masks) == sorted(names), (at, method)
    for name, weight in params.items():
        here = f"{at} {method} {name} after {num_updates} updates"
        assert np.isfinite(weight).all(), here
        same = functools.partial(np.testing.assert_array_equal, err_msg=here)
        if name not in names:
            same(forward[name], weight)
            same(sparse[name], weight)
            continue
        of_leaf = pattern(None, weight)
        if method in HARD:
            check_pattern(masks[name], weight.shape, of_leaf, here)
            expected = np.where(masks[name], weight, 0)
            same(forward[name], expected)
            same(sparse[name], expected)
            if num_updates:
                same(weight, expected)
            continue
        assert (weight != 0).all(), here  # dense
        check_pattern(sparse[name] != 0, weight.shape, of_leaf, here)
        same(sparse[name], np.where(by_magnitude(weight, of_leaf), weight, 0))
        wanted = soft_forward(method, weight, of_leaf, num_updates)
        if weight.dtype == jnp.bfloat16 and method == "mask_decay":
            # XLA may skip the rounding of the weights in between
            wide = forward[name].astype(np.float32), wanted.astype(np.float32)
            np.testing.assert_allclose(*wide, rtol=2**-6, err_msg=here)
        else:
            same(forward[name], wanted)
        if before:
            wanted = soft_mask(method, before[name], of_leaf, num_updates - 1)
            if wanted is not None:
                same(masks[name], wanted)


def spec(tree):
    """Structure, and each leaf's shape, dtype and weak type: what a retrace sees."""

    def of(leaf):
        weak = getattr(leaf, "weak_type", False)
        return f"{leaf.dtype}{list(leaf.shape)}{' weak' if weak else ''}"

    return jax.tree.map(of, tree)


def moments(inner_state, name, shape):
    """The float leaves of an optimizer's state that belong to a parameter."""
    return {
        where: leaf
        for where, leaf in flat(numbers(inner_state)).items()
        if where.endswith(name)
        and leaf.shape == tuple(shape)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def check_regrown(inner_state, fresh, params, old, new, at="") -> int:
    """Regrown weights are 0, their moments those of `fresh`.

    Args:
      inner_state: after the update.
      fresh: the inner optimizer's state for the new params; None for zeros.
      params: after the update.
      old: masks before it.
      new: masks after it.
      at: what to say if something does not hold.

    Returns:
      How many weights were regrown.
    """
    params, old, new = flat(params), flat(old), flat(new)
    count = 0
    for name in new:
        regrown = new[name] & ~old[name]
        count += int(regrown.sum())
        shape = params[name].shape
        assert (params[name][regrown] == 0).all(), f"{at} {name}"
        for where, leaf in moments(inner_state, name, shape).items():
            wanted = 0 if fresh is None else moments(fresh, name, shape)[where][regrown]
            # a step without a gradient from there: Adafactor adds 1e-30 to a square
            np.testing.assert_allclose(
                leaf[regrown], wanted, rtol=0, atol=1e-25, err_msg=f"{at} {where}"
            )
    return count


def numbers(tree: Any) -> Any:
    """Random keys as numbers, so that trees compare."""

    def of(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(leaf)
        return leaf

    return jax.tree.map(of, tree)


@dataclasses.dataclass
class Traces:
    """Counts how often a function is traced."""

    count: int = 0

    def __call__(self, fn: Callable) -> Callable:
        @functools.wraps(fn)
        def counted(*args, **kwargs):
            self.count += 1
            return fn(*args, **kwargs)

        return counted
