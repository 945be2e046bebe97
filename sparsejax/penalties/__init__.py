"""What the loss of a sparse model adds: distillation from the dense one."""

from sparsejax.penalties._distillation import distillation_loss as distillation_loss
