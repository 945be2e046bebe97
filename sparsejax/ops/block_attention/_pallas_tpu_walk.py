"""What the kernels for TPU share: which block each grid step is for, and its operands.

The lists of a head are walked one after the other: for outputs and dq those by row, for
dk and dv those by column. They are in scalar memory before the first step, so the copy
of a block starts while the one before it is multiplied, and the number of steps is an
operand: time follows what is kept, not the lists' capacity. Where the lists of all
batches and heads do not fit there together, parts of them are called one by one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsejax.formats import BlockMask, block_positions
from sparsejax.ops._tpu import result
from sparsejax.ops.block_attention._gradients import Lists

MAX_WORDS = 3 * 2**16  # of 32 bits: 3/4 of the scalar memory of TPU v4 on
INDEX_BITS = 14  # of a list, and of an entry; a step is one int32
_INDEX = (1 << INDEX_BITS) - 1
_PARTIAL, _ADDS = 1 << 2 * INDEX_BITS, 2 << 2 * INDEX_BITS


class Steps(NamedTuple):
    """What is in scalar memory; there flat, and `count` the highest alone.

    Attributes:
      code: int32 `[batches, heads, length]` for those that have lists of their own: of
        each step its list and its entry in it, whether the rules cut through the block,
        and whether it adds anything.
      bias: float32 of each step, or None.
      count: int32 `[batches, heads]`, steps of each.
      prefix: of the rules, or None.
    """

    code: jax.Array
    bias: jax.Array | None
    count: jax.Array
    prefix: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Walk:
    """How steps are read; Python numbers.

    Attributes:
      by_key: whether the lists are of key blocks, else they are of query blocks.
      batches: that have lists of their own.
      heads: that have lists of their own; of those that have programs.
      programs: heads that have programs: key heads with `by_key`, else query heads.
      group: query heads of a key head.
      in_lists: how many of these the lists of one key head tell apart: 1 or all.
      length: steps that there is room for, and one more.
    """

    by_key: bool
    batches: int
    heads: int
    programs: int
    group: int
    in_lists: int
    length: int

    def index(self, b: Any, h: Any, s: Any) -> Any:
        """Where a step is in the arrays of `Steps`."""
        lead = b * self.heads if self.batches > 1 else 0
        return (lead + jax.lax.div(h * self.heads, self.programs)) * self.length + s

    def own(self, code: Any) -> tuple[Any, Any]:
        """The block row (the column, with `by_key`), and the head of the group."""
        outer = jax.lax.shift_right_logical(code, INDEX_BITS) & _INDEX
        return jax.lax.div(outer, self.in_lists), jax.lax.rem(outer, self.in_lists)

    def place(self, b: Any, h: Any, s: Any, g: Any, steps: Steps) -> tuple[Any, ...]:
        """Batch, query head, key head, block row and block column of a step."""
        code = steps.code[self.index(b, h, s)]
        (own, of_group), other = self.own(code), code & _INDEX
        if self.by_key:
            return b, h * self.group + of_group + g, h, other, own
        return b, h, jax.lax.div(h, self.group), own, other


def max_steps(mask: BlockMask, in_lists: int) -> int:
    """The most steps over the lists by row of one head, and one more.

    Args:
      mask: transposed for the lists by column.
      in_lists: heads that have lists of their own.
    """
    lists, room = mask.indices.shape[-2:]
    others, other_room = mask.indices_t.shape[-2:]
    # all that can be kept, where an empty list takes a step too
    return in_lists * min(lists * room, others * other_room + lists) + 1


def make_steps(
    lists: Lists, heads: int, kv_heads: int, *, by_key: bool
) -> tuple[Steps, Walk]:
    """The steps of all heads: blocks in the order of the lists, each list at least one.

    A list without blocks has a step that adds nothing, so that its sum, 0, is written.

    Args:
      lists: by row.
      heads: of the queries.
      kv_heads: of the keys.
      by_key: walk the lists by column.
    """
    partial = lists.partial
    whole, bias = lists.whole.to_blocks(), lists.bias
    cut = jnp.zeros_like(whole) if partial is None else partial.to_blocks()
    arrays = [whole | cut, cut] + ([] if bias is None else [bias])
    batches, own_heads = (max(a.shape[axis] for a in arrays) for axis in (0, 1))
    arrays = [jnp.repeat(a, own_heads // a.shape[1], axis=1) for a in arrays]
    arrays = [jnp.broadcast_to(a, (batches, *a.shape[1:])) for a in arrays]
    group, in_lists, mask = heads // kv_heads, 1, lists.whole
    if by_key:
        in_lists, mask = (group if own_heads == heads else 1), mask.T
        arrays = [_by_column(a, in_lists) for a in arrays]
    walk = Walk(
        by_key,
        batches,
        own_heads // in_lists,
        kv_heads if by_key else heads,
        group,
        in_lists,
        max_steps(mask, in_lists),
    )
    arrays = [a.reshape(-1, *a.shape[2:]) for a in arrays]
    of_head = functools.partial(_steps_of_head, length=walk.length)
    code, count, *biases = (
        a.reshape(batches, -1, *a.shape[1:]) for a in jax.vmap(of_head)(*arrays)
    )
    bias = biases[0] if biases else None
    return Steps(code, bias, count, lists.rules.prefix), walk


def _by_column(a: jax.Array, in_lists: int) -> jax.Array:
    """`[batch, heads, rows, columns]` to `[.., heads / n, columns * n, rows]`."""
    batch, _, rows, columns = a.shape
    a = a.reshape(batch, -1, in_lists, rows, columns).transpose(0, 1, 4, 2, 3)
    return a.reshape(batch, -1, columns * in_lists, rows)


def _steps_of_head(kept, partial, *bias, length):
    mask = BlockMask.from_blocks(kept, (1, 1))
    num = jnp.maximum(mask.num, 1)
    outer, inner = block_positions(dataclasses.replace(mask, num=num), length)
    # beyond the count the last block is named again: nothing more is copied
    count = jnp.sum(num)
    adds = (jnp.arange(length) < count) & kept[outer, inner]
    code = outer << INDEX_BITS | inner
    code |= jnp.where(partial[outer, inner], _PARTIAL, 0) | jnp.where(adds, _ADDS, 0)
    return code, count, *(b[outer, inner] for b in bias)


def launch(
    visit: Callable[..., None],
    finish: Callable[[dict[str, Any]], None],
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
    sums: dict[str, tuple[tuple[int, int], float]],
    lists: Lists,
    *,
    by_key: bool,
) -> list[jax.Array]:
    """Runs a kernel over the steps of all heads.

    Args:
      visit: `(refs, bias, seen)` adds a block to the sums; `bias` is a number, or None;
        `seen` says which pairs of the block are, or is None if all are.
      finish: `(refs)` writes the results of a list.
      operands: whose names say how they are cut, see `_spec`.
      results: likewise.
      sums: float32 in vector memory, by name: shape and first value.
      lists: by row.
      by_key: walk the lists by column.

    Returns:
      The results.
    """
    batch, heads = operands["q"].shape[:2]
    kv_heads = operands["k"].shape[1]
    steps, walk = make_steps(lists, heads, kv_heads, by_key=by_key)
    rules = lists.rules
    if lists.partial is not None and rules.query_segments is not None:
        assert rules.key_segments is not None
        operands = operands | {
            "query_segments": rules.query_segments[:, None],
            "key_segments": rules.key_segments[:, :, None],
        }
    run = functools.partial(_run, visit, finish, sums, lists, walk)
    words = walk.heads * walk.length * (1 if steps.bias is None else 2)
    part = batch, kv_heads
    if walk.batches * words > MAX_WORDS:
        part = _fitting(batch, kv_heads, words)
    if part == (batch, kv_heads):
        return run(steps, operands, results)
    return _in_parts(run, steps, operands, results, part)


def _fitting(batch: int, kv_heads: int, words: int) -> tuple[int, int]:
    """Batches and key heads whose lists fit together; all heads where one batch does.

    Args:
      batch: of all.
      kv_heads: of all.
      words: of the lists of a batch.
    """

    def divisor(n, most):
        return max(d for d in range(1, n + 1) if n % d == 0 and d <= most)

    if words <= MAX_WORDS:
        return divisor(batch, MAX_WORDS // words), kv_heads
    return 1, divisor(kv_heads, MAX_WORDS // (words // kv_heads))


def _in_parts(
    run: Callable[..., list[jax.Array]],
    steps: Steps,
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
    part: tuple[int, int],
) -> list[jax.Array]:
    """Runs a kernel for some batches and key heads after the other.

    Args:
      run: takes steps, operands and results of a part.
      steps: of all.
      operands: of all.
      results: of all.
      part: how many of both; several batches only with all key heads.
    """
    batch, kv_heads = (operands["k"].shape[axis] for axis in (0, 1))
    parts = batch // part[0], kv_heads // part[1]

    def shape_of(shape):
        return part[0], shape[1] // parts[1], *shape[2:]

    def of_heads(a):
        a = jnp.broadcast_to(a, (batch, *a.shape[1:]))
        return a.reshape(-1, *shape_of(a.shape))

    def of_batches(a):  # for each part of the heads again
        return jnp.repeat(a, parts[1], axis=0).reshape(-1, part[0], *a.shape[1:])

    steps_cut = Steps(
        of_heads(steps.code),
        None if steps.bias is None else of_heads(steps.bias),
        of_heads(steps.count),
        None if steps.prefix is None else of_batches(steps.prefix),
    )
    operands_cut = {
        name: of_batches(a) if name.endswith("segments") else of_heads(a)
        for name, a in operands.items()
    }
    types = {
        name: result(shape_of(of_all.shape), of_all.dtype, operands["q"])
        for name, of_all in results.items()
    }
    found = jax.lax.map(lambda given: run(*given, types), (steps_cut, operands_cut))
    shapes = (of_all.shape for of_all in results.values())
    return [a.reshape(shape) for a, shape in zip(found, shapes, strict=True)]


def _run(
    visit: Callable[..., None],
    finish: Callable[[dict[str, Any]], None],
    sums: dict[str, tuple[tuple[int, int], float]],
    lists: Lists,
    walk: Walk,
    steps: Steps,
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Runs a kernel over the steps of some batches and heads; see `launch`."""
    (batch, heads), dim = operands["q"].shape[:2], operands["k"].shape[3]
    height, width = lists.whole.block_shape
    rules, by_key = lists.rules, walk.by_key
    walk = dataclasses.replace(
        walk,
        batches=steps.code.shape[0],
        heads=steps.code.shape[1],
        programs=heads // walk.group if by_key else heads,
    )
    steps = Steps(
        steps.code.reshape(-1),
        None if steps.bias is None else steps.bias.reshape(-1),
        jnp.max(steps.count).reshape(1),
        steps.prefix,
    )
    names = [*operands, *results, *sums]
    heads_of_step = walk.group // walk.in_lists if by_key else 1

    def kernel(steps, *refs):
        refs = dict(zip(names, refs, strict=True))
        b, h, s, g = (pl.program_id(axis) for axis in range(4))
        at = walk.index(b, h, s)
        code = steps.code[at]
        own, _ = walk.own(code)
        row, column = walk.place(b, h, s, g, steps)[3:]
        before, _ = walk.own(steps.code[jnp.maximum(at - 1, 0)])
        after, _ = walk.own(steps.code[at + 1])

        @pl.when((g == 0) & ((s == 0) | (before != own)))
        def _():
            for name, (shape, value) in sums.items():
                refs[name][...] = jnp.full(shape, value, jnp.float32)

        def visit_block(partial):
            seen = None
            if partial:
                iota = functools.partial(
                    jax.lax.broadcasted_iota, jnp.int32, (width, height)
                )
                cut = [refs.get(name) for name in ("query_segments", "key_segments")]
                seen = rules.visible(
                    row * height + iota(1),
                    column * width + iota(0),
                    prefix=None if steps.prefix is None else steps.prefix[b],
                    query_segments=None if cut[0] is None else cut[0][...],
                    key_segments=None if cut[1] is None else cut[1][...],
                )
            visit(refs, None if steps.bias is None else steps.bias[at], seen)

        adds, partial = code & _ADDS != 0, code & _PARTIAL != 0
        pl.when(adds & ~partial)(lambda: visit_block(False))
        if lists.partial is not None:
            pl.when(adds & partial)(lambda: visit_block(True))

        is_last = (s == steps.count[0] - 1) | (after != own)
        pl.when((g == heads_of_step - 1) & is_last)(lambda: finish(refs))

    def spec(name):
        block, index = _spec(name, dim, height, width)
        return pl.BlockSpec(block, lambda *ids: index(*walk.place(*ids)))

    return pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, walk.programs, steps.count[0], heads_of_step),
            in_specs=list(map(spec, operands)),
            out_specs=list(map(spec, results)),
            scratch_shapes=[
                pltpu.VMEM(shape, jnp.float32) for shape, _ in sums.values()
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
    )(steps, *operands.values())


def _spec(name: str, dim: int, height: int, width: int) -> tuple[Any, Any]:
    """The block of an operand, and its index by batch, heads, block row and column."""
    match name:
        case "q" | "do" | "out" | "dq":  # [batch, heads, dim, queries]
            return (None, None, dim, height), lambda b, i, j, r, c: (b, i, 0, r)
        case "lse" | "delta":  # [batch, heads, 1, queries]
            return (None, None, 1, height), lambda b, i, j, r, c: (b, i, 0, r)
        case "k" | "v" | "dk" | "dv":  # [batch, kv_heads, keys, dim]
            return (None, None, width, dim), lambda b, i, j, r, c: (b, j, c, 0)
        case "query_segments":  # [batch, 1, queries]
            return (None, 1, height), lambda b, i, j, r, c: (b, 0, r)
        case _:  # key_segments, [batch, keys, 1]
            return (None, width, 1), lambda b, i, j, r, c: (b, c, 0)
