"""Which pages of a cache a query may score highest, by bounds of their keys."""

from sparsejax.ops.highest_pages._api import highest_pages as highest_pages
from sparsejax.ops.highest_pages._reference import page_scores as page_scores
