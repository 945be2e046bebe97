"""Generated hostile and odd input, and what must hold of every case.

A case either works, and then its counts and shapes are exact, or raises a documented
error: from a line of sparsejax, naming the leaf or the argument.
Whether it must raise is computed here, from the rules in the docstrings. Shapes and
arguments are only traced, never compiled; values run on a few shapes, compiled once.
Shared by `test_hostile.py` and `benchmarks/fuzz.py`.
"""

import dataclasses
import functools
import re
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparsejax as sj
from sparsejax import masks
from sparsejax.patterns import Leaf
from tests.conformance import suite
from tests.masks import oracle

FLOATING = ("float32", "bfloat16", "float16", "float8_e4m3fn")
DTYPES = (*FLOATING, "int32", "uint8", "bool", "complex64")
NAMES = ("kernel", "bias", "scale", "embedding", "w", "conv")
DENSE_NAMES = ("bias", "scale", "embedding")


# an argument, or a leaf: ['a'], [0], .kernel, the root
NAMED = re.compile(r"`\w|\[['\d]|(at|leaf) (\.\w|the root)")


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    weight: Any
    rest: Any


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the documented error that it raised.

    Raises:
      AssertionError: for any other error.
    """
    try:
        return call()
    except (ValueError, TypeError, NotImplementedError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        message = str(error)
        documented = "/sparsejax/" in raised_in and NAMED.search(message)
        assert documented, f"{type(error).__name__} from {raised_in}: {message}"
        return error


# ---------------------------------------------------------------- trees and shapes

sizes = st.sampled_from([1, 4, 8, 2, 3, 0, 5, 7, 12, 16])
shapes = st.lists(sizes, max_size=5).map(tuple)
arrays = st.builds(jax.ShapeDtypeStruct, shapes, st.sampled_from(DTYPES).map(jnp.dtype))
usual = st.builds(
    jax.ShapeDtypeStruct,
    st.sampled_from([(8, 4), (4, 8), (16, 8), (2, 8, 4), (8,), (3, 3, 4, 8)]),
    st.sampled_from(FLOATING[:2]).map(jnp.dtype),
)
MATRIX = jax.ShapeDtypeStruct((8, 4), jnp.float32)
empty = st.sampled_from([None, {}, (), [], optax.MaskedNode()])


def trees(leaves: st.SearchStrategy) -> st.SearchStrategy:
    """Containers of every kind around leaves, a leaf alone included."""

    def around(inner):
        return st.one_of(
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=2).map(tuple),
            st.builds(Pair, inner, inner),
            st.builds(Node, inner, inner),
        )

    return st.recursive(leaves, around, max_leaves=5)


usual_trees = trees(usual).map(lambda tree: {"rest": tree, "kernel": MATRIX})
params_trees = trees(st.one_of(usual, usual, arrays, empty))
patterns = st.one_of(
    st.just(sj.Unstructured()),
    st.builds(
        lambda n, rest, axis: sj.NM(n, n + rest, axis),
        st.integers(1, 4),
        st.integers(0, 12),
        st.sampled_from([-2, -1, 0, 1, -3, 4]),
    ),
    st.just(sj.NM(2, 4)),
    st.builds(sj.Block, st.lists(st.integers(1, 8), min_size=1, max_size=3)),
    st.just(sj.Block((4, 4))),
    st.builds(sj.Channel, st.integers(-3, 3)),
)
usual_patterns = st.sampled_from(
    [
        sj.Unstructured(),
        sj.NM(1, 2, axis=-1),
        sj.NM(2, 4, axis=-1),
        sj.Block((2, 4)),
        sj.Channel(),
        sj.Channel(-2),
    ]
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Params and options of `init`."""

    method: str
    params: Any
    pattern: Any
    sparsity: float | None
    stacked: int
    everywhere: bool  # `where` chooses every array; else the default
    pack_masks: bool

    def make(self) -> optax.GradientTransformation:
        where = (lambda path, leaf: True) if self.everywhere else None
        options = {
            "pattern": self.pattern,
            "stacked": self.stacked,
            "where": where,
            "pack_masks": self.pack_masks,
        }
        inner, every = optax.adam(1e-3), {"update_every": 2, "stop_step": 9}
        match self.method:
            case "static_sparse":
                return sj.static_sparse(inner, self.sparsity, key=suite.KEY, **options)
            case "magnitude_prune":
                return sj.magnitude_prune(inner, self.sparsity, **options)
            case "sparse_evolution" | "rigl":
                method = getattr(sj, self.method)
                return method(inner, self.sparsity, key=suite.KEY, **every, **options)
            case "sr_ste":
                return sj.sr_ste(inner, sparsity=self.sparsity, **options)
            case "mask_decay":
                return sj.mask_decay(inner, 0.5, sparsity=self.sparsity, **options)
            case "structure_decay":
                frames = [options.pop("pattern")]
                return sj.structure_decay(
                    inner, frames, [1], sparsity=self.sparsity, **options
                )
            case _:
                return sj.adams(1e-3, 9, 1e-3, sparsity=self.sparsity, **options)


@st.composite
def init_cases(draw, params: st.SearchStrategy = params_trees) -> Case:
    """About half of them suit; the others are wrong in one or several ways."""
    odd = draw(st.booleans())
    pattern = draw(patterns if odd else usual_patterns)
    given = st.none() if isinstance(pattern, sj.NM) else st.floats(0, 0.999)
    wrong = st.one_of(st.none(), st.just(0.5), st.floats(-1, 200))
    return Case(
        method=draw(st.sampled_from(list(suite.METHODS))),
        params=draw(params if odd else usual_trees),
        pattern=pattern,
        sparsity=draw(st.one_of(given, wrong) if odd else given),
        stacked=draw(st.sampled_from([0, 0, 0, 1, 2, 3])) if odd else 0,
        everywhere=draw(st.booleans()) and odd,
        pack_masks=draw(st.booleans()),
    )


def is_governed(case: Case, path: tuple, leaf: Any) -> bool:
    """The rule of `where`, written anew."""
    if leaf is None:
        return False
    if case.everywhere:
        return True
    last = re.findall(r"\w+", jax.tree_util.keystr(path[-1:]) if path else "")
    return (
        jnp.issubdtype(leaf.dtype, jnp.floating)
        and leaf.ndim - case.stacked >= 2
        and (not last or last[-1] not in DENSE_NAMES)
    )


def _is_called_conv(path: tuple) -> bool:
    """Whether the leaf, or the node that owns it, is called so; lists have no name."""
    words = re.findall(r"\w+", jax.tree_util.keystr(path))
    while len(words) > 1 and words[-2].isdigit():
        del words[-2]
    return "conv" in "/".join(words[-2:])


def suits(case: Case, path: tuple, leaf: Any) -> bool:
    """Whether the pattern, stacked axes and dtype fit a leaf, written anew."""
    pattern, shape, stacked = case.pattern, leaf.shape, case.stacked
    own = len(shape) - stacked
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or own < 0:
        return False
    if case.method == "adams" and leaf.dtype.itemsize < 4:
        return False
    if case.pack_masks and not shape:
        return False
    if isinstance(pattern, sj.NM | sj.Channel):
        axis = pattern.axis + (len(shape) if pattern.axis < 0 else 0)
        if not stacked <= axis < len(shape):
            return False
        if isinstance(pattern, sj.Channel):
            return True
        convolution = own >= 4 or _is_called_conv(path)
        ambiguous = pattern.axis == -2 and own > 2 and not convolution
        return not ambiguous and shape[axis] % pattern.m == 0
    if isinstance(pattern, sj.Block):
        blocks = pattern.shape
        last = shape[len(shape) - len(blocks) :]
        return len(blocks) <= own and not any(
            size % block for size, block in zip(last, blocks, strict=True)
        )
    return True


def must_raise(case: Case) -> bool:
    sparsity, is_nm = case.sparsity, isinstance(case.pattern, sj.NM)
    if sparsity is None and not is_nm:
        return True
    if sparsity is not None and not 0 <= sparsity < 1:
        return True
    if is_nm and sparsity is not None:
        if abs(sparsity - (1 - case.pattern.n / case.pattern.m)) > 1e-6:
            return True
    flat = jax.tree_util.tree_flatten_with_path(case.params)[0]
    own = [(path, leaf) for path, leaf in flat if is_governed(case, path, leaf)]
    return not own or not all(suits(case, path, leaf) for path, leaf in own)


def check_init(case: Case, *, update: bool = False) -> str:
    """`init`, traced, and one update of what it returns.

    Returns:
      "accepted" or "refused".
    """
    got = outcome(lambda: jax.eval_shape(case.make().init, case.params))
    raised = isinstance(got, Exception)
    assert raised == must_raise(case), got
    if raised:
        return "refused"
    state = suite.find_state(got)
    none = {"is_leaf": lambda leaf: leaf is None}
    flat, treedef = jax.tree_util.tree_flatten_with_path(case.params, **none)
    stored, masks_def = jax.tree.flatten(state.masks, **none)
    assert masks_def == treedef
    for (path, leaf), mask in zip(flat, stored, strict=True):
        assert (mask is not None) == is_governed(case, path, leaf)
        if mask is not None:
            lead, last = leaf.shape[:-1], leaf.shape[-1:]
            packed = tuple(-(-size // 8) for size in last)
            wanted = (lead + packed, "uint8") if case.pack_masks else (leaf.shape, bool)
            assert (mask.shape, mask.dtype) == wanted
    if update and not any(_is_8_bit(leaf) for _, leaf in flat):
        tx = case.make()
        grads = jax.tree.map(lambda p: p, case.params)
        updates, after = jax.eval_shape(tx.update, grads, got, case.params)
        assert suite.spec(after) == suite.spec(got)
        for a, b in zip(
            jax.tree.leaves(updates), jax.tree.leaves(case.params), strict=True
        ):
            assert a.shape == b.shape
        for read in (sj.forward_params, sj.sparse_params):
            seen = jax.eval_shape(read, got, case.params)
            assert suite.spec(seen) == suite.spec(case.params)
    return "accepted"


def _is_8_bit(leaf: Any) -> bool:
    """8-bit floats get masks, but no optimizer: they do not promote."""
    return leaf is not None and leaf.dtype == jnp.float8_e4m3fn


# ---------------------------------------------------------------- other trees later

_FIRST = {"a": MATRIX, "b": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
near = st.fixed_dictionaries({"a": usual, "b": usual})
later = st.one_of(st.just(_FIRST), st.just(_FIRST), near, params_trees)
later_cases = st.tuples(st.sampled_from(list(suite.METHODS)), later, later)


@functools.cache
def _initialised(method: str) -> tuple[Any, Any]:
    tx = suite.build(method, optax.sgd(1e-3), pattern=suite.two_four)
    return tx, jax.eval_shape(tx.init, _FIRST)


def check_later(case: tuple[str, Any, Any]) -> str:
    """Params and gradients of other trees than those of `init`."""
    method, params, grads = case
    tx, state = _initialised(method)

    def fits(tree, *, in_front):
        """Leaf for leaf the shapes of `init`, or those behind some axes in front."""
        leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
        wanted = [leaf.shape for leaf in jax.tree.leaves(_FIRST)]
        if len(leaves) != len(wanted) or any(leaf is None for leaf in leaves):
            return False
        return all(
            leaf.shape == shape or (in_front and leaf.shape[-len(shape) :] == shape)
            for leaf, shape in zip(leaves, wanted, strict=True)
        )

    # masks with axes in front are those of a mapped run
    readable = fits(params, in_front=method in suite.HARD)
    got = outcome(lambda: jax.eval_shape(sj.forward_params, state, params))
    assert isinstance(got, Exception) != readable, got
    if fits(params, in_front=False) and fits(grads, in_front=True):
        return "accepted"
    got = outcome(lambda: jax.eval_shape(tx.update, grads, state, params))
    assert isinstance(got, Exception), case
    return "refused"


# ---------------------------------------------------------------- arguments

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 200),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(
        [object, sj.NM, np.ones(2), np.float32(0.5), 1j, ..., {}, {"x": 1}]
    ),
)
_KERNEL = {"kernel": MATRIX}


def _usual_arguments(method: str) -> dict[str, Any]:
    """Arguments with which a method works on `_KERNEL`."""
    inner = {} if method == "adams" else {"inner": optax.adam(1e-3)}
    own: dict[str, dict[str, Any]] = {
        "static_sparse": {"key": suite.KEY, "masks": None},
        "magnitude_prune": {"update_every": 2},
        "sparse_evolution": {"update_every": 2, "stop_step": 9, "key": suite.KEY},
        "sr_ste": {"decay": 1e-2},
        "mask_decay": {"decay": 0.5},
        "structure_decay": {"patterns": [sj.NM(2, 4)], "boundaries": [1]},
        "adams": {"total_steps": 9, "l1_decay": 1e-3, "mask_period": 2},
    }
    own["sparse_evolution"]["drop_fraction"] = 0.3
    own["rigl"] = own["sparse_evolution"]
    if method != "structure_decay":
        own[method]["pattern"] = sj.NM(2, 4)
    if method == "adams":
        own[method]["learning_rate"] = 1e-3
    shared = {"where": None, "stacked": 0, "sparsity": None, "allocation": sj.uniform}
    return inner | own[method] | shared


@st.composite
def argument_cases(draw) -> tuple[str, str, Any]:
    """(method, argument, the object given for it)."""
    method = draw(st.sampled_from(list(suite.METHODS)))
    names = sorted(set(_usual_arguments(method)) - {"learning_rate"})  # optax's own
    return method, draw(st.sampled_from(names)), draw(junk)


def check_argument(case: tuple[str, str, Any]) -> str:
    """One argument of a method is replaced by any object."""
    method, name, value = case

    def run():
        tx = getattr(sj, method)(**_usual_arguments(method) | {name: value})
        state = jax.eval_shape(tx.init, _KERNEL)
        return jax.eval_shape(tx.update, _KERNEL, state, _KERNEL)

    return "refused" if isinstance(outcome(run), Exception) else "accepted"


# ---------------------------------------------------------------- values

# (shape, pattern, stacked); the first few run in CI
VALUE_SHAPES = [
    ((7, 5), sj.Unstructured(), 0),
    ((8, 6), sj.NM(2, 4), 0),
    ((4, 6), sj.Block((2, 3)), 0),
    ((3, 8, 2), sj.Channel(-2), 1),
    ((0, 4), sj.Unstructured(), 0),
    ((1, 1), sj.Unstructured(), 0),
    ((1,), sj.Unstructured(), 0),
    ((2, 3, 1, 2, 3), sj.Unstructured(), 0),
    ((2, 3, 2, 4), sj.Unstructured(), 2),
    ((0, 4, 2), sj.Unstructured(), 1),
    ((2, 4, 4, 4, 2), sj.NM(3, 4), 0),
    ((32, 3), sj.NM(5, 32), 0),
    ((3, 20), sj.NM(1, 20, axis=-1), 0),
    ((0, 4), sj.NM(2, 4), 0),
    ((12, 1), sj.NM(12, 12), 0),
    ((2, 4, 4), sj.Block((4, 2)), 1),
    ((5,), sj.Block((1,)), 0),
    ((6, 0), sj.Block((3, 2)), 0),
    ((1, 9), sj.Channel(-1), 0),
    ((4, 3, 2), sj.Channel(0), 0),
]
VALUE_DTYPES = ("float32", "bfloat16", "float16")


@st.composite
def value_cases(draw, shapes=VALUE_SHAPES, dtypes=VALUE_DTYPES):
    """(shape, pattern, stacked), scores and a sparsity."""
    entry = draw(st.sampled_from(shapes))
    dtype = jnp.dtype(draw(st.sampled_from(dtypes)))
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    bits = draw(hnp.arrays(unsigned, entry[0]))  # any float, NaNs and denormals too
    scores = bits.view(dtype)
    few = draw(st.sampled_from([None, [0.0, -0.0], [1.0, 2.0], [np.inf, np.nan, 0.0]]))
    if few is not None:
        scores = np.asarray(few, dtype)[bits % len(few)]
    return entry, scores, draw(st.floats(0, 1, exclude_max=True, width=32))


@functools.cache
def _select(entry: tuple, dtype: str) -> Callable:
    shape, pattern, stacked = entry
    leaf = Leaf("scores", shape, pattern, stacked)
    return suite.fast_jit(lambda s, sparsity: masks.select(s, leaf, sparsity))


def ranks_of(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of floats as whole numbers, and which of them are subnormal.

    By their bits: NumPy flushes subnormals too once XLA has set the CPU's mode. -inf
    and NaN stay what they are.
    """
    width = 8 * scores.dtype.itemsize
    bits = scores.view(f"uint{width}").astype(np.int64)
    size = bits & (2 ** (width - 1) - 1)
    ranks = np.where(bits == size, size, -size).astype(np.float64)
    special = np.isnan(scores) | (scores == -np.inf)
    mantissa = jnp.finfo(scores.dtype).nmant
    return np.where(special, scores, ranks), (size > 0) & (size >> mantissa == 0)


def check_values(case: tuple) -> str:
    """The masks of any scores: exact counts, whole units, the highest kept."""
    entry, scores, sparsity = case
    shape, pattern, stacked = entry
    got = np.asarray(_select(entry, str(scores.dtype))(scores, sparsity))
    assert got.dtype == bool and got.shape == shape
    ranks, subnormal = ranks_of(scores)
    if isinstance(pattern, sj.NM):
        n, m, axis = pattern.n, pattern.m, pattern.axis
        groups = got.reshape(-1)[oracle.groups(shape, m, axis)]
        assert (groups.sum(axis=1) == n).all()
        if not subnormal.any():  # a CPU compares these as zeros
            np.testing.assert_array_equal(got, oracle.nm(ranks, n, m, axis))
        return "accepted"
    kind = None
    if isinstance(pattern, sj.Block):
        kind = ("block", pattern.shape)
    elif isinstance(pattern, sj.Channel):
        kind = ("channel", pattern.axis - stacked * (pattern.axis >= 0))
    for index in np.ndindex(shape[:stacked]):
        layer, mask = ranks[index], got[index]
        units = oracle.units(layer.shape, kind)
        size = len(units)
        kept = max(
            size - int(np.round(np.float32(sparsity) * np.float32(size))), min(size, 1)
        )
        chosen = [bool(mask[unit].all()) for unit in units]
        assert chosen == [bool(mask[unit].any()) for unit in units]
        assert sum(chosen) == kept
        if kind is None:
            np.testing.assert_array_equal(mask, oracle.topk(layer, kept))
    return "accepted"


KINDS: dict[str, tuple[Callable, Callable]] = {
    "trees, shapes and options of init": (init_cases, check_init),
    "init, one update and what is read": (
        init_cases,
        functools.partial(check_init, update=True),
    ),
    "other trees at update than at init": (lambda: later_cases, check_later),
    "any object as an argument": (argument_cases, check_argument),
    "any bits as scores": (value_cases, check_values),
}
