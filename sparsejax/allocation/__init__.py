"""How one overall sparsity is spread over the leaves."""

from sparsejax.allocation._erdos_renyi import erdos_renyi as erdos_renyi
from sparsejax.allocation._erdos_renyi import erdos_renyi_kernel as erdos_renyi_kernel
from sparsejax.allocation._uniform import uniform as uniform
