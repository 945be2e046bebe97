"""How fast does a decoding query read a sixteenth of a long cache, against all of it?

One query a sequence, pages of 128 keys, random ones listed for each key head. Dense
attention over the whole cache is computed by XLA in the ways that it has; the best one
counts. Choosing the pages by Quest's bounds is timed alone, and together with the
attention to those chosen. Layers with caches of their own, so that no cache of the
device holds them, come one after the other in a loop, as decoding takes them; the query
of a layer is that of the one before and what it got, one more small program a layer,
for dense ones too.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks.parts import common, timing

TOKENS = 4  # through all layers, in a program


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache, and which share of its pages is read."""

    length: int
    kept: float
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    layers: int = 16
    dtype: str = "bfloat16"


CASES = [
    *(Case(65536, kept) for kept in (0.25, 0.125, 0.0625, 0.03125)),
    Case(16384, 0.0625),
    Case(65536, 0.0625, batch=4, layers=4),
    Case(65536, 0.0625, heads=8),
]
QUICK = [Case(1024, 0.25, 1, 4, 2, 16, 64, 2, "float32")]


def dense_forms(case: Case) -> dict[str, Callable]:
    """Ways to attend to the whole cache."""

    def grouped(q, k, v):
        q = q.reshape(case.batch, case.kv_heads, -1, case.head_dim)
        scores = jnp.einsum("bhgd,bkhd->bhgk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * case.head_dim**-0.5).astype(v.dtype)
        out = jnp.einsum("bhgk,bkhd->bhgd", weights, v)
        return out.reshape(case.batch, 1, case.heads, case.head_dim)

    forms = {"XLA": jax.nn.dot_product_attention, "XLA, grouped": grouped}
    if jax.default_backend() == "gpu":
        forms["cuDNN"] = functools.partial(
            jax.nn.dot_product_attention, implementation="cudnn"
        )
    return forms


def make_layers(case: Case) -> list[tuple[jax.Array, ...]]:
    """The query, the keys and the values of each layer."""
    keys = jax.random.split(jax.random.key(0), 3)
    lead = (case.layers, case.batch)
    q = jax.random.normal(keys[0], (*lead, 1, case.heads, case.head_dim))
    k, v = (
        jax.random.normal(key, (*lead, case.length, case.kv_heads, case.head_dim))
        for key in keys[1:]
    )
    return [tuple(a[i].astype(case.dtype) for a in (q, k, v)) for i in range(lead[0])]


def make_lists(case: Case) -> sj.formats.KeyLists:
    """Random pages, for each key head of each sequence."""
    pages = case.length // case.page_size
    rng, num_kept = np.random.default_rng(0), round(case.kept * pages)
    shape = (case.batch, case.kv_heads, pages)
    kept = rng.permuted(np.broadcast_to(np.arange(pages) < num_kept, shape), axis=-1)
    return sj.formats.KeyLists.from_mask(
        jnp.asarray(kept), page_size=case.page_size, capacity=num_kept
    )


def loop(fn: Callable, query: jax.Array, layers: list) -> Callable[[], jax.Array]:
    """A program of some tokens through all layers.

    Args:
      fn: takes a query and what a layer has; gives its output, or lists.
      query: of the first layer.
      layers: a tuple for each.
    """

    def layer(query, *has):
        out = fn(query, *has)
        if isinstance(out, sj.formats.KeyLists):
            never = jnp.any(out.num < 0) | jnp.any(out.indices < 0)
            out = jnp.where(never, jnp.inf, query)  # so that they are computed
        return ((query + out) * 0.5**0.5).astype(query.dtype)

    return functools.partial(timing.in_a_loop(layer, tokens=TOKENS), query, layers)


def run(case: Case, repeats: int) -> dict:
    """Checks, then times one case; times are of one layer."""
    layers, lists = make_layers(case), make_lists(case)
    bounds = [
        sj.attention.page_bounds(key, page_size=case.page_size) for _, key, _ in layers
    ]
    num_kept = max(lists.indices.shape[-1] - 1, 1)  # and the page of the query

    def read(implementation, q, k, v, lists):
        return sj.ops.listed_attention(
            q, k, v, lists, case.length, implementation=implementation
        )

    def select(q, bounds):
        return sj.attention.quest(q, bounds, num_kept=num_kept)

    names = {"gather": "reference"}
    if jax.default_backend() == "gpu":
        names["kernel"] = "mosaic_gpu"
    ways = {name: functools.partial(read, by) for name, by in names.items()}
    together = {
        f"select, {name}": lambda q, k, v, bounds, way=way: way(
            q, k, v, select(q, bounds)
        )
        for name, way in ways.items()
    }
    dense = dense_forms(case)
    caches = [(k, v) for _, k, v in layers]
    with_bounds = [(*cache, b) for cache, b in zip(caches, bounds, strict=True)]
    given = {name: [(*cache, lists) for cache in caches] for name in ways}
    given |= {name: with_bounds for name in together}
    given |= {name: caches for name in dense} | {"select": [(b,) for b in bounds]}
    fns = ways | together | dense | {"select": select}

    query = layers[0][0]
    for forms in (ways, together, dense):
        first, *others = (jax.jit(fn)(query, *given[n][0]) for n, fn in forms.items())
        assert all(common.relative_error(a, first) < 0.01 for a in others), case
    want = ways["gather"](query, *given["gather"][0])
    error = max(
        common.relative_error(fn(query, *given[name][0]), want)
        for name, fn in ways.items()
    )
    loops = {name: loop(fn, query, given[name]) for name, fn in fns.items()}
    timing.warm_up(loops.values())
    times = timing.time_in_turn(
        loops,
        repeats=repeats,
        units=TOKENS * case.layers,
    )

    def best_of(fns):
        return min(times[name].ms for name in fns)

    best, best_dense = best_of(ways), best_of(dense)
    item = jnp.dtype(case.dtype).itemsize
    bytes_read = 2 * case.batch * case.kv_heads * case.head_dim * case.length * item
    return dataclasses.asdict(case) | {
        **{f"{name}_ms": time.ms for name, time in times.items()},
        "iqr_ms": max(times[name].iqr_ms for name in ways),
        "speedup": best_dense / best,
        "with_selection": best_dense / best_of(together),
        "ideal": 1 / case.kept,
        "gb_per_s": bytes_read * case.kept / best / 1e6,
        "dense_gb_per_s": bytes_read / best_dense / 1e6,
        "error": error,
    }


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=15, argv=argv)
    rows = (run(case, args.repeats) for case in (QUICK if args.quick else CASES))
    common.report(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()
