"""Do Llama-type models go to transformers and come back with the same logits?

Random weights, float32, dense and pruned, in one file and in several. One way,
transformers' `LlamaForCausalLM` reads what `save_llama` wrote; the other way, a torch
model saves itself and `load_llama` reads the folder. Each time both compute the logits
of the same tokens. The other side is code that no one here wrote. Needs the extras
`models` and `torch`; runs on a CPU.
"""

import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax as sj
from benchmarks.parts import common
from sparsejax import models

TOLERANCE = 1e-4  # of a logit; they have a standard deviation of about 1


@dataclasses.dataclass(frozen=True)
class Case:
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    sparsity: float
    max_shard_bytes: int
    vocab_size: int = 257
    rope_base: float = 1e5
    tokens: int = 64


CASES = [
    Case(64, 2, 4, 2, 16, True, 0.0, 10**9),
    Case(64, 2, 4, 1, 24, False, 0.9, 100_000),  # heads wider than the stream
    Case(576, 3, 9, 3, 64, True, 0.0, 10**9),  # the sizes of SmolLM2-135M
    Case(576, 3, 9, 3, 64, True, 0.5, 5_000_000),
    Case(576, 3, 9, 3, 64, False, 0.9, 10**9),
]


def draw(case: Case, seed: int) -> tuple[models.DecoderConfig, nnx.State]:
    """A model whose every weight is random, norms too; then pruned."""
    config = models.DecoderConfig(
        vocab_size=case.vocab_size,
        d_model=case.d_model,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        d_ff=3 * case.d_model,
        rope_base=case.rope_base,
        tie_embeddings=case.tie_embeddings,
    )
    rng = np.random.default_rng(seed)
    model = models.Decoder(config, rngs=nnx.Rngs(seed))
    params = jax.tree.map(
        lambda x: x if x.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, x.shape)),
        nnx.state(model, nnx.Param),
    )
    if case.sparsity:
        params = sj.apply_masks(params, sj.prune(params, case.sparsity))
    return config, params


def of_ours(model: models.Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens))


def of_torch(folder: pathlib.Path, tokens: np.ndarray) -> tuple[np.ndarray, object]:
    """Logits of the model that transformers reads from the folder, and the model."""
    import torch
    import transformers

    model, report = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(report.values()):
        raise AssertionError(f"transformers does not read all of it: {report}")
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits
    return logits.numpy(), model


def run(case: Case, seed: int) -> dict:
    config, params = draw(case, seed)
    tokens = np.random.default_rng(seed).integers(
        case.vocab_size, size=(2, case.tokens)
    )
    with tempfile.TemporaryDirectory() as parent:
        mine, theirs = pathlib.Path(parent, "mine"), pathlib.Path(parent, "theirs")
        models.save_llama(mine, params, config, max_shard_bytes=case.max_shard_bytes)
        num_files = len(list(mine.glob("*.safetensors")))
        want, module = of_torch(mine, tokens)
        module.save_pretrained(theirs)
        ours = models.load_llama(mine)
        back = models.load_llama(theirs)
    row = dataclasses.asdict(case) | {"seed": seed, "num_files": num_files}
    row["logits_std"] = float(want.std())
    row["to_torch_error"] = float(np.abs(of_ours(ours, tokens) - want).max())
    row["from_torch_error"] = float(np.abs(of_ours(back, tokens) - want).max())
    same = jax.tree.map(
        lambda x, y: np.array_equal(x, y), nnx.state(back, nnx.Param), params
    )
    row["weights_bit_equal"] = all(jax.tree.leaves(same)) and back.config == config
    kernels = [x for x in jax.tree.leaves(nnx.state(back, nnx.Param)) if x.ndim > 1]
    zeros = sum(int((x == 0).sum()) for x in kernels)
    row["zeros_after_torch"] = zeros / sum(x.size for x in kernels)
    errors = max(row["to_torch_error"], row["from_torch_error"])
    if not (errors <= TOLERANCE and row["weights_bit_equal"]):
        raise AssertionError(f"the two sides disagree: {row}")
    return row


def main(argv=None):
    notes = [
        "Errors are the largest difference of a logit.",
        "Bit-equal: weights that transformers read, saved, and load_llama read.",
        "Zeros: share of all matrices, the embedding (never pruned) among them.",
    ]
    common.compare_with_torch(__doc__, CASES, run, notes, argv)


if __name__ == "__main__":
    main()
