"""Where JAX is told to promote no ranks and no dtypes by itself, and to refuse NaN.

Both promotions raise while a function is traced, so that little is compiled here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import activations, attention, decode, metrics, nn, ops
from tests import filled
from tests.conformance import suite

BLOCKS = {"block_shape": (8, 8)}
LINES = {"window": 8, "sink": 1, "local": 4, **BLOCKS}
LENGTHS = jnp.array([32, 20])
ROWS = jnp.array([True] * 12 + [False] * 4)
KEY = jax.random.key(0)


@pytest.fixture(params=["rank", "dtype"])
def strict(request):
    """One of the settings."""
    if request.param == "rank":
        context = jax.numpy_rank_promotion("raise")
    else:
        context = jax.numpy_dtype_promotion("strict")
    with context:
        yield request.param


def of(*shape, dtype=jnp.bfloat16):
    """An array of that shape, which is only traced."""
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = of(4, 16), of(16, 32)
Q, K = of(2, 32, 4, 8), of(2, 32, 2, 8)
ONE = of(2, 1, 4, 8)


def gradients(fn):
    """The function's values and their gradients."""

    def run(*args):
        y, vjp = jax.vjp(fn, *args)
        return y, vjp(jax.tree.map(jnp.ones_like, y))

    return run


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", suite.METHODS)
def test_methods(strict, method, packed):
    if strict == "dtype" and method == "adams":
        pytest.skip("optax's correction of Adam's bias promotes")
    dtype = jnp.float32 if method == "adams" else jnp.bfloat16

    def run():
        params = {"first": jnp.ones((8, 8), dtype), "second": jnp.ones((8, 4), dtype)}
        inner = optax.sgd(0.1, momentum=0.9)
        tx = suite.build(method, inner, pack_masks=packed)
        state = tx.init(params)

        def loss(params):
            return sum(p.sum() for p in sj.forward_params(state, params).values())

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        sparse = sj.sparse_params(state, optax.apply_updates(params, updates))
        return sparse, sj.masks_of(state), sj.is_mask_update(state)

    jax.eval_shape(run)


@pytest.mark.parametrize("pattern", [sj.Block((4, 2)), sj.Channel(-1), sj.NM(2, 4)])
def test_patterns(strict, pattern):
    def run(w):
        params = {"a": w, "stack": jnp.stack([w, w])}
        sparsity = None if isinstance(pattern, sj.NM) else 0.5
        options = {"stacked": {"a": 0, "stack": 1}, "pattern": pattern}
        tx = sj.rigl(
            optax.sgd(0.1), sparsity, update_every=2, stop_step=9, key=KEY, **options
        )
        updates, state = tx.update(params, tx.init(params), params)
        masks = sj.prune(params, sparsity, **options)
        return updates, sj.apply_masks(params, masks), sj.sad(masks, sj.masks_of(state))

    jax.eval_shape(run, W)


# ---------------------------------------------------------------- functions


def block_sparse_product(x, w):
    mask = sj.BlockMask.from_blocks(jnp.eye(2, dtype=bool), (8, 16))
    weights = sj.BlockSparse.from_dense(w, mask)
    return ops.block_matmul(x, w, mask), ops.block_matmul(x, weights)


def masked_attention(q, k, **rules):
    mask = sj.BlockMask.from_blocks(jnp.tril(jnp.ones((4, 4), bool)), (8, 8))
    return ops.block_attention(q, k, k, mask & mask.T, causal=True, **rules)


def masks_of_blocks(w):
    mask = sj.BlockMask.from_scores(w, (2, 2), capacity=3, num_kept=2)
    again = sj.BlockMask.from_dense(mask.to_dense(), (2, 2))
    return (mask | again).T, again.to_blocks(), mask.density()


def spark(q, k):
    seen = jnp.tril(jnp.ones((32, 32), bool))
    return attention.spark_attention(q, k, k, seen, k=4, split=4)[0]


def pyramid(q, k):
    options = {**BLOCKS, "causal": True}
    ranks = attention.antidiagonal_importance(q, k, stride=4, **options)
    levels = attention.quota_levels(ranks)
    return attention.pyramid_attention(q, k, k, levels, **options)


def quest(q, k):
    bounds = attention.page_bounds(k, lengths=LENGTHS - 1, page_size=8)
    lists = attention.quest(q, attention.append_key(bounds, k[:, :1]), num_kept=2)
    return ops.listed_attention(q, k, k, lists, length=LENGTHS), lists.to_mask(32)


def double_sparsity(q, k):
    channels = attention.select_channels(jnp.ones((2, 2, 8)), num_channels=4)
    labels = attention.key_labels(k, channels, lengths=LENGTHS - 1, bits=4)
    labels = attention.append_label(labels, k[:, :1])
    return attention.double_sparsity(q, labels, num_kept=5)


rotate = functools.partial(nn.apply_rope, base=1e4)


def seer(q, k):
    gate = attention.init_seer_gate(4, 2, 8, d_gate=8, key=KEY)
    scores = attention.seer_scores(gate, q, k, block=8, rotate=rotate)
    target = attention.seer_target(q, k, block=8)
    mask = attention.seer_topk(scores, num_kept=2, block=8)
    return mask, attention.seer_loss(scores, target)


def distilled(student):
    counts = jnp.arange(4) < 3
    labels = jnp.arange(4)
    return sj.distillation_loss(student, student, labels, eta=0.3, where=counts)


def schedules(step):
    made = [
        sj.schedules.cubic(0.9, begin=0, end=4),
        sj.schedules.stepwise([0.0, 0.5], [3]),
        sj.schedules.constant(0.5),
        sj.schedules.cosine_drop(0.3, 10),
        sj.schedules.linear_decay(4),
        sj.schedules.exponential_decay(0.1),
    ]
    return [schedule(step) for schedule in made]


FUNCTIONS = {
    "statistical_topk": (gradients(lambda x: sj.statistical_topk(x, 4)), X),
    "statistical_topk of a share": (
        gradients(lambda x: sj.statistical_topk(x, 4.5)),
        X,
    ),
    "statistical_topk where": (
        gradients(lambda x: sj.statistical_topk(x, 4, where=ROWS[None])),
        X,
    ),
    "statistical_glu": (gradients(lambda x: sj.statistical_glu(x, x, 4)), X),
    "block_statistical_topk": (
        lambda x: [sj.block_statistical_topk(x, 8, 4, pool=p) for p in ("max", "mean")],
        X,
    ),
    "topk_activation": (gradients(lambda x: sj.topk_activation(x, 4)[0]), X),
    "magnitude_threshold": (lambda x: activations.magnitude_threshold(x, 0.5), X),
    "activation_counts": (lambda x: metrics.activation_counts(x).density, X),
    "block_matmul": (gradients(block_sparse_product), X, W),
    "block_attention": (gradients(masked_attention), Q, K),
    "block_attention by segments": (
        functools.partial(
            masked_attention, window=6, segment_ids=jnp.zeros((2, 32), int)
        ),
        Q,
        K,
    ),
    "block_attention with a prefix": (
        functools.partial(masked_attention, prefix=LENGTHS, with_lse=True),
        Q,
        K,
    ),
    "BlockMask": (masks_of_blocks, W),
    "masks": (
        lambda x: [
            sj.topk_mask(x, 5),
            sj.nm_mask(x, 2, 4, axis=-1),
            sj.block_mask(x, (2, 4), 3),
            sj.global_topk({"a": x}, 7),
        ],
        X,
    ),
    "allocation": (
        lambda w: [
            sj.erdos_renyi({"kernel": w}, 0.5),
            sj.erdos_renyi_kernel({"kernel": w}, 0.5),
            sj.prune({"kernel": w}, 0.5, across_leaves=True),
        ],
        W,
    ),
    "weight_scaling": (
        lambda w: sj.weight_scaling.apply(
            {"kernel": w}, sj.weight_scaling.init({"kernel": w})
        ),
        W,
    ),
    "distillation_loss": (gradients(distilled), X),
    "schedules": (schedules, of(dtype=jnp.int32)),
    "spark_attention": (gradients(spark), Q, K),
    "pyramid_attention": (gradients(pyramid), Q, K),
    "sampled_importance": (
        lambda q, k: attention.sampled_importance(q, k, random_key=KEY, **BLOCKS),
        Q,
        K,
    ),
    "quest": (quest, ONE, K),
    "double_sparsity": (double_sparsity, ONE, K),
    "snapkv": (
        lambda q, k: [
            select(q, k, num_kept=9, window=4, local=2, sink=1, lengths=LENGTHS)
            for select in (attention.snapkv, attention.ada_snapkv)
        ],
        Q,
        K,
    ),
    "seer": (seer, Q, K),
    "sparsed": (lambda q, k: attention.sparsed(q, k, num_generated=8, **BLOCKS), Q, K),
}
SELECTORS = {
    "topk": functools.partial(attention.topk_blocks, num_kept=2, **BLOCKS),
    "statistical": functools.partial(attention.statistical_topk_blocks, k=2, **BLOCKS),
    "block_sparse": functools.partial(attention.block_sparse, num_kept=3, **BLOCKS),
    "vertical_slash": functools.partial(
        attention.vertical_slash, num_vertical=8, num_slash=8, **LINES
    ),
    "flex_prefill": functools.partial(attention.flex_prefill, min_budget=4, **LINES),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(strict, name):
    fn, *args = FUNCTIONS[name]
    jax.eval_shape(fn, *args)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_of_blocks(strict, name, lengths):
    select = functools.partial(SELECTORS[name], causal=True, lengths=lengths)
    jax.eval_shape(select, Q, K)


# ---------------------------------------------------------------- layers

SEER = functools.partial(
    nn.SeerAttention, block=8, select=functools.partial(attention.seer_topk, num_kept=2)
)
LAYERS = filled.KINDS | {"seer": SEER, "plain": nn.Attention}


@pytest.mark.parametrize("kind", LAYERS)
def test_training_and_decoding(strict, kind):
    model = filled.make(LAYERS[kind])
    tokens = jnp.ones((2, 16), jnp.int32)

    def train(model):
        graph, params = nnx.split(model)
        return jax.grad(lambda p: nnx.merge(graph, p)(tokens).sum())(params)

    def generate(tokens):
        return decode.generate(decode.prepare(model), tokens, num_tokens=2)

    jax.eval_shape(train, model)
    jax.eval_shape(generate, tokens)


KEY_SELECTORS = {
    "quest": decode.Quest(num_kept=8, page_size=4),
    "snapkv": decode.SnapKV(num_kept=6, window=5, pool_size=3, local=2, sink=1),
    "ada_snapkv": decode.AdaSnapKV(num_kept=6, window=5, pool_size=3, local=2, sink=1),
}


@pytest.mark.parametrize("name", KEY_SELECTORS)
def test_decoding_by_selected_keys(strict, name):
    model = decode.prepare(filled.make(nn.Attention), select_keys=KEY_SELECTORS[name])
    tokens = jnp.ones((2, 16), jnp.int32)
    jax.eval_shape(lambda t: decode.generate(model, t, num_tokens=2), tokens)


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize("name", ["vertical_slash", "flex_prefill"])
def test_no_nan_beside_short_prompts(name):
    """One is shorter than the window. Only eagerly JAX sees what is not returned."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 16, heads, 8)).astype("f") for heads in (4, 2))
    with jax.debug_nans(True):
        SELECTORS[name](q, k, lengths=jnp.array([16, 5]))
