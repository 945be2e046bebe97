"""FlexPrefill against loops, and how its budgets follow `alpha`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import attention
from sparsejax.attention import _flex_prefill
from tests.attention import prompts

LENGTH = 49
SMALL = dict(min_budget=4, window=9, sink=2, local=3, block_shape=(2, 2))


def budget_oracle(sums, window, alpha, min_budget):
    """Taken one by one from the highest, while they hold at most `alpha`."""
    taken, mass = 0, 0.0
    for share in sorted(sums / window, reverse=True):
        mass += share
        if mass > alpha:
            break
        taken += 1
    return min(max(min_budget, taken + 1), len(sums))


@functools.cache
def jitted():
    """One trace for every `alpha`."""

    def run(query, key, alpha):
        select = functools.partial(attention.flex_prefill, alpha=alpha, **SMALL)
        mask = select(query, key)
        again = jax.vmap(select)(query[None], key[None])
        return mask, mask.to_blocks(), attention.pair_density(mask, LENGTH), again

    return jax.jit(run)


class FlexPrefillTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 0.3, 0.65, 1.0)
    def test_equals_the_oracle(self, alpha):
        """Budgets come before what is always kept: `inf` in the sums would spoil them.

        And of means, that sum to 1: of sums over the window all would be the least.
        """
        x = prompts.prompt(LENGTH)
        mask, blocks, density, again = jitted()(*x, alpha)
        weights = prompts.weights_oracle(*x, 9)
        budgets = []
        for at in np.ndindex(weights.shape[:2]):
            kept = []
            for sums, always in zip(
                prompts.line_sums_oracle(weights[at]), (range(2), range(3)), strict=True
            ):
                # at 1 the last of float32 may be over it by a rounding
                budget = budget_oracle(sums, 9, min(alpha, 1 - 1e-5), 4)
                budgets.append(budget)
                kept.append(prompts.highest_oracle(sums, budget, always))
            want = prompts.lines_oracle(*kept, LENGTH, (2, 2))
            np.testing.assert_array_equal(blocks[at], want)
            want = prompts.pair_density_oracle(want, LENGTH, (2, 2))
            np.testing.assert_allclose(density[at], want, rtol=1e-5)
        prompts.assert_same_under_vmap(mask, again)
        if alpha == 0:
            self.assertEqual(set(budgets), {4})
        elif alpha < 1:
            self.assertGreater(len(set(budgets)), 2)  # heads and inputs differ
        else:
            self.assertGreater(min(budgets), 30)

    @parameterized.parameters(0.3, 0.8)
    @pytest.mark.once
    def test_filler_has_no_part(self, alpha):
        def select(*x, **lengths):
            return attention.flex_prefill(*x, alpha=alpha, **SMALL, **lengths)

        prompts.assert_filler_has_no_part(jax.jit(select), (18, 33), 33)

    @pytest.mark.once
    def test_a_prompt_shorter_than_the_window(self):
        """Shares are of the queries that are asked, which here are all."""
        x = prompts.prompt(16)

        @jax.jit
        def both(*x):
            alone = [a[:, :6] for a in x]
            select = functools.partial(attention.flex_prefill, alpha=0.5)
            found = select(*x, **SMALL, lengths=6), select(*alone, **SMALL | of_all)
            return [mask.to_blocks() for mask in found]

        of_all = {"window": 6}
        got, want = both(*x)
        np.testing.assert_array_equal(got[:, :, :3, :3], want)

    @pytest.mark.once
    def test_budgets_grow_with_alpha(self):
        shares = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 50)))
        grid = jnp.linspace(0, 1, 21)
        budgets = jax.vmap(lambda a: _flex_prefill._budget(shares, a, 2))(grid)
        self.assertTrue((jnp.diff(budgets, axis=0) >= 0).all())
        np.testing.assert_array_equal(budgets[0], 2)
        self.assertGreaterEqual(budgets[-1].min(), 49)
        self.assertLessEqual(budgets.max(), 50)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min_budget": 33}, "`min_budget` must be at most the 32 keys .*; got 33"),
        ({"min_budget": 2}, "`min_budget` must be at least 3, what is .*; got 2"),
        ({"alpha": 1.5}, r"`alpha` must be in \[0, 1\], a share; got 1.5"),
        ({"window": 0}, "`window` must be at least 1, .*; got 0"),
        ({"block_shape": (3, 33)}, r"`block_shape` must fit .* 32 .*; got \(3, 33\)"),
    ],
)
def test_bad_settings_raise(changed, message):
    with pytest.raises(ValueError, match=message):
        attention.flex_prefill(*prompts.prompt(32), **SMALL | changed)
