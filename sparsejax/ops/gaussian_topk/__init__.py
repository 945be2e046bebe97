"""What exceeds a Gaussian threshold of its row, also activated and multiplied."""

from sparsejax.ops.gaussian_topk._api import gaussian_topk as gaussian_topk
from sparsejax.ops.gaussian_topk._moments import AxisName as AxisName
from sparsejax.ops.gaussian_topk._moments import num_entries as num_entries
from sparsejax.ops.gaussian_topk._reference import (
    gaussian_threshold as gaussian_threshold,
)
