"""From the step to a sparsity, a drop fraction or a decay factor.

Each function returns a schedule: a pure function from the step (int32[], traced or not)
to a float32 scalar, as optax schedules are. But `frame_boundaries` returns steps, and
`decay_budget` adds up what a schedule comes to. Optax schedules work too.
"""

from sparsejax.schedules._budget import decay_budget as decay_budget
from sparsejax.schedules._decay import exponential_decay as exponential_decay
from sparsejax.schedules._decay import linear_decay as linear_decay
from sparsejax.schedules._drop import cosine_drop as cosine_drop
from sparsejax.schedules._frames import frame_boundaries as frame_boundaries
from sparsejax.schedules._sparsity import constant as constant
from sparsejax.schedules._sparsity import cubic as cubic
from sparsejax.schedules._sparsity import stepwise as stepwise
