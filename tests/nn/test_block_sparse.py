"""Block-sparse layers against dense ones, and training under the optimizer's masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from flax import nnx

import sparsejax as sj
from sparsejax import nn
from sparsejax.typing import plain_path

BLOCK = (8, 8)
KEY = jax.random.key(3)
ADAM = optax.adamw(1e-2)
X, Y = jax.random.normal(jax.random.key(7), (2, 12, 16))
DYNAMIC = dict(update_every=2, stop_step=6, drop_fraction=lambda step: 0.5, key=KEY)
METHODS = {
    "static_sparse": functools.partial(sj.static_sparse, sparsity=0.5, key=KEY),
    "magnitude_prune": functools.partial(
        sj.magnitude_prune,
        sparsity=sj.schedules.cubic(0.75, begin=0, end=6),
        update_every=2,
    ),
    "sparse_evolution": functools.partial(sj.sparse_evolution, sparsity=0.5, **DYNAMIC),
    "rigl": functools.partial(sj.rigl, sparsity=0.5, **DYNAMIC),
}


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    """Nearly all of a tiny run is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def method(name, inner=ADAM, **options):
    return METHODS[name](inner, **{"pattern": sj.Block(BLOCK), **options})


def ffn(seed=0, **options):
    return nn.BlockSparseFFN(16, 32, block_shape=BLOCK, rngs=nnx.Rngs(seed), **options)


def mse(model):
    return jnp.mean((model(X) - Y) ** 2)


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(plain_path(path)): np.asarray(leaf) for path, leaf in leaves}


def blocks(mask):
    """The kept blocks, from an elementwise mask of whole blocks."""
    rows, columns = mask.shape
    tiles = np.asarray(mask).reshape(rows // 8, 8, columns // 8, 8)
    assert (tiles.any((1, 3)) == tiles.all((1, 3))).all()
    return tiles.any((1, 3))


class LayerTest(parameterized.TestCase):
    @pytest.mark.once
    def test_the_ffn_begins_as_the_dense_one_of_its_seed(self):
        block, dense = ffn(), nn.GatedFFN(16, 32, rngs=nnx.Rngs(0))
        chex.assert_trees_all_equal(*(nnx.state(m, nnx.Param) for m in (block, dense)))
        y, density = block(X, with_density=True)
        np.testing.assert_allclose(y, dense(X), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(density, np.ones(12))

    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_linear_equals_numpy(self, dtype):
        layer = nn.BlockSparseLinear(
            16, 24, block_shape=(8, 4), use_bias=True, dtype=dtype, rngs=nnx.Rngs(0)
        )
        kept = np.random.default_rng(0).random((2, 6)) < 0.5
        mask = sj.BlockMask.from_blocks(kept, (8, 4), capacity=5)
        layer.block_mask.set_value(mask)
        layer.bias[...] = jnp.arange(24.0)
        elements = np.kron(kept, np.ones((8, 4)))
        want = np.asarray(X) @ (elements * np.asarray(layer.kernel[...]))
        got = layer(X)
        self.assertEqual(got.dtype, dtype)
        tol = {jnp.float32: 1e-5, jnp.bfloat16: 0.1}[dtype]
        np.testing.assert_allclose(
            got.astype(jnp.float32), want + np.arange(24), rtol=tol, atol=tol
        )

    def test_masks_are_no_params(self):
        model = ffn()
        names = set(by_name(nnx.state(model, nnx.Param)))
        self.assertEqual(names, {"gate.kernel", "up.kernel", "down.kernel"})
        topology = by_name(nnx.state(model, nn.Topology))
        kinds = {name.split(".")[1] for name in topology}
        self.assertEqual(kinds, {"block_mask", "full_dw"})

    def test_blocks_must_divide_the_kernel(self):
        with pytest.raises(ValueError, match=r"\(8, 8\) for d_in=16 and d_out=20"):
            nn.BlockSparseLinear(16, 20, block_shape=BLOCK, rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match=r"`\(height, width\)`.* got 8"):
            nn.BlockSparseLinear(16, 16, block_shape=8, rngs=nnx.Rngs(0))


class TrainingTest(parameterized.TestCase):
    @parameterized.parameters(*METHODS)
    def test_a_run_equals_the_masked_dense_one(self, name):
        """Masks, gradients and weights of each step; zeros are exact; one trace."""
        pack = name in ("magnitude_prune", "rigl")
        tx = method(name, pack_masks=pack)
        model, dense = ffn(), nn.GatedFFN(16, 32, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        reference = nnx.Optimizer(dense, tx, wrt=nnx.Param)

        @nnx.jit
        @chex.assert_max_traces(n=1)
        def step(model, optimizer, dense, reference):
            seen = {"masks": sj.masks_of(optimizer.opt_state)}
            seen["due"] = sj.is_mask_update(optimizer.opt_state)
            nn.set_block_masks(model, optimizer.opt_state)
            loss, grads = nnx.value_and_grad(mse)(model)
            optimizer.update(model, grads)

            graph, params = nnx.split(dense)

            def masked_loss(params):
                params = sj.forward_params(reference.opt_state, params)
                return mse(nnx.merge(graph, params))

            want = jax.grad(masked_loss)(params)
            reference.update(dense, want)
            return seen | {"loss": loss, "grads": grads, "want": want}

        losses, topologies = [], set()
        for _ in range(10):
            seen = step(model, optimizer, dense, reference)
            masks, grads, want = (
                by_name(seen[tree]) for tree in ("masks", "grads", "want")
            )
            full = name == "rigl" and bool(seen["due"])
            if full:
                self.assertTrue(any(grads[leaf][~masks[leaf]].any() for leaf in masks))
            for leaf, mask in masks.items():
                layer = getattr(model, leaf.split(".")[0])
                used = layer.block_mask.get_value()
                np.testing.assert_array_equal(used.to_blocks(), blocks(mask))
                self.assertEqual(bool(layer.full_dw[...]), full)
                expected = want[leaf] if full else np.where(mask, want[leaf], 0)
                np.testing.assert_allclose(grads[leaf], expected, rtol=1e-4, atol=1e-6)
            params, like = (by_name(nnx.state(m, nnx.Param)) for m in (model, dense))
            after = by_name(sj.masks_of(optimizer.opt_state))
            for leaf, mask in after.items():
                self.assertFalse(params[leaf][~mask].any())
                np.testing.assert_allclose(
                    params[leaf], like[leaf], rtol=1e-4, atol=1e-5
                )
            losses.append(float(seen["loss"]))
            topologies.add(tuple(mask.tobytes() for mask in after.values()))
        self.assertLess(losses[-1], losses[0])
        self.assertGreaterEqual(len(topologies), 1 if name == "static_sparse" else 3)


def rigl_oracle(weight, kept, grad, drop):
    """New kept blocks: drop the smallest sums of `|w|`, grow the largest of `|dw|`."""
    sums = [np.abs(a).reshape(4, 8, 6, 8).sum((1, 3)) for a in (weight, grad)]
    by_weight, by_grad = (dict(np.ndenumerate(a)) for a in sums)
    ranked = sorted(zip(*kept.nonzero(), strict=True), key=by_weight.get)
    stay = set(ranked[drop:])
    others = sorted(set(by_grad) - stay, key=by_grad.get)
    new = np.zeros_like(kept)
    for block in stay | set(others[-drop:]):
        new[block] = True
    return new


def test_block_rigl_grows_where_the_summed_dense_gradient_is_largest():
    layer = nn.BlockSparseLinear(32, 48, block_shape=BLOCK, rngs=nnx.Rngs(0))
    tx = method("rigl", drop_fraction=0.4)
    x = jax.random.normal(KEY, (20, 32))
    y = jax.random.normal(jax.random.key(4), (20, 48))

    @jax.jit
    def update(params, opt_state, full_dw):
        graph, _, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            nn.set_block_masks(model, opt_state)
            due = model.full_dw[...]
            model.full_dw[...] = due & full_dw
            return 0.5 * jnp.sum((model(x) - y) ** 2), due

        grads, due = jax.grad(loss, has_aux=True)(params)
        return due, sj.masks_of(tx.update(grads, opt_state, params)[1])

    params = nnx.state(layer, nnx.Param)
    opt_state = jax.jit(tx.init)(params)
    weight, mask = params["kernel"][...], sj.masks_of(opt_state)["kernel"][...]
    weight, mask = np.asarray(weight, np.float64), np.asarray(mask)
    error = np.asarray(x) @ (weight * mask) - np.asarray(y)
    grad = np.asarray(x).T @ error
    kept = blocks(mask)
    want = rigl_oracle(weight, kept, grad, drop=int(0.4 * kept.sum()))
    assert kept.sum() == want.sum() == 12 and (want & ~kept).sum() >= 2

    due, new = update(params, opt_state, True)
    assert due
    np.testing.assert_array_equal(blocks(new["kernel"][...]), want)
    # the gradient of the kept blocks alone says nothing about the others
    _, blind = update(params, opt_state, False)
    assert (blocks(blind["kernel"][...]) != want).any()


class SetBlockMasksTest(parameterized.TestCase):
    """Where masks come from, and what is refused."""

    def assert_masks(self, model, opt_state):
        """Every layer has the mask of its kernel, and all where there is none."""
        masks = by_name(sj.masks_of(opt_state))
        for name in ("gate", "up", "down"):
            used = getattr(model, name).block_mask.get_value().to_blocks()
            kept = masks.get(f"{name}.kernel")
            want = np.ones(used.shape, bool) if kept is None else blocks(kept)
            np.testing.assert_array_equal(used, want)

    def flags(self, model):
        layers = (model.gate, model.up, model.down)
        return [bool(layer.full_dw[...]) for layer in layers]

    @parameterized.parameters("partition", "nested", "multi_steps", "chain")
    def test_finds_masks_wherever_they_are(self, where):
        model = ffn()
        down = lambda path, leaf: plain_path(path)[0] == "down"  # noqa: E731
        other = lambda path, leaf: plain_path(path)[0] == "up"  # noqa: E731
        rigl = method("rigl", where=other if where != "chain" else None)
        tx = {
            "partition": optax.partition(
                {
                    "grow": method("rigl", pack_masks=True),
                    "walk": method("sparse_evolution"),
                    "dense": ADAM,
                },
                {
                    "gate": {"kernel": "dense"},
                    "up": {"kernel": "grow"},
                    "down": {"kernel": "walk"},
                },
            ),
            "nested": method("sparse_evolution", rigl, where=down),
            "multi_steps": optax.MultiSteps(rigl, 2),
            "chain": optax.chain(optax.clip_by_global_norm(1.0), rigl),
        }[where]
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        opt_state = jax.jit(tx.init)(params)
        nn.set_block_masks(model, opt_state)
        self.assert_masks(model, opt_state)
        # SET is due at step 0 as well, but grows at random
        self.assertEqual(self.flags(model), [where == "chain", True, where == "chain"])
        if where == "chain":
            late = (opt_state[0], opt_state[1]._replace(step=jnp.int32(8)))
            nn.set_block_masks(model, late)
            self.assertEqual(self.flags(model), [False] * 3)

    @pytest.mark.once
    def test_brought_masks_of_blocks(self):
        model = ffn()
        params = nnx.state(model, nnx.Param)
        pattern = sj.Block(BLOCK)

        @jax.jit
        def init(params):
            masks = sj.prune(params, 0.5, pattern=pattern)
            return sj.static_sparse(ADAM, masks=masks, pattern=pattern).init(params)

        opt_state = init(params)
        nn.set_block_masks(model, opt_state)
        self.assert_masks(model, opt_state)

    def test_layers_stacked_for_a_scan(self):
        stacked = nnx.jit(nnx.vmap(ffn))(jax.random.split(KEY, 2))
        tx = method("rigl", stacked=1)
        graph = nnx.split(nn.GatedFFN(16, 32, rngs=nnx.Rngs(0)))[0]

        @nnx.jit
        def run(stacked, x):
            params = nnx.state(stacked, nnx.Param)
            opt_state = tx.init(params)
            nn.set_block_masks(stacked, opt_state)

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def apply(x, layer):
                return x + layer(x)

            used = sj.forward_params(opt_state, params)
            want = x
            for i in range(2):
                layer = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], used))
                want = want + layer(want)
            return apply(x, stacked), want

        got, want = run(stacked, X)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        self.assertTrue(stacked.gate.full_dw[...].all())
        density = stacked.gate.block_mask.get_value().density()
        np.testing.assert_array_equal(density, [0.5, 0.5])

    @pytest.mark.once
    def test_lists_keep_their_length_and_tell_when_a_mask_does_not_fit(self):
        model = ffn()
        opt_state = jax.jit(method("rigl").init)(nnx.state(model, nnx.Param))

        def shorten(capacity):
            kept = jnp.zeros((2, 4), bool)
            mask = sj.BlockMask.from_blocks(kept, BLOCK, capacity=capacity)
            model.gate.block_mask.set_value(mask)

        shorten((4, 1))  # 4 of 8 blocks are kept; a column may hold 2
        kept = blocks(sj.masks_of(opt_state)["gate"]["kernel"][...])
        assert kept.sum(axis=0).max() > 1
        with pytest.raises(ValueError, match=r"4 and 1 entries .* at gate"):
            nn.set_block_masks(model, opt_state)
        nnx.jit(nn.set_block_masks)(model, opt_state)
        self.assertTrue(model.gate.block_mask.get_value().overflowed)
        self.assertFalse(model.up.block_mask.get_value().overflowed)
        shorten((int(kept.sum(axis=1).max()), None))
        nn.set_block_masks(model, opt_state)
        self.assert_masks(model, opt_state)


RIGL = method("rigl")
SOFT = sj.mask_decay(ADAM, 0.5, sparsity=0.5, pattern=sj.Block(BLOCK))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (ADAM, "must hold the state of a sparsejax method; found none in tuple"),
        (optax.chain(RIGL, RIGL), "got `rigl` and `rigl` at .*/kernel. Restrict one"),
        (SOFT, "`mask_decay`, in which all weights stay in use, at .*/kernel"),
        (
            sj.adams(1e-3, 10, 1e-3, pattern=sj.NM(2, 4)),
            "`adams`, in which all weights stay in use, at .*/kernel",
        ),
        (
            method("rigl", pattern=sj.Block((4, 16))),
            r"Block\(shape=\(4, 16\)\) of `rigl` and blocks of \(8, 8\)",
        ),
        (
            method("rigl", pattern=sj.Unstructured()),
            r"Unstructured\(\) of `rigl` .*pattern=sj.Block\(\(8, 8\)\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_raises(tx, message):
    model = ffn()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params: nn.set_block_masks(model, tx.init(params)),
            nnx.state(model, nnx.Param),
        )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.GatedFFN(16, 32, rngs=nnx.Rngs(0)),
            "must hold block-sparse layers; found none in GatedFFN",
        ),
        (
            lambda: nn.BlockSparseFFN(16, 64, block_shape=BLOCK, rngs=nnx.Rngs(0)),
            r"a mask \(\d+, \d+\) of `rigl` and a kernel \(.*64.*\) at .*/kernel",
        ),
        (
            lambda: ffn().gate,
            "layers at the top and masks at .*/kernel.*the whole model",
        ),
    ],
)
def test_a_model_that_does_not_fit_raises(other, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params: nn.set_block_masks(other(), RIGL.init(params)),
            nnx.state(ffn(), nnx.Param),
        )


def test_a_pattern_of_whole_blocks_fits_smaller_blocks():
    model = ffn()
    tx = method("static_sparse", pattern=sj.Block((16, 16)))
    nn.set_block_masks(model, jax.jit(tx.init)(nnx.state(model, nnx.Param)))
    assert model.gate.block_mask.get_value().density() == 0.5


@pytest.mark.parametrize("transform", [lambda fn: fn, nnx.jit])
def test_layers_that_share_a_kernel_share_its_mask(transform):
    class Tied(nnx.Module):
        def __init__(self):
            make = functools.partial(nn.BlockSparseLinear, block_shape=BLOCK)
            self.a = make(16, 16, rngs=nnx.Rngs(0))
            self.b = make(16, 16, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

    model = Tied()
    optimizer = nnx.Optimizer(model, method("static_sparse"), wrt=nnx.Param)
    transform(lambda m, o: nn.set_block_masks(m, o.opt_state))(model, optimizer)
    masks = [layer.block_mask.get_value() for layer in (model.a, model.b)]
    assert [float(mask.density()) for mask in masks] == [0.5, 0.5]
    chex.assert_trees_all_equal(*masks)
