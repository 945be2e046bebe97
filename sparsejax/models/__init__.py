"""One decoder-only transformer, shaped by configuration."""

from sparsejax.models._attention import Attention as Attention
from sparsejax.models._config import AttentionFactory as AttentionFactory
from sparsejax.models._config import DecoderConfig as DecoderConfig
from sparsejax.models._config import FFNFactory as FFNFactory
from sparsejax.models._decoder import Decoder as Decoder
from sparsejax.models._decoder import DecoderBlock as DecoderBlock
from sparsejax.models._ffn import GatedFFN as GatedFFN
from sparsejax.models._rope import apply_rope as apply_rope
