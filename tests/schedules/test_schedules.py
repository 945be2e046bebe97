"""Schedules against their formulas, numbers by hand, and under jit."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax import schedules


class CosineDropTest(parameterized.TestCase):
    @parameterized.parameters(
        (0, 0.3), (25, 0.256066), (50, 0.15), (75, 0.043934), (100, 0.0)
    )
    def test_golden(self, step, want):  # 0.15 * (1 + cos(pi * step / 100))
        got = schedules.cosine_drop(0.3, 100)(step)
        self.assertAlmostEqual(float(got), want, delta=5e-7)

    @parameterized.product(drop_fraction=[0.0, 0.3, 1.0], stop_step=[1, 7, 25_000])
    def test_equals_the_published_form(self, drop_fraction, stop_step):
        schedule = schedules.cosine_drop(drop_fraction, stop_step)
        steps = np.unique(np.linspace(0, stop_step, 101).astype(int))
        want = drop_fraction / 2 * (1 + np.cos(np.pi * steps / stop_step))
        got = schedule(steps)
        self.assertEqual(got.dtype, jnp.float32)
        # float32 of the step: a relative error of 1e-7 in the angle
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7 * drop_fraction)

    def test_starts_whole_and_is_exactly_zero_from_the_end(self):
        schedule = schedules.cosine_drop(1.0, 1000)
        self.assertEqual(float(schedule(0)), 1.0)
        self.assertGreater(float(schedule(999)), 0)
        for step in (1000, 1001, 10**6):
            self.assertEqual(float(schedule(step)), 0.0)

    @parameterized.parameters(
        (-0.1, 10, "`drop_fraction` must be in"),
        (1.1, 10, "got 1.1"),
        (math.nan, 10, "got nan"),
        (0.3, 0, "`stop_step` must be at least 1; got 0"),
    )
    def test_errors(self, drop_fraction, stop_step, match):
        with self.assertRaisesRegex(ValueError, match):
            schedules.cosine_drop(drop_fraction, stop_step)


class SparsityTest(parameterized.TestCase):
    @parameterized.parameters(
        (1000, 0),
        (1200, 0.2439),
        (1500, 0.520312),
        (2000, 0.7875),
        (2500, 0.885938),
        (3000, 0.9),
    )
    def test_cubic_golden(self, step, want):  # 0.9 * (1 - (1 - progress)**3)
        schedule = schedules.cubic(0.9, begin=1000, end=3000)
        self.assertAlmostEqual(float(schedule(step)), want, delta=6e-7)

    def test_cubic_holds_outside(self):
        schedule = schedules.cubic(0.9, begin=10, end=20, initial=0.5)
        for step, want in ((0, 0.5), (10, 0.5), (20, 0.9), (10**6, 0.9)):
            self.assertAlmostEqual(float(schedule(step)), want, delta=1e-7)

    def test_cubic_starts_at_exactly_zero(self):
        self.assertEqual(float(schedules.cubic(0.9, begin=0, end=20)(0)), 0.0)

    def test_cubic_span(self):
        with self.assertRaisesRegex(ValueError, "begin=5, end=5"):
            schedules.cubic(0.9, begin=5, end=5)

    def test_cubic_range(self):
        with self.assertRaisesRegex(
            ValueError, r"`final` must .* \[0, 1\); got 90.*divide"
        ):
            schedules.cubic(90, begin=0, end=5)
        with self.assertRaisesRegex(ValueError, "`initial` must be .* got -0.1"):
            schedules.cubic(0.9, begin=0, end=5, initial=-0.1)

    def test_stepwise(self):
        schedule = schedules.stepwise([0.0, 0.5, 0.75], [10, 20])
        got = [float(schedule(step)) for step in (0, 9, 10, 19, 20, 99)]
        self.assertEqual(got, [0.0, 0.0, 0.5, 0.5, 0.75, 0.75])
        self.assertEqual(float(schedules.stepwise([0.25], [])(3)), 0.25)

    def test_stepwise_errors(self):
        with self.assertRaisesRegex(ValueError, "one more entry.*got 2 and 2"):
            schedules.stepwise([0.0, 0.5], [1, 2])
        with self.assertRaisesRegex(ValueError, r"must increase; got \(2, 2\)"):
            schedules.stepwise([0.0, 0.5, 0.6], [2, 2])


class DecayTest(parameterized.TestCase):
    """Rates released with Bambhaniya et al., 2024: 1e-4 and 8e-4."""

    def test_exponential_golden(self):
        schedule = schedules.exponential_decay(1e-4)
        self.assertAlmostEqual(float(schedule(6931)), 0.5, delta=1e-4)
        self.assertAlmostEqual(float(schedule(46052)), 0.01, delta=1e-5)
        self.assertEqual(float(schedule(0)), 1.0)

    def test_linear_golden(self):
        schedule = schedules.linear_decay(8e-4)
        self.assertAlmostEqual(float(schedule(625)), 0.5, delta=1e-6)
        self.assertGreater(float(schedule(1249)), 0)
        for step in (1250, 1251, 10**6):
            self.assertEqual(float(schedule(step)), 0)

    @parameterized.product(
        decay=[schedules.linear_decay, schedules.exponential_decay],
        begin=[0, 10],
        hard_after=[None, 30],
    )
    def test_phases(self, decay, begin, hard_after):
        schedule = decay(0.02, begin=begin, hard_after=hard_after)
        for step in range(60):
            u = max(0, step - begin)
            want = 1 - 0.02 * u if decay is schedules.linear_decay else None
            want = math.exp(-0.02 * u) if want is None else max(0.0, want)
            if hard_after is not None and step >= hard_after:
                self.assertEqual(float(schedule(step)), 0.0)
            else:
                self.assertAlmostEqual(float(schedule(step)), want, delta=3e-7)

    @parameterized.product(
        decay=[schedules.linear_decay, schedules.exponential_decay],
        rate=[0.0, -1.0, math.nan],
    )
    def test_rate(self, decay, rate):
        with self.assertRaisesRegex(ValueError, "`rate` must be positive"):
            decay(rate)


class FrameBoundariesTest(parameterized.TestCase):
    @parameterized.parameters(
        (4, 100, 10, 10, (10, 30, 50, 70)),
        (5, 350, 0, 0, (0, 70, 140, 210, 280)),
        (3, 100, 0, 0, (0, 33, 66)),
        (1, 1, 0, 0, (0,)),
    )
    def test_equal_lengths(self, num_frames, total, dense, hard, want):
        got = schedules.frame_boundaries(
            num_frames, total, dense_steps=dense, hard_steps=hard
        )
        self.assertEqual(got, want)

    @parameterized.parameters((0, 100, 0, 0), (4, 3, 0, 0), (2, 10, 5, 4))
    def test_too_short(self, num_frames, total, dense, hard):
        with self.assertRaisesRegex(ValueError, "at least one step"):
            schedules.frame_boundaries(
                num_frames, total, dense_steps=dense, hard_steps=hard
            )

    @parameterized.parameters((-5, 0), (0, -5))
    def test_negative_phases(self, dense, hard):
        match = rf"at least 0; got dense_steps={dense} and hard_steps={hard}"
        with self.assertRaisesRegex(ValueError, match):
            schedules.frame_boundaries(4, 100, dense_steps=dense, hard_steps=hard)


class TracingTest(parameterized.TestCase):
    @parameterized.parameters(
        (schedules.constant(0.3),),
        (schedules.cubic(0.9, begin=2, end=9, initial=0.1),),
        (schedules.stepwise([0.1, 0.2, 0.3], [3, 6]),),
        (schedules.cosine_drop(0.3, 8),),
        (schedules.linear_decay(0.1, begin=2, hard_after=9),),
        (schedules.exponential_decay(0.1, begin=2, hard_after=9),),
    )
    def test_one_trace_equal_to_eager(self, schedule):
        traced = jax.jit(chex.assert_max_traces(schedule, 1))
        for step in range(12):
            got = traced(jnp.int32(step))
            self.assertEqual((got.shape, got.dtype), ((), jnp.float32))
            np.testing.assert_allclose(got, schedule(step), rtol=1e-6, atol=1e-7)


class DecayBudgetTest(parameterized.TestCase):
    def test_golden(self):  # CAST, table XI: 2e-5, 7500 steps
        cosine = optax.warmup_cosine_decay_schedule(0, 2e-5, 375, 7500, 2e-6)
        self.assertAlmostEqual(schedules.decay_budget(cosine, 7500), 0.0289, delta=5e-5)
        self.assertAlmostEqual(schedules.decay_budget(2e-5, 7500), 0.0750, delta=5e-5)

    def test_adams_brings_weights_of_that_size_to_zero(self):
        steps, rate = 400, optax.cosine_decay_schedule(1e-3, 400, 0.1)
        reach = schedules.decay_budget(rate, steps)
        tx = sj.adams(rate, steps, 1e-2, pattern=sj.NM(2, 4))
        start = jnp.array([[9.0], [9.0], [0.9 * reach], [9 * reach]])

        @jax.jit
        def run(params):
            def step(carry, _):
                params, state = carry
                grads = jax.tree.map(jnp.zeros_like, params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

        left = np.abs(run({"kernel": start})["kernel"][:, 0])
        self.assertLess(left[2], 2e-3)
        self.assertGreater(left[3], reach)

    def test_no_steps_raise(self):
        with self.assertRaisesRegex(ValueError, "at least 1; got 0"):
            schedules.decay_budget(1.0, 0)


def test_the_budget_of_an_alpha_out_of_range():
    assert schedules.decay_budget(1e-3, 10, lambda step: 2.0) == pytest.approx(1e-2)
    assert schedules.decay_budget(1e-3, 10, lambda step: step - 100.0) == 0


def test_a_constant_has_the_shape_of_the_steps():
    assert schedules.constant(0.5)(jnp.arange(3)).shape == (3,)
