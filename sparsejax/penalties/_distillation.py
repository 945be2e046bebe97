"""Distillation: the dense model is the teacher of its sparse self."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from sparsejax._promotion import along_last
from sparsejax._tokens import token_mask


def distillation_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    eta: ArrayLike,
    temperature: float = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """`eta * KL(teacher || student) + (1 - eta) * cross-entropy`, mean over tokens.

    The KL term is summed over classes, taken at `temperature` and multiplied by
    `temperature**2`, which keeps its gradient's scale; the cross-entropy is at
    temperature 1. No gradient reaches the teacher. Statistics are float32.

    Args:
      student_logits: any floating dtype.
      teacher_logits: of the frozen dense model, same shape.
      labels: class indices; the loss of one out of range is NaN.
      eta: weight of the KL term, in [0, 1]; the paper uses 1/3.
      temperature: positive; the paper has none, that is 1.
      where: which tokens count, broadcast to them; None for all. With none True the
        loss is 0.

    Returns:
      The loss in nats a token, float32 scalar.

    Raises:
      ValueError: if the shapes disagree, `eta` is a number outside [0, 1], or
        `temperature` is not positive.
      TypeError: if the labels are not integers, or `where` is not bool.

    Example:
      >>> logits = jnp.zeros((3, 4))
      >>> labels = jnp.array([0, 1, 2])
      >>> loss = distillation_loss(logits, logits, labels, eta=1 / 3)
      >>> print(f"{loss:.4f}")  # KL is 0, cross-entropy is log(4)
      0.9242

    References:
      Huang et al., 2025, https://arxiv.org/abs/2509.25996, equation 13; the factor
      `temperature**2` is Hinton et al., 2015, https://arxiv.org/abs/1503.02531.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must have one shape; got "
            f"{student_logits.shape} and {teacher_logits.shape}."
        )
    labels = jnp.asarray(labels)
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"`labels` must have shape {student_logits.shape[:-1]}; got {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`labels` must be class indices, integers; got {labels.dtype}."
        )
    if where is not None:
        where = token_mask(where, labels.shape)
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be in [0, 1]; got {eta}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive; got {temperature}.")
    student = student_logits.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
    if where is not None:  # first of all: of NaN there no gradient is to see anything
        student, teacher = (
            jnp.where(where[..., None], logits, 0) for logits in (student, teacher)
        )
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    # a class of probability 0 adds 0, also where its log is -inf
    p = jnp.exp(log_p)
    kl = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1) * temperature**2
    loss = eta * kl - (1 - eta) * _log_likelihood(student, labels)
    loss = loss.astype(jnp.float32)  # a NumPy number may have widened it
    if where is None:
        return jnp.mean(loss)
    total = jnp.sum(jnp.where(where, loss, 0))
    return total / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)


def _log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """That of each label; NaN for one that is no class.

    A comparison with all classes, not a gather: its gradient is one pass over the
    logits, where that of a gather fills zeros and scatters into them.
    """
    classes = along_last(logits.shape[-1], logits.ndim)
    of_label = classes == labels[..., None]
    found = jnp.sum(jnp.where(of_label, jax.nn.log_softmax(logits), 0), axis=-1)
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(is_class, found, jnp.nan)
