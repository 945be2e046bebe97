"""What the tests of the methods share: slow NumPy oracles, and the loop under test.

Everything here is written from the papers' equations, in float64, one weight at a
time; trees are flat dicts from a leaf's path to its array.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax

import sparsejax as sj

# ------------------------------------------------------------------------- trees


def flat(tree):
    """A tree as a dict from path to array; leaves that are None are left out."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def wide(tree):
    """The same in float64."""
    return {name: leaf.astype(np.float64) for name, leaf in flat(tree).items()}


# ------------------------------------------------------------- patterns and selection


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one governed leaf is pruned."""

    pattern: object = sj.Unstructured()
    stacked: int = 0


def layers(array, spec):
    """Views of the layers of a stacked leaf."""
    for index in np.ndindex(array.shape[: spec.stacked]):
        yield array[index]


def own_axis(spec, ndim):
    """The pattern's axis within a layer of `ndim` axes."""
    axis = spec.pattern.axis
    return axis % ndim if axis < 0 else axis - spec.stacked


@functools.cache
def labels(shape, spec, of="unit"):
    """For each weight of a layer the number of its unit (or, of N:M, its group)."""
    seen, out = {}, np.zeros(shape, int)
    for index in np.ndindex(shape):
        match spec.pattern:
            case sj.NM(m=m) if of == "group":
                axis = own_axis(spec, len(shape))
                name = (*index[:axis], index[axis] // m, *index[axis + 1 :])
            case sj.Unstructured() | sj.NM():
                name = index
            case sj.Block(block):
                lead = len(shape) - len(block)
                tail = tuple(i // b for i, b in zip(index[lead:], block, strict=True))
                name = (*index[:lead], *tail)
            case sj.Channel():
                name = index[own_axis(spec, len(shape))]
        out[index] = seen.setdefault(name, len(seen))
    return out


def top(scores, count, among=None):
    """Keeps the `count` highest; NaN ranks lowest, ties go to the lower flat index."""
    scores = np.asarray(scores, np.float64)
    values = scores.ravel()
    allowed = np.ones(values.size, bool) if among is None else np.ravel(among)

    def rank(i):
        return math.isnan(values[i]), 0 if math.isnan(values[i]) else -values[i], i

    mask = np.zeros(values.size, bool)
    mask[sorted(np.flatnonzero(allowed), key=rank)[:count]] = True
    return mask.reshape(scores.shape)


def num_kept(sparsity, size):
    return max(size - round(float(sparsity) * size), 1)


def select(scores, spec, sparsity=None):
    """The mask of one leaf, layer by layer."""
    mask = np.zeros(scores.shape, bool)
    for layer, out in zip(layers(scores, spec), layers(mask, spec), strict=True):
        layer = np.asarray(layer, np.float64)
        if isinstance(spec.pattern, sj.NM):
            groups = labels(layer.shape, spec, "group")
            for group in range(groups.max() + 1):
                out |= top(layer, spec.pattern.n, groups == group)
        else:
            units = labels(layer.shape, spec)
            pooled = np.bincount(units.ravel(), layer.ravel())
            out[...] = top(pooled, num_kept(sparsity, pooled.size))[units]
    return mask


def drop_and_grow(mask, spec, drop_scores, grow_scores, fraction):
    """SET and RigL: the weakest kept units of each layer are replaced."""
    new = np.zeros(mask.shape, bool)
    for old, drop, grow, out in zip(
        *(layers(a, spec) for a in (mask, drop_scores, grow_scores, new)), strict=True
    ):
        units = labels(old.shape, spec)
        active = np.bincount(units.ravel(), old.ravel()) > 0
        drop, grow = (
            np.bincount(units.ravel(), np.asarray(s, np.float64).ravel())
            for s in (drop, grow)
        )
        replaced = int(fraction * active.sum() + 1e-6)
        keep = top(drop, active.sum() - replaced, active)
        if isinstance(spec.pattern, sj.NM):
            grown = np.zeros_like(keep)
            groups = np.zeros_like(units.ravel())
            groups[units.ravel()] = labels(old.shape, spec, "group").ravel()
            for group in range(groups.max() + 1):
                free = spec.pattern.n - (keep & (groups == group)).sum()
                grown |= top(grow, free, ~keep & (groups == group))
        else:
            grown = top(grow, replaced, ~keep)
        out[...] = (keep | grown)[units]
    return new


def assert_pattern(mask, spec, sparsity=None):
    """Exact counts, whole units, N of every M."""
    assert mask.dtype == bool
    for layer in layers(mask, spec):
        if isinstance(spec.pattern, sj.NM):
            groups = labels(layer.shape, spec, "group").ravel()
            assert (np.bincount(groups, layer.ravel()) == spec.pattern.n).all()
        else:
            units = labels(layer.shape, spec)
            density = np.bincount(units.ravel(), layer.ravel()) / np.bincount(
                units.ravel()
            )
            assert set(density) <= {0.0, 1.0}
            assert density.sum() == num_kept(sparsity, density.size)


# ----------------------------------------------------------- allocation and schedules


def erk(shapes, sparsity, sizes=None):
    """Sparsities by the fixed point of Evci et al., 2020: full leaves are dense."""
    density = 1 - sparsity
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = sizes or {name: math.prod(shape) for name, shape in shapes.items()}
    dense = set()
    while True:
        free = [name for name in shapes if name not in dense]
        rhs = sum(density * sizes[name] for name in free)
        rhs -= sum((1 - density) * sizes[name] for name in dense)
        scale = rhs / sum(raw[name] * sizes[name] for name in free)
        highest = max(raw[name] for name in free)
        if highest * scale <= 1:
            break
        dense |= {name for name in free if raw[name] == highest}
    return {name: 0 if name in dense else 1 - scale * raw[name] for name in shapes}


def cubic(step, final, begin, end):
    progress = min(max((step - begin) / (end - begin), 0), 1)
    return final + (0 - final) * (1 - progress) ** 3


def cosine_fraction(step, alpha, stop_step):
    return alpha / 2 * (1 + math.cos(math.pi * step / stop_step))


# ------------------------------------------------------------------------ optimizers


class Sgd:
    """Momentum as optax spells it: `trace = g + momentum * trace`."""

    def __init__(self, lr, momentum=0.0):
        self.lr, self.momentum = lr, momentum
        self.optax = optax.sgd(lr, momentum or None)

    def init(self, params):
        self.moments = {"trace": {k: np.zeros(p.shape) for k, p in params.items()}}
        self.count = 0

    def update(self, grads, params):
        trace = self.moments["trace"]
        for name, grad in grads.items():
            trace[name] = grad + self.momentum * trace[name]
        return {name: -self.lr * trace[name] for name in grads}


class AdamW:
    """Adam with decoupled weight decay; `decay=0` is Adam."""

    def __init__(self, lr, b1=0.9, b2=0.99, eps=1e-8, decay=0.1):
        self.lr, self.b1, self.b2, self.eps, self.decay = lr, b1, b2, eps, decay
        self.optax = optax.adamw(lr, b1, b2, eps, weight_decay=decay)

    def init(self, params):
        self.moments = {
            slot: {k: np.zeros(p.shape) for k, p in params.items()}
            for slot in ("mu", "nu")
        }
        self.count = 0

    def update(self, grads, params):
        self.count += 1
        mu, nu = self.moments["mu"], self.moments["nu"]
        updates = {}
        for name, grad in grads.items():
            mu[name] = self.b1 * mu[name] + (1 - self.b1) * grad
            nu[name] = self.b2 * nu[name] + (1 - self.b2) * grad**2
            step = mu[name] / (1 - self.b1**self.count)
            step = step / (np.sqrt(nu[name] / (1 - self.b2**self.count)) + self.eps)
            updates[name] = -self.lr * (step + self.decay * params[name])
        return updates


def forget_pruned(inner, masks):
    """Pruned weights have first moments, 0 here; so regrown ones begin with them."""
    for slot in inner.moments.values():
        for name, mask in masks.items():
            slot[name] = np.where(mask, slot[name], 0.0)


def momentum():
    return Sgd(0.1, 0.9)


def plain():
    return Sgd(0.25)


def adamw():
    return AdamW(0.02)


# -------------------------------------------------------- the problem and the loop

# Hundreds of small programs run once each: compiling fast matters, running does not.
_COMPILER = {"xla_backend_optimization_level": 0}


def jit(fn, **kwargs):
    return jax.jit(fn, compiler_options=_COMPILER, **kwargs)


def init(tx, params):
    return jit(tx.init)(params)


def forward_of(state, params):
    return flat(jit(sj.forward_params)(state, params))


def final_of(state, params):
    return flat(jit(sj.sparse_params)(state, params))


def first_masks(tx, params):
    """The masks of `init`, flat."""
    return flat(jit(lambda p: sj.masks_of(tx.init(p)))(params))


@dataclasses.dataclass
class Problem:
    """`sum(curvature / 2 * w^2 - target * w)`, anew at each step, over a small tree.

    With `ties` all numbers are multiples of 1/4 and the gradient takes three values:
    arithmetic is exact and almost every ranking meets ties.
    """

    steps: int = 24
    seed: int = 0
    ties: bool = False

    SHAPES = {  # noqa: RUF012
        "dense": {"kernel": (8, 6), "bias": (6,)},
        "embed": {"embedding": (5, 4)},
        "stack": {"kernel": (3, 8, 4)},
    }
    STACKED = {"dense": 0, "embed": 0, "stack": 1}  # noqa: RUF012

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        is_shape = dict(is_leaf=lambda s: isinstance(s, tuple))

        def draw(make):
            return jax.tree.map(
                lambda s: make(s).astype(np.float32), self.SHAPES, **is_shape
            )

        if self.ties:
            # powers of 1/4 around 0, no zero: a 0 is a pruned weight
            self.params = draw(lambda s: rng.choice([-0.5, -0.25, 0.25, 0.5], s))
            steps = [
                (draw(np.zeros), draw(lambda s: rng.choice([-1.0, 0.0, 1.0], s)))
                for _ in range(self.steps)
            ]
        else:
            self.params = draw(rng.standard_normal)
            steps = [
                (draw(lambda s: rng.uniform(0.2, 1.5, s)), draw(rng.standard_normal))
                for _ in range(self.steps)
            ]
        self.stream = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)

    def grad(self, step, forward):
        """The gradient at the forward params, of every leaf, in NumPy."""
        curvature, target = (wide(tree) for tree in self.stream)
        return {
            name: curvature[name][step] * weight - target[name][step]
            for name, weight in forward.items()
        }

    def specs(self, pattern):
        """The governed leaves."""
        return {"dense/kernel": Spec(pattern, 0), "stack/kernel": Spec(pattern, 1)}


def loss_fn(params, example):
    curvature, target = example
    terms = jax.tree.map(
        lambda w, c, t: (c / 2 * w**2 - t * w).sum(), params, curvature, target
    )
    return sum(jax.tree.leaves(terms))


def train_step(tx, params, opt_state, example):
    """One step of the loop of a user."""
    grads = jax.grad(lambda p: loss_fn(sj.forward_params(opt_state, p), example))(
        params
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(tx, problem, params=None):
    """Runs the loop by `lax.scan`; returns one (params, opt_state) a step, in NumPy."""
    params = problem.params if params is None else params

    def body(carry, example):
        carry = train_step(tx, *carry, example)
        return carry, carry

    @jit
    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), problem.stream)[1]

    history = jax.device_get(run(params))
    return [jax.tree.map(lambda x, i=i: x[i], history) for i in range(problem.steps)]


def train_inner(inner, problem, params=None):
    """The same with the bare optimizer; returns the params of each step."""
    params = problem.params if params is None else params

    def body(carry, example):
        params, state = carry
        grads = jax.grad(loss_fn)(params, example)
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jit
    def run(params):
        return jax.lax.scan(body, (params, inner.init(params)), problem.stream)[1]

    history = jax.device_get(run(params))
    return [jax.tree.map(lambda x, i=i: x[i], history) for i in range(problem.steps)]


def assert_equal_run(got, want, rtol=2e-5, atol=2e-6, moments=True):
    """Params, masks and moments of each step against an oracle's.

    Args:
      got: from `train`.
      want: yields (params, masks, inner) a step, the last an oracle's optimizer.
    """
    num = 0
    for step, (params, masks, inner) in enumerate(want):
        got_params, opt_state = got[step]
        got_masks = flat(sj.masks_of(opt_state))
        assert got_masks.keys() == masks.keys()
        for name, mask in masks.items():
            np.testing.assert_array_equal(
                got_masks[name], mask, f"mask of {name} at step {step}"
            )
        assert_close(wide(got_params), params, rtol, atol, f"params at step {step}")
        if moments and inner is not None:
            for slot, want_slot in inner.moments.items():
                if slot == "trace" and not inner.momentum:
                    continue
                found = optax.tree.get(opt_state, slot)
                assert_close(wide(found), want_slot, rtol, atol, f"{slot} at {step}")
            count = optax.tree.get(opt_state, "count", None)
            assert count is None or int(count) == inner.count, f"count at step {step}"
        num += 1
    assert num == len(got)


def assert_close(got, want, rtol, atol, message):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(
            got[name], want[name], rtol=rtol, atol=atol, err_msg=f"{message}, {name}"
        )


def masked(params, masks):
    """Exact zeros outside the masks."""
    return {
        name: np.where(masks[name], p, 0.0) if name in masks else p
        for name, p in params.items()
    }


def hard_step(problem, step, params, masks, inner):
    """Masked forward, dense gradient, masked gradient to the optimizer, exact zeros."""
    grads = problem.grad(step, masked(params, masks))
    updates = inner.update(masked(grads, masks), params)
    params = {name: p + updates[name] for name, p in params.items()}
    return masked(params, masks), grads


def leaves_like(problem, found):
    """A flat dict as a tree of the params' structure, None where it has no entry."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(problem.params)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
    return treedef.unflatten([found.get(name) for name in names])
