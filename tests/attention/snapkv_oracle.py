"""SnapKV and Ada-SnapKV by loops over keys."""

import numpy as np

from tests.attention import prompts


def pooled_oracle(x, size):
    """A moving average whose divisor counts the zeros beyond the ends."""
    out = np.zeros(len(x))
    for j in range(len(x)):
        for other in range(j - size // 2, j + size // 2 + 1):
            out[j] += x[other] / size if 0 <= other < len(x) else 0
    return out


def importance_oracle(query, key, window, pool_size, reduce):
    """Of each key of each key head, with `reduce` over queries and heads."""
    weights = prompts.weights_oracle(query, key, window)
    scores = np.zeros((len(weights), prompts.KV_HEADS, key.shape[1]))
    for b, h in np.ndindex(scores.shape[:2]):
        own = weights[b, h * prompts.GROUP : (h + 1) * prompts.GROUP]
        scores[b, h] = pooled_oracle(reduce(own), pool_size)
    return scores


def ada_oracle(scores, num_kept, own, always):
    """One sequence: each head's own first, then pair after pair of head and key."""
    kept = [prompts.highest_oracle(row, own, always) for row in scores]
    heads, keys = scores.shape
    for _ in range(heads * (num_kept - own)):
        left = [(h, j) for h, j in np.ndindex(heads, keys) if j not in kept[h]]
        h, j = max(left, key=lambda at: (scores[at], -at[0], -at[1]))
        kept[h].add(j)
    return kept
