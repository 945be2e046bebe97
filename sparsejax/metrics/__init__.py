"""What sparse training is judged by: sparsity, FLOPs, mask drift, activations."""

from sparsejax.metrics._activations import ActivationCounts as ActivationCounts
from sparsejax.metrics._activations import activation_counts as activation_counts
from sparsejax.metrics._activations import activation_density as activation_density
from sparsejax.metrics._activations import union_density as union_density
from sparsejax.metrics._budget import BudgetSearch as BudgetSearch
from sparsejax.metrics._budget import (
    perplexity_budget_search as perplexity_budget_search,
)
from sparsejax.metrics._cett import cett as cett
from sparsejax.metrics._cett import cett_neuron_thresholds as cett_neuron_thresholds
from sparsejax.metrics._cett import cett_threshold as cett_threshold
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
from sparsejax.metrics._laws import ReluLaw as ReluLaw
from sparsejax.metrics._laws import SiluLaw as SiluLaw
from sparsejax.metrics._laws import fit_relu_law as fit_relu_law
from sparsejax.metrics._laws import fit_silu_law as fit_silu_law
from sparsejax.metrics._laws import relu_law as relu_law
from sparsejax.metrics._laws import silu_law as silu_law
from sparsejax.metrics._plots import plot_density as plot_density
from sparsejax.metrics._report import LeafSparsity as LeafSparsity
from sparsejax.metrics._report import SparsityReport as SparsityReport
from sparsejax.metrics._report import sparsity_report as sparsity_report
from sparsejax.metrics._shares import LeafMetrics as LeafMetrics
from sparsejax.metrics._shares import leaf_metrics as leaf_metrics
from sparsejax.metrics._shares import mask_sparsity as mask_sparsity
from sparsejax.metrics._updates import changed_weights as changed_weights
from sparsejax.metrics._updates import dense_update as dense_update
from sparsejax.metrics._updates import update_sparsity as update_sparsity
