"""Which leaves are governed: the default rule, predicates, trees and their errors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl.testing import parameterized
from flax import nnx

import sparsejax as sj
from sparsejax.patterns import (
    NM,
    Block,
    Channel,
    Unstructured,
    broadcast_prefix,
    governed,
)

PARAMS = {
    "embed": {"embedding": jnp.ones((16, 8))},
    "layers": [
        {"bias": jnp.ones(8), "kernel": jnp.ones((8, 8)), "scale": jnp.ones((1, 8))},
        {"bias": jnp.ones((2, 8)), "kernel": jnp.ones((8, 4), jnp.bfloat16)},
    ],
    "steps": jnp.ones((3, 3), jnp.int32),
    "hole": None,
}


def names(params, **kwargs):
    return [leaf.name for leaf in governed(params, **kwargs) if leaf is not None]


KERNELS = ["['layers'][0]['kernel']", "['layers'][1]['kernel']"]


class DefaultTest(parameterized.TestCase):
    def test_kernels_alone(self):
        leaves = governed(PARAMS)
        self.assertLen(leaves, 8)  # None counts as a leaf
        self.assertEqual(names(PARAMS), KERNELS)

    def test_shape_dtype_structs(self):
        self.assertEqual(names(jax.eval_shape(lambda: PARAMS)), KERNELS)

    def test_random_keys_are_no_weights(self):
        keys = jax.random.split(jax.random.key(0), (2, 2))
        params = {"kernel": jnp.ones((2, 2)), "rng": keys}
        self.assertEqual(names(params), ["['kernel']"])

    def test_flax_value_is_ignored(self):
        state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
        found = governed(state)
        self.assertEqual([leaf and leaf.shape for leaf in found], [None, (4, 2)])

    def test_stacked_axes_do_not_count(self):
        params = {"kernel": jnp.ones((3, 4, 2)), "gain": jnp.ones((3, 4))}
        self.assertEqual(names(params), ["['gain']", "['kernel']"])
        self.assertEqual(names(params, stacked=1), ["['kernel']"])


class PathTest(parameterized.TestCase):
    def test_names_are_alike_for_all_frameworks(self):
        class Block(nnx.Module):
            def __init__(self):
                self.ffn = nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0))

        class Model(nnx.Module):
            def __init__(self):
                self.blocks = nnx.List([Block()])

        kernel = jnp.ones((4, 2))
        for params in (
            {"blocks": [{"ffn": {"kernel": kernel}}]},
            {"blocks": {"0": {"ffn": {"kernel": kernel}}}},
            nnx.state(Model(), nnx.Param),
            Model(),
        ):
            seen = []
            governed(
                params,
                where=lambda path, leaf, seen=seen: (
                    not seen.append(sj.typing.plain_path(path))
                ),
            )
            self.assertEqual(seen, [("blocks", "0", "ffn", "kernel")])

    def test_what_has_two_axes_is_governed_unless_named_otherwise(self):
        params = {
            "cls_token": jnp.ones((1, 8)),
            "lora_a": jnp.ones((8, 2)),
            "position": {"embedding": jnp.ones((16, 8))},
        }
        self.assertEqual(names(params), ["['cls_token']", "['lora_a']"])


class WhereTest(parameterized.TestCase):
    @parameterized.parameters(
        (lambda path, leaf: leaf.ndim == 1,),
        ({"a": True, "b": False, "c": {"d": False}},),
        ({"a": True, "b": None, "c": False},),
    )
    def test_forms(self, where):
        params = {
            "a": jnp.ones(2),
            "b": jnp.ones((2, 2)),
            "c": {"d": jnp.ones((2, 2))},
        }
        self.assertEqual(names(params, where=where), ["['a']"])

    def test_none_leaves_never_reach_the_predicate(self):
        where = lambda path, leaf: leaf.ndim >= 0 and leaf.dtype != jnp.int32  # noqa: E731
        self.assertLen(names(PARAMS, where=where), 6)

    def test_dict_is_a_prefix_of_an_nnx_state(self):
        state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
        found = governed(state, where={"kernel": True, "bias": False})
        self.assertEqual([leaf and leaf.shape for leaf in found], [None, (4, 2)])

    def test_nothing_governed(self):
        with self.assertRaisesRegex(
            ValueError, r"at least one .*\['a'\] float32 \(2,\)"
        ):
            governed({"a": jnp.ones(2)})
        with self.assertRaisesRegex(ValueError, "the tree is empty"):
            governed({})

    def test_uncovered_leaf(self):
        with self.assertRaisesRegex(ValueError, r"`where` must.*\['b'\]"):
            governed({"a": jnp.ones(2), "b": jnp.ones(2)}, where={"a": True})

    def test_unused_entry(self):
        with self.assertRaisesRegex(ValueError, "its entry at c/d is above no leaf"):
            governed({"a": jnp.ones(2)}, where={"a": True, "c": {"d": True}})

    def test_entries_of_what_a_wrapper_hides_are_allowed(self):
        """`optax.masked` and `partition` put an empty node where a leaf was."""
        where = {"a": True, "b": False, "c": {"d": None, "e": 0}}
        hidden = optax.MaskedNode()
        whole = {"a": jnp.ones(2), "b": hidden, "c": {"d": hidden, "e": hidden}}
        self.assertEqual(names(whole, where=where), ["['a']"])
        with self.assertRaisesRegex(ValueError, "its entry at f is above no leaf"):
            governed(whole, where=where | {"f": True})

    def test_a_field_called_value(self):
        class Attention(NamedTuple):
            query: Any
            value: Any

        params = {"a": Attention(*[jnp.ones(2)] * 2)}
        where = {"a": Attention(True, False)}
        self.assertEqual(names(params, where=where), ["['a'].query"])
        where = {"a": Attention(False, True)}
        self.assertEqual(names(params, where=where), ["['a'].value"])

    def test_integers_cannot_be_governed(self):
        with self.assertRaisesRegex(TypeError, r"floating; got int32 at \['a'\]"):
            governed({"a": jnp.ones((2, 2), jnp.int32)}, where=lambda p, x: True)


class PatternAndStackedTest(parameterized.TestCase):
    def test_per_leaf(self):
        params = {"a": jnp.ones((8, 8)), "b": jnp.ones((2, 8, 8))}
        by_tree = governed(
            params,
            pattern={"a": Block((2, 2)), "b": NM(2, 4)},
            stacked={"a": 0, "b": 1},
        )
        by_function = governed(
            params,
            pattern=lambda path, leaf: Block((2, 2)) if leaf.ndim == 2 else NM(2, 4),
            stacked=lambda path, leaf: leaf.ndim - 2,
        )
        self.assertEqual(by_tree, by_function)
        self.assertEqual([leaf.unit_shape for leaf in by_tree], [(4, 4), (2, 8, 8)])
        self.assertEqual([leaf.stacked for leaf in by_tree], [0, 1])

    def test_leaves_are_hashable(self):
        self.assertIsInstance(hash(governed(PARAMS)), int)

    @parameterized.parameters(
        ("query", (8, 2, 4), 0, True),
        ("query", (3, 8, 4), 1, False),
        ("conv_in", (3, 8, 4), 0, False),
        ("Conv_0", (3, 8, 4), 0, False),
        ("stem", (3, 3, 8, 4), 0, False),
        ("stem", (3, 3, 3, 8, 4), 0, False),
        ("dense", (8, 4), 0, False),
    )
    def test_default_axis_of_nm(self, name, shape, stacked, raises):
        params = {name: {"kernel": jnp.ones(shape)}}
        if raises:
            with self.assertRaisesRegex(ValueError, rf"the default N:M axis.*{name}"):
                governed(params, pattern=NM(2, 4), stacked=stacked)
            axis_named = NM(2, 4, axis=0)
            self.assertLen(names(params, pattern=axis_named, stacked=stacked), 1)
        else:
            self.assertLen(names(params, pattern=NM(2, 4), stacked=stacked), 1)

    @parameterized.parameters(
        (("Conv_0", "kernel"), False),
        (("conv", 0), False),
        (("blocks", "convs", 1, "kernel"), False),
        (("block", "conv_in"), False),
        (("ConvBlock_0", "query", "kernel"), True),
        (("convs", 0, "attention", "kernel"), True),
        (("ConvBlock_0", "queries", 0), True),
    )
    def test_a_convolution_is_called_so_by_its_leaf_or_module(self, path, raises):
        params = jnp.ones((3, 8, 4))
        for key in reversed(path):
            params = {key: params}
        params = nnx.State(params)
        if raises:
            with self.assertRaisesRegex(ValueError, "the default N:M axis"):
                governed(params, pattern=NM(2, 4))
        else:
            self.assertLen(names(params, pattern=NM(2, 4)), 1)

    def test_pattern_that_does_not_divide_names_the_leaf(self):
        params = {"head": {"kernel": jnp.ones((10, 64))}}
        match = r"m=4 for axis -2 of shape \(10, 64\).*\['head'\]\['kernel'\]"
        with self.assertRaisesRegex(ValueError, match):
            governed(params, pattern=NM(2, 4))

    def test_no_pattern_at_all(self):
        with self.assertRaises(TypeError):
            sj.patterns.check_patterns(None)

    def test_not_a_pattern(self):
        with self.assertRaisesRegex(TypeError, r"`pattern` must be.*'2:4' at \['a'\]"):
            governed({"a": jnp.ones((4, 4))}, pattern="2:4")

    @parameterized.parameters(("pattern", NM(2, 4)), ("stacked", 0))
    def test_uncovered_leaf(self, name, value):
        params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
        match = rf"`{name}` must.*\['b'\]. Add one \(None where `where` leaves it out\)"
        with self.assertRaisesRegex(ValueError, match):
            governed(params, **{name: {"a": value}})
        arguments = {"where": {"a": True, "b": False}, name: {"a": value, "b": None}}
        self.assertEqual(names(params, **arguments), ["['a']"])

    @parameterized.parameters(-1, 3)
    def test_stacked_out_of_range(self, stacked):
        with self.assertRaisesRegex(ValueError, r"`stacked` must.*at \['a'\]"):
            governed({"a": jnp.ones((4, 4))}, where=lambda p, x: True, stacked=stacked)

    def test_frozen_default(self):
        self.assertEqual(governed(PARAMS), governed(PARAMS, pattern=Unstructured()))
        self.assertNotEqual(governed(PARAMS), governed(PARAMS, pattern=Channel()))


def test_broadcast_prefix_spreads_in_flattening_order():
    prefix = {"b": 1, "a": {"x": None, "y": 2}}
    params = {"a": {"x": 0.0, "y": {"u": 0.0, "v": None}}, "b": [0.0, 0.0]}
    assert broadcast_prefix(prefix, params, name="prefix") == [None, 2, 2, 1, 1]
