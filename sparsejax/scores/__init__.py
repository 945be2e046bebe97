"""How much a weight matters: pure functions from params to trees of scores."""

from sparsejax.scores._magnitude import magnitude as magnitude
from sparsejax.scores._random import random as random
