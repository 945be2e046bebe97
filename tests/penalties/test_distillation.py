"""distillation_loss against a NumPy loop, and its limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sparsejax import penalties

loss = jax.jit(penalties.distillation_loss, static_argnames="temperature")


def log_softmax(x):
    x = x - x.max()
    return x - math.log(np.exp(x).sum())


def oracle(student, teacher, labels, eta, temperature=1.0, where=None):
    """Huang et al., 2025, equation 13, token by token in float64."""
    classes = student.shape[-1]
    rows = zip(
        student.reshape(-1, classes).astype(np.float64),
        teacher.reshape(-1, classes).astype(np.float64),
        labels.reshape(-1),
        np.ones(labels.size, bool) if where is None else where.reshape(-1),
        strict=True,
    )
    losses = []
    for q, p, label, counts in rows:
        log_p, log_q = log_softmax(p / temperature), log_softmax(q / temperature)
        kl = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        cross_entropy = -log_softmax(q)[label]
        if counts:
            losses.append(eta * kl * temperature**2 + (1 - eta) * cross_entropy)
    return sum(losses) / max(len(losses), 1)


def operands(dtype=jnp.float32, shape=(3, 4), classes=7):
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.normal(size=(2, *shape, classes))
    labels = rng.integers(0, classes, shape)
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype), labels


class DistillationTest(parameterized.TestCase):
    @parameterized.product(
        eta=[0.0, 1 / 3, 1.0],
        temperature=[1.0, 2.0],
        masked=[False, True],
        dtype=[jnp.float32, jnp.bfloat16],
    )
    def test_matches_loop(self, eta, temperature, masked, dtype):
        student, teacher, labels = operands(dtype)
        where = np.random.default_rng(1).random(labels.shape) < 0.5 if masked else None
        got = loss(
            student, teacher, labels, eta=eta, temperature=temperature, where=where
        )
        self.assertEqual((got.shape, got.dtype), ((), jnp.float32))
        student, teacher = (np.asarray(x, np.float32) for x in (student, teacher))
        want = oracle(student, teacher, labels, eta, temperature, where)
        np.testing.assert_allclose(got, want, rtol=1e-5)

    @parameterized.parameters((np.float64(0.3), 2.0), (0.3, np.float64(2.0)))
    def test_float32_whatever_the_numbers_are(self, eta, temperature):
        with jax.enable_x64(True):
            student, teacher, labels = operands()
            got = loss(student, teacher, labels, eta=eta, temperature=temperature)
        self.assertEqual(got.dtype, jnp.float32)

    def test_no_leading_axes(self):
        student, teacher, labels = operands(shape=())
        got = loss(student, teacher, labels, eta=0.5)
        want = oracle(np.asarray(student), np.asarray(teacher), labels, 0.5)
        np.testing.assert_allclose(got, want, rtol=1e-5)

    def test_no_class_is_no_silent_loss(self):
        student, teacher, labels = operands()
        for bad in (-1, student.shape[-1]):
            wrong = labels.copy()
            wrong.flat[0] = bad
            self.assertTrue(np.isnan(loss(student, teacher, wrong, eta=0.5)))
            counts = np.ones(labels.shape, bool)
            counts.flat[0] = False
            got = loss(student, teacher, wrong, eta=0.5, where=counts)
            logits = np.asarray(student), np.asarray(teacher)
            want = oracle(*logits, labels, 0.5, where=counts)
            np.testing.assert_allclose(got, want, rtol=1e-5)

    def test_a_teacher_equal_to_the_student_adds_nothing(self):
        student, _, labels = operands()
        self.assertAlmostEqual(
            float(loss(student, student, labels, eta=1.0)), 0.0, delta=1e-6
        )

    def test_gradients(self):
        student, teacher, labels = operands()
        fn = lambda s, t, eta: loss(s, t, labels, eta=eta)  # noqa: E731
        to_student, to_teacher = jax.grad(fn, argnums=(0, 1))(student, teacher, 0.4)
        np.testing.assert_array_equal(to_teacher, np.zeros(teacher.shape))
        p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
        target = 0.4 * p + 0.6 * jax.nn.one_hot(labels, 7)
        np.testing.assert_allclose(to_student, (q - target) / 12, rtol=1e-4, atol=1e-7)

    def test_the_scale_of_the_gradient_holds_at_high_temperature(self):
        # the factor temperature**2: for hot softmax the KL's gradient is that of
        # half the squared distance of centred logits over the classes
        student, teacher, labels = operands(shape=(1,))
        fn = lambda s: loss(s, teacher, labels, eta=1.0, temperature=1000.0)  # noqa: E731
        apart = student - teacher
        want = (apart - apart.mean(axis=-1, keepdims=True)) / 7
        np.testing.assert_allclose(jax.grad(fn)(student), want, rtol=0.02, atol=1e-3)

    def test_a_class_of_probability_zero(self):
        student, teacher, labels = operands(shape=(2,))
        labels = np.array([0, 1])
        student, teacher = (x.at[:, 6].set(-jnp.inf) for x in (student, teacher))
        fn = lambda s: loss(s, teacher, labels, eta=0.5)  # noqa: E731
        value, grad = jax.value_and_grad(fn)(student)
        want = oracle(
            np.asarray(student[:, :6]), np.asarray(teacher[:, :6]), labels, 0.5
        )
        np.testing.assert_allclose(value, want, rtol=1e-5)
        self.assertTrue(np.isfinite(grad).all())

    def test_no_token(self):
        student, teacher, labels = operands()
        got = loss(student, teacher, labels, eta=0.5, where=jnp.zeros((3, 4), bool))
        self.assertEqual(float(got), 0.0)

    def test_padding_may_hold_anything(self):
        student, teacher, labels = operands()
        where = np.arange(4) < 3
        want = loss(student, teacher, labels, eta=0.5, where=np.tile(where, (3, 1)))
        student = student.at[:, 3].set(jnp.nan)
        got = loss(student, teacher, labels, eta=0.5, where=where)
        np.testing.assert_allclose(got, want, rtol=1e-6)

    @parameterized.parameters("student", "teacher")
    def test_padding_feeds_no_gradient(self, which):
        student, teacher, labels = operands()
        where = np.arange(4) < 3
        grad = jax.grad(functools.partial(loss, eta=0.5, where=where))
        want = grad(student, teacher, labels)
        if which == "student":
            student = student.at[:, 3].set(jnp.nan)
        else:
            teacher = teacher.at[:, 3].set(jnp.nan)
        np.testing.assert_array_equal(grad(student, teacher, labels), want)

    def test_labels_in_a_list(self):
        logits = jnp.arange(6.0).reshape(2, 3)
        got = penalties.distillation_loss(logits, logits, [0, 2], eta=0.0)
        want = penalties.distillation_loss(logits, logits, jnp.array([0, 2]), eta=0.0)
        self.assertEqual(float(got), float(want))

    @parameterized.parameters(
        (
            dict(teacher_logits=jnp.ones((2, 4))),
            r"one shape; got \(2, 3\) and \(2, 4\)",
        ),
        (dict(labels=jnp.zeros((3,), int)), r"`labels` must have shape \(2,\)"),
        (dict(eta=1.5), r"`eta` must be in \[0, 1\]; got 1.5"),
        (dict(temperature=0.0), "`temperature` must be positive; got 0.0"),
        (
            dict(where=jnp.ones((2, 1), bool)),
            r"must broadcast to \(2,\); got bool\[2,1\]",
        ),
        (dict(where=jnp.ones(2)), "`where` must be bool.* got float32", TypeError),
        (dict(labels=jnp.zeros(2)), "`labels` must be .* got float32", TypeError),
    )
    def test_errors(self, change, match, error=ValueError):
        logits = jnp.ones((2, 3))
        arguments = dict(
            student_logits=logits,
            teacher_logits=logits,
            labels=jnp.zeros((2,), int),
            eta=0.5,
        )
        with self.assertRaisesRegex(error, match):
            penalties.distillation_loss(**(arguments | change))
