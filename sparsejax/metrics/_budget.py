"""How much error a model stands: the largest CETT within a budget of perplexity."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import ArrayLike, Float


class BudgetSearch(NamedTuple):
    """What `perplexity_budget_search` found."""

    cett: float  # the target to calibrate every layer with, in [0, 1)
    ratio: float  # perplexity at it over the dense one; below 1 + budget
    evaluations: int  # values of CETT that were tried


def perplexity_budget_search(
    loss_dense: Float[ArrayLike, "*checkpoints"],
    loss_sparse_fn: Callable[[float], SupportsFloat]
    | Sequence[Callable[[float], SupportsFloat]],
    budget: float = 0.01,
    *,
    tolerance: float = 1e-6,
) -> BudgetSearch:
    """Finds the CETT that raises perplexity by the share `budget` (CETT-PPL-p%).

    A loop on the host that bisects CETT in [0, 1]. The density of the sparse model at
    the value found is the activation ratio to report: unlike a count of zeros it
    compares activation functions at equal quality.

    Args:
      loss_dense: mean cross-entropy per token (nats) of the dense model on validation
        data. A list or an array if there are several checkpoints.
      loss_sparse_fn: from a CETT to the same loss on the same data where each layer
        drops its weak neurons (`cett_threshold` with that target). A list with one
        function for each checkpoint: their ratios are averaged, which damps the
        fluctuation between checkpoints. Jit it inside; it is called with floats.
      budget: allowed rise of the perplexity; 0.01 is 1%.
      tolerance: width of the bracket at which the search stops. Each halving costs an
        evaluation: 20 for 1e-6.

    Returns:
      The largest CETT tried whose ratio lies within the budget, up to `tolerance` if
      the loss rises with CETT. A loss that is NaN counts as beyond the budget.

    Raises:
      ValueError: if `budget` or `tolerance` is out of range, a dense loss is not
        finite, the lists do not pair up, or the budget is exceeded at CETT 0 already.

    Example:
      >>> found = perplexity_budget_search(2.0, lambda c: 2.0 + c**2)
      >>> round(found.cett, 3), round(found.ratio, 3)
      (0.1, 1.01)

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the CETT-PPL-p%
      metric. Departure: the value returned was itself tried and is within the budget.
    """
    fns = [loss_sparse_fn] if callable(loss_sparse_fn) else list(loss_sparse_fn)
    dense = np.atleast_1d(np.asarray(loss_dense, np.float64)).tolist()
    if not budget > 0:
        raise ValueError(f"`budget` must be positive; got {budget}. 1% is 0.01.")
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be in (0, 1); got {tolerance}.")
    if not dense or len(dense) != len(fns):
        raise ValueError(
            "there must be one dense loss for each sparse one, at least one; got "
            f"{len(dense)} and {len(fns)}."
        )
    if not all(map(math.isfinite, dense)):
        raise ValueError(f"`loss_dense` must be finite; got {dense}.")

    def ratio_at(cett: float) -> float:
        ratios = [
            _perplexity_ratio(float(fn(cett)), loss)
            for fn, loss in zip(fns, dense, strict=True)
        ]
        return sum(ratios) / len(ratios)

    low, high, ratio, evaluations = 0.0, 1.0, None, 0
    while high - low > tolerance:
        middle = (low + high) / 2
        tried, evaluations = ratio_at(middle), evaluations + 1
        if tried < 1 + budget:
            low, ratio = middle, tried
        else:
            high = middle
    if ratio is None:
        ratio, evaluations = ratio_at(low), evaluations + 1
        if not ratio < 1 + budget:
            raise ValueError(
                f"at CETT 0 the perplexity must lie within the budget, {1 + budget} "
                f"times the dense one; got {ratio} times. Compute both losses on the "
                "same tokens."
            )
    return BudgetSearch(low, ratio, evaluations)


def _perplexity_ratio(sparse: float, dense: float) -> float:
    try:
        return math.exp(sparse - dense)
    except OverflowError:
        return math.inf
