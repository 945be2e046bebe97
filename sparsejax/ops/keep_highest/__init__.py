"""Which entries of each row are its highest."""

from sparsejax.ops.keep_highest._api import keep_highest as keep_highest
