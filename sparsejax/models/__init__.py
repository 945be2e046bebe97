"""One decoder-only transformer, shaped by configuration."""

from sparsejax.models._config import AttentionFactory as AttentionFactory
from sparsejax.models._config import DecoderConfig as DecoderConfig
from sparsejax.models._config import FFNFactory as FFNFactory
from sparsejax.models._decoder import Decoder as Decoder
from sparsejax.models._decoder import DecoderBlock as DecoderBlock
from sparsejax.models._llama import llama_config as llama_config
from sparsejax.models._llama import load_llama as load_llama
from sparsejax.models._llama import save_llama as save_llama
