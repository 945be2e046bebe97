"""What Spark attention multiplies values by, and which keys it selects."""

from sparsejax.ops.spark_weights._api import spark_weights as spark_weights
from sparsejax.ops.spark_weights._reference import highest as highest
from sparsejax.ops.spark_weights._reference import kept_weights as kept_weights
from sparsejax.ops.spark_weights._reference import spark_kept as spark_kept
