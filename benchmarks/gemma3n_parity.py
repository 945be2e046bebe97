"""Does the Spark FFN without a split equal the Gemma 3n text MLP of transformers?

Random weights and inputs, float32, several widths and sparsities: outputs, and the
gradients of a random linear loss with respect to the input and the three kernels. The
other side is torch code of `transformers.models.gemma3n`, which no one here wrote.
Needs the extra `torch`; runs on a CPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.parts import common
from sparsejax import nn

TOLERANCE = 1e-5  # of the largest value


@dataclasses.dataclass(frozen=True)
class Case:
    d_model: int
    d_ff: int
    sparsity: float  # Gemma 3n's name: the share of neurons that the threshold drops
    tokens: int = 64


CASES = [
    Case(64, 256, 0.95),
    Case(256, 1024, 0.95),
    Case(256, 1024, 0.5),
    Case(256, 1024, 0.0),  # the later layers of Gemma 3n: no threshold
    Case(512, 4096, 0.95),
]
KERNELS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def of_torch(case: Case, weights: dict, x: np.ndarray, slope: np.ndarray) -> dict:
    """Output and gradients of transformers' module; its weights are [d_out, d_in]."""
    import torch
    from transformers.models.gemma3n import configuration_gemma3n, modeling_gemma3n

    config = configuration_gemma3n.Gemma3nTextConfig(
        hidden_size=case.d_model,
        intermediate_size=[case.d_ff],
        num_hidden_layers=1,
        activation_sparsity_pattern=[case.sparsity],
        layer_types=["full_attention"],
    )
    module = modeling_gemma3n.Gemma3nTextMLP(config, layer_idx=0).float()
    with torch.no_grad():
        for name, theirs in KERNELS.items():
            # a copy: torch may keep what it is given
            kernel = torch.tensor(np.array(weights[name].T))
            getattr(module, theirs).weight.copy_(kernel)
    given = torch.tensor(np.array(x), requires_grad=True)
    y = module(given)
    (y * torch.tensor(np.array(slope))).sum().backward()
    out = {"y": y.detach().numpy(), "dx": given.grad.numpy()}
    for name, theirs in KERNELS.items():
        out[f"d{name}"] = getattr(module, theirs).weight.grad.numpy().T
    return out


def of_ours(case: Case, weights: dict, x: np.ndarray, slope: np.ndarray) -> dict:
    k = (1 - case.sparsity) * case.d_ff
    make = functools.partial(nn.SparkFFN, k=k, split=None, rngs=nnx.Rngs(0))
    graph, state = nnx.split(make(case.d_model, case.d_ff))
    state = {name: {"kernel": jnp.asarray(value)} for name, value in weights.items()}

    @jax.jit
    def run(state, x):
        def total(state, x):
            layer = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, state)))
            y = layer(x)
            return jnp.sum(y * slope), y

        (_, y), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            state, x
        )
        return y, *grads

    y, grads, dx = run(state, x)
    out = {"y": y, "dx": dx}
    return out | {f"d{name}": grads[name]["kernel"] for name in KERNELS}


def run(case: Case, seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    weights = {
        "gate": draw(case.d_model, case.d_ff, scale=case.d_model**-0.5),
        "up": draw(case.d_model, case.d_ff, scale=case.d_model**-0.5),
        "down": draw(case.d_ff, case.d_model, scale=case.d_ff**-0.5),
    }
    x, slope = draw(case.tokens, case.d_model), draw(case.tokens, case.d_model)
    operands = (weights, x, slope)
    theirs, ours = of_torch(case, *operands), of_ours(case, *operands)
    row = dataclasses.asdict(case) | {"seed": seed}
    for name, want in theirs.items():
        error = np.abs(np.asarray(ours[name]) - want).max() / np.abs(want).max()
        row[f"{name}_error"] = float(error)
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} differs by {error:.2g} of its largest: {row}")
    return row


def main(argv=None):
    notes = [
        "Errors are the largest difference over the largest value.",
    ]
    common.compare_with_torch(__doc__, CASES, run, notes, argv)


if __name__ == "__main__":
    main()
