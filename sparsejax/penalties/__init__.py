"""Differentiable penalties."""

from sparsejax.penalties._distillation import distillation_loss as distillation_loss
