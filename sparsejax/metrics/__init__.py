"""What sparse training is judged by: sparsity, FLOPs, mask drift and exploration."""

from sparsejax.metrics._drift import mask_drift as mask_drift
from sparsejax.metrics._drift import sad as sad
from sparsejax.metrics._exploration import exploration_rate as exploration_rate
from sparsejax.metrics._exploration import update_explored as update_explored
from sparsejax.metrics._flops import Cost as Cost
from sparsejax.metrics._flops import LayerSpec as LayerSpec
from sparsejax.metrics._flops import dense_gradient_cost as dense_gradient_cost
from sparsejax.metrics._flops import forward_flops as forward_flops
from sparsejax.metrics._flops import gradual_training_flops as gradual_training_flops
from sparsejax.metrics._flops import kernel_specs as kernel_specs
from sparsejax.metrics._flops import rigl_cost as rigl_cost
from sparsejax.metrics._flops import sparse_cost as sparse_cost
from sparsejax.metrics._flops import training_flops as training_flops
from sparsejax.metrics._report import LeafSparsity as LeafSparsity
from sparsejax.metrics._report import SparsityReport as SparsityReport
from sparsejax.metrics._report import sparsity_report as sparsity_report
