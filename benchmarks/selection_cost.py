"""Does choosing what to attend to cost less than it saves, on a long prompt?

Each selector of a prefill chooses a tenth of random queries and keys, and attention by
the fastest kernel reads what it chose; dense causal attention, by cuDNN on a GPU, reads
all. A prefill runs both as one program, timed as `together`; selection costs, lists
included, what that takes beyond attention alone to what is chosen already. A program of
the selection alone would also build the lists by column, which only a backward reads.
What FlexPrefill and vertical-slash keep of random tokens says nothing of their budgets,
so the density is measured. Queries and keys are taken as rotated; SeerAttention's gate,
of random weights, pools them. PSA has blocks of 512 keys, so that those of its pooled
levels are whole tiles; a sixteenth of the scores, which ranks its blocks, is alone
two fifths of the arithmetic of attention to a tenth, a sixty-fourth a tenth.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.parts import common, sparse_selectors, sparse_walks, timing
from benchmarks.parts.sparse_selectors import Seen
from sparsejax import attention
from sparsejax.formats import BlockMask

CHECKED = 1024  # first tokens, compared with the reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and one sequence."""

    seq: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 128
    psa_width: int = 512
    density: float = 0.1
    dtype: str = "bfloat16"


CASES = [Case(32768), Case(8192)]
QUICK = [Case(256, 2, 1, 16, 32, 64, 0.5, "float32")]
NAMES = (
    "topk_blocks",
    "statistical_topk_blocks",
    "block_sparse",
    "vertical_slash",
    "flex_prefill",
    "seer",
    "psa",
    "psa, stride 64",
)
QUICK_NAMES = ("topk_blocks", "seer", "psa")


def selector(case: Case, name: str) -> Callable[[jax.Array, jax.Array], Any]:
    """From queries and keys to a mask, or to PSA's levels of blocks."""
    blocks = case.seq // case.block
    gate = attention.init_seer_gate(
        case.heads,
        case.kv_heads,
        case.head_dim,
        d_gate=case.head_dim,
        key=jax.random.key(1),
    )

    def select(query, key):
        unknown = jnp.zeros((1, case.heads, blocks, blocks))  # only its shape is read
        seen = Seen(query, key, unknown)
        if name == "seer":
            rotate = lambda x, positions: x  # noqa: E731
            scores = attention.seer_scores(
                gate, query, key, block=case.block, rotate=rotate
            )
            seen = seen._replace(gate=scores)
        if name.startswith("psa"):
            stride = 64 if name.endswith("64") else 16
            return sparse_selectors.psa(seen, case.density, case.psa_width, stride)
        return getattr(sparse_selectors, name)(seen, case.density)

    return select


def head_of(case: Case, chosen: Any) -> Any:
    """What was chosen for the first `CHECKED` tokens."""
    tokens = min(CHECKED, case.seq)
    if not isinstance(chosen, BlockMask):
        return chosen[..., : tokens // case.block, : tokens // case.psa_width]
    blocks = tokens // case.block
    kept = chosen.to_blocks()[..., :blocks, :blocks]
    return BlockMask.from_blocks(kept, chosen.block_shape)


def run(case: Case, names: Sequence[str], repeats: int) -> Iterator[dict]:
    """A row for each selector."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    query, key, value = (
        jax.random.normal(k, (1, case.seq, n, case.head_dim)).astype(case.dtype)
        for k, n in zip(keys, heads, strict=True)
    )
    library = "cudnn" if jax.default_backend() == "gpu" else None
    dense = functools.partial(
        jax.jit(
            functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation=library
            )
        ),
        query,
        key,
        value,
    )
    read = functools.partial(
        sparse_walks.attend, block_shape=(case.block, case.psa_width)
    )
    kernel = common.KERNELS.get(jax.default_backend())
    fast = jax.jit(functools.partial(read, implementation=kernel))
    reference = jax.jit(functools.partial(read, implementation="reference"))
    for name in names:
        select = selector(case, name)
        chosen = jax.jit(select)(query, key)

        @jax.jit
        def both(query, key, value, select=select):
            return read(query, key, value, select(query, key), implementation=kernel)

        first = [a[:, : min(CHECKED, case.seq)] for a in (query, key, value)]
        head = head_of(case, chosen)
        got, want = fast(*first, head), reference(*first, head)
        error = common.relative_error(got, want)
        assert error < 0.02, (case, name, error)
        apart = fast(query, key, value, chosen)
        difference = common.relative_error(both(query, key, value), apart)
        assert difference < 0.02, (case, name, difference)
        times = timing.time_in_turn(
            {
                "together": functools.partial(both, query, key, value),
                "attend": functools.partial(fast, query, key, value, chosen),
                "dense": dense,
            },
            repeats=repeats,
        )
        together_ms, attend_ms = times["together"].ms, times["attend"].ms
        select_ms = together_ms - attend_ms
        yield dataclasses.asdict(case) | {
            "method": name,
            "realised": float(
                sparse_walks.density(
                    chosen, case.seq, block_shape=(case.block, case.psa_width)
                )
            ),
            "together_ms": together_ms,
            "together_iqr_ms": times["together"].iqr_ms,
            "attend_ms": attend_ms,
            "attend_iqr_ms": times["attend"].iqr_ms,
            "select_ms": select_ms,
            "dense_ms": times["dense"].ms,
            "select_to_attend": select_ms / attend_ms,
            "speedup": times["dense"].ms / together_ms,
            "error": error,
        }


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=9, quick_repeats=2, argv=argv)
    cases, names = (QUICK, QUICK_NAMES) if args.quick else (CASES, NAMES)
    rows = (row for case in cases for row in run(case, names, args.repeats))
    notes = [
        "select_ms: together_ms - attend_ms.",
        "speedup: of selection and sparse attention together, over dense attention.",
        "realised: kept of the pairs in sight, after rounding to blocks.",
    ]
    env = common.environment(repeats=args.repeats)
    common.report(args.json, env, rows, notes)


if __name__ == "__main__":
    main()
