"""Flax NNX layers: thin shells around pure functions, which `models` is built from."""

from sparsejax.nn._attention import Attention as Attention
from sparsejax.nn._gated_ffn import GatedFFN as GatedFFN
from sparsejax.nn._rope import apply_rope as apply_rope
from sparsejax.nn._spark_attention import SparkAttention as SparkAttention
from sparsejax.nn._spark_ffn import SparkFFN as SparkFFN
