"""Generation with a cache, in which sparse layers read only what is active."""

from sparsejax.decode._cache import Cache as Cache
from sparsejax.decode._cache import slots_for as slots_for
from sparsejax.decode._evict import AdaSnapKV as AdaSnapKV
from sparsejax.decode._evict import SnapKV as SnapKV
from sparsejax.decode._generate import Generated as Generated
from sparsejax.decode._generate import generate as generate
from sparsejax.decode._keys import DoubleSparsity as DoubleSparsity
from sparsejax.decode._keys import Quest as Quest
from sparsejax.decode._keys import channel_scores as channel_scores
from sparsejax.decode._model import DecodeModel as DecodeModel
from sparsejax.decode._model import prepare as prepare
from sparsejax.decode._seer import Seer as Seer
from sparsejax.decode._selector import KeySelector as KeySelector
from sparsejax.decode._selector import LayerTokens as LayerTokens
from sparsejax.decode._step import Overflows as Overflows
from sparsejax.decode._step import decode_step as decode_step
from sparsejax.decode._step import prefill as prefill
