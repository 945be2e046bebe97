"""Llama-type folders and GGUF files against a slow NumPy Llama, and back."""

import dataclasses
import functools
import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from sparsejax import models, nn
from sparsejax.typing import plain_path

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
SHARED = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
}
# As transformers 4 writes it, and as transformers 5 does.
OLD = SHARED | {
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 100.0,
    "rope_scaling": None,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
}
NEW = SHARED | {
    "num_key_value_heads": 1,
    "head_dim": 6,
    "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
    "dtype": "float32",
    "tie_word_embeddings": False,
}


def draw_weights(values, seed=0):
    """Weights by the names of transformers, `[d_out, d_in]`."""
    rng = np.random.default_rng(seed)
    d, d_ff = values["hidden_size"], values["intermediate_size"]
    head_dim = values.get("head_dim", d // values["num_attention_heads"])
    q = values["num_attention_heads"] * head_dim
    kv = values["num_key_value_heads"] * head_dim
    shapes = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (d_ff, d),
        "mlp.up_proj": (d_ff, d),
        "mlp.down_proj": (d, d_ff),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(values["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    shapes |= {
        "model.embed_tokens.weight": (values["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (values["vocab_size"], d)
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1]) ** (len(shape) - 1)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def half_split(x, position, base):
    half = len(x) // 2
    angle = position * base ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def interleaved(x, position, base):
    y = np.empty_like(x)
    for i in range(len(x) // 2):
        angle = position * base ** (-2 * i / len(x))
        turn = np.exp(1j * angle) * (x[2 * i] + 1j * x[2 * i + 1])
        y[2 * i], y[2 * i + 1] = turn.real, turn.imag
    return y


def llama_oracle(weights, values, base, tokens, rotate=half_split):
    """Float64 logits of one sequence, from the definition, a head at a time."""
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]

    def norm(x, name):
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + values["rms_norm_eps"]) * w[name]

    x = w["model.embed_tokens.weight"][tokens]
    seq = len(tokens)
    for i in range(values["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (
            (y @ w[f"{layer}.self_attn.{part}_proj.weight"].T).reshape(seq, n, -1)
            for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        out = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            qh = np.stack([rotate(q[t, head], t, base) for t in range(seq)])
            kh = np.stack([rotate(k[t, shared], t, base) for t in range(seq)])
            scores = qh @ kh.T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(seq, 1)] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out.append(p / p.sum(axis=-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(out, -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = y @ w[f"{layer}.mlp.gate_proj.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * (y @ w[f"{layer}.mlp.up_proj.weight"].T)
        x = x + hidden @ w[f"{layer}.mlp.down_proj.weight"].T
    tied = "model.embed_tokens.weight"
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w[tied]).T


def write_folder(folder, values, weights, num_files=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if num_files == 1:
        save_file(weights, folder / "model.safetensors")
        return
    files = {
        name: f"part-{i % num_files}.safetensors" for i, name in enumerate(weights)
    }
    for file in set(files.values()):
        part = {name: x for name, x in weights.items() if files[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def write_gguf(path, weights, arch="llama", quantize=(), more=None):
    """As llama.cpp lays out a model of `OLD`; weights go as they are."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(OLD["num_hidden_layers"])
    writer.add_embedding_length(OLD["hidden_size"])
    writer.add_feed_forward_length(OLD["intermediate_size"])
    writer.add_head_count(OLD["num_attention_heads"])
    writer.add_head_count_kv(OLD["num_key_value_heads"])
    writer.add_rope_freq_base(OLD["rope_theta"])
    writer.add_layer_norm_rms_eps(OLD["rms_norm_eps"])
    for key, value in (more or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    for name, x in weights.items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.F32
        if any(part in name for part in quantize):
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def leaves_of(model):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    return {".".join(plain_path(path)): np.asarray(x) for path, x in leaves}


def assert_equal_bits(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        assert got[name].shape == x.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(x).tobytes(), name


forward = nnx.jit(lambda model: model(TOKENS))


@pytest.mark.parametrize(
    ("values", "base", "num_files"), [(OLD, 100.0, 1), (NEW, 50.0, 3)]
)
def test_logits_of_a_folder_equal_the_oracle(tmp_path, values, base, num_files):
    weights = draw_weights(values)
    write_folder(tmp_path, values, weights, num_files)
    got = forward(models.load_llama(tmp_path))
    for row, tokens in zip(got, TOKENS, strict=True):
        want = llama_oracle(weights, values, base, tokens)
        np.testing.assert_allclose(row, want, rtol=1e-5, atol=1e-5)


def test_logits_of_a_gguf_file_equal_the_oracle(tmp_path):
    """The oracle rotates neighbours, as llama.cpp does with what is in the file."""
    weights = draw_weights(OLD)
    write_gguf(tmp_path / "w.gguf", weights)
    model = models.load_llama(tmp_path / "w.gguf")
    write_folder(tmp_path, OLD, weights)
    assert model.config == models.llama_config(tmp_path)
    got = forward(model)
    for row, tokens in zip(got, TOKENS, strict=True):
        want = llama_oracle(weights, OLD, 100.0, tokens, interleaved)
        np.testing.assert_allclose(row, want, rtol=1e-5, atol=1e-5)
    other = llama_oracle(weights, OLD, 100.0, TOKENS[0])
    assert np.abs(other - want).max() > 0.1  # the forms do differ


def test_quantized_tensors_are_dequantized(tmp_path):
    weights = draw_weights(OLD)
    write_gguf(tmp_path / "w.gguf", weights, quantize=["ffn_down", "attn_v", "embd"])
    got = leaves_of(models.load_llama(tmp_path / "w.gguf"))
    for leaf, name, quantized in [
        ("blocks.1.ffn.down.kernel", "model.layers.1.mlp.down_proj.weight", True),
        (
            "blocks.0.attention.value.kernel",
            "model.layers.0.self_attn.v_proj.weight",
            1,
        ),
        ("blocks.0.ffn.up.kernel", "model.layers.0.mlp.up_proj.weight", False),
    ]:
        want = weights[name].T
        # Q8_0: 32 values of a row share a scale of 1/127 of the largest.
        atol = np.abs(want).max() / 127 if quantized else 0
        np.testing.assert_allclose(got[leaf], want, rtol=0, atol=atol)
        assert quantized == (not np.array_equal(got[leaf], want))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000, 1])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype, max_shard_bytes):
    values = (NEW if max_shard_bytes > 1 else OLD) | {"num_hidden_layers": 1}
    weights = {
        name: np.where(abs(x) < 0.1, np.copysign(0, x), x).astype(dtype)
        for name, x in draw_weights(values).items()
    }
    old, new = tmp_path / "old", tmp_path / "new"
    write_folder(old, values | {"dtype": jnp.dtype(dtype).name}, weights)
    model = models.load_llama(old)
    assert model.config.param_dtype == model.config.dtype == dtype
    params = nnx.state(model, nnx.Param)
    settings = {"eos_token_id": 2}
    sizes = {
        "d_model": np.int64(model.config.d_model),
        "norm_eps": np.float64(model.config.norm_eps),
    }
    models.save_llama(
        new,
        params,
        dataclasses.replace(model.config, **sizes),  # NumPy's numbers are numbers
        settings=settings,
        max_shard_bytes=max_shard_bytes,
    )
    again = models.load_llama(new)
    assert again.config == model.config
    assert_equal_bits(leaves_of(again), leaves_of(model))
    assert json.loads((new / "config.json").read_text())["eos_token_id"] == 2

    stored = [load_file(file) for file in new.glob("*.safetensors")]
    assert_equal_bits(functools.reduce(dict.__or__, stored), weights)
    counts = {10**9: 1, 1: len(weights)}
    sizes = [sum(x.nbytes for x in part.values()) for part in stored]
    if max_shard_bytes in counts:
        assert len(stored) == counts[max_shard_bytes]
    else:
        assert len(stored) > 1 and max(sizes) <= max_shard_bytes
    if len(stored) > 1:
        index = json.loads((new / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes)


def test_other_numerics_and_layers_come_by_configuration(tmp_path):
    weights = draw_weights(OLD)
    write_folder(tmp_path, OLD, weights)
    config = dataclasses.replace(
        models.llama_config(tmp_path),
        ffn=functools.partial(nn.BlockSparseFFN, block_shape=(8, 8)),
        param_dtype=jnp.bfloat16,
    )
    model = models.load_llama(tmp_path, config)
    kernel = leaves_of(model)["blocks.0.ffn.gate.kernel"]
    want = weights["model.layers.0.mlp.gate_proj.weight"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel, want)
    mask = model.blocks[0].ffn.gate.block_mask.get_value()
    assert mask.to_dense().all()

    gated = functools.partial(nn.SeerAttention, block=4, distill=True)
    model = models.load_llama(tmp_path, dataclasses.replace(config, attention=gated))
    layer = model.blocks[1].attention
    want = weights["model.layers.1.self_attn.q_proj.weight"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(layer.query.kernel[...], want)
    assert all(leaf.any() for leaf in jax.tree.leaves(layer.gate()))  # drawn

    class Scaled(nn.GatedFFN):
        def __init__(self, *sizes, **settings):
            super().__init__(*sizes, **settings)
            self.scale = nnx.Param(jnp.ones(()))

    spark = functools.partial(nn.SparkFFN, k=4, split=8)
    for ffn, message in [
        (Scaled, r"no place for blocks\.0\.ffn\.scale, blocks\.1\.ffn\.scale\."),
        (spark, r"shape \(64, 8\) .*; got \(64, 32\)\. Correct .* layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.load_llama(tmp_path, dataclasses.replace(config, ffn=ffn))


def test_a_tied_embedding_may_be_stored_twice(tmp_path):
    weights = draw_weights(OLD)
    copy = weights["model.embed_tokens.weight"].copy()
    write_folder(tmp_path / "copy", OLD, weights | {"lm_head.weight": copy})
    write_folder(tmp_path / "once", OLD, weights)
    found = [models.load_llama(tmp_path / name) for name in ("copy", "once")]
    assert_equal_bits(*map(leaves_of, found))
    write_folder(tmp_path / "other", OLD, weights | {"lm_head.weight": copy + 1})
    with pytest.raises(ValueError, match=r"unexpected .*lm_head\.weight"):
        models.load_llama(tmp_path / "other")


def test_stored_angles_of_old_files_are_passed_over(tmp_path):
    weights = draw_weights(OLD)
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_folder(tmp_path, OLD, weights | angles)
    assert models.load_llama(tmp_path).config.rope_base == 100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gpt2"}, NotImplementedError, "must be 'llama'.*got 'gpt2'"),
        ({"model_type": None}, ValueError, "must give `model_type`"),
        ({"architectures": ["LlamaModel"]}, NotImplementedError, "got .'LlamaModel'"),
        ({"hidden_act": "gelu"}, NotImplementedError, "`hidden_act`.*got 'gelu'"),
        ({"mlp_bias": True}, NotImplementedError, "`mlp_bias`.*got True"),
        ({"quantization_config": {}}, NotImplementedError, "must be absent; got {}"),
        ({"rope_scaling": {"factor": 2.0}}, NotImplementedError, "`factor`.*got 2.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            NotImplementedError,
            "`type`.*got 'linear'. Scaled rotary angles",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            NotImplementedError,
            "`rope_type`.*got 'llama3'",
        ),
        ({"rope_parameters": 3}, ValueError, "must be an object; got 3"),
        ({"torch_dtype": "int8"}, NotImplementedError, "`dtype`.*got 'int8'"),
        ({"hidden_size": None}, ValueError, "must give `hidden_size`"),
        ({"hidden_size": "32"}, ValueError, "must be an integer; got '32'"),
        ({"rms_norm_eps": float("nan")}, ValueError, "finite number.*got nan"),
        ({"rope_theta": 10**400}, ValueError, "`rope_theta`.*finite number; got 10"),
        ({"num_hidden_layers": True}, ValueError, "must be an integer; got True"),
        ({"num_attention_heads": 0}, ValueError, "`num_heads` must be at least 1"),
        ({"num_hidden_layers": 3}, ValueError, r"the 3 layers .* no model\.layers\.2"),
        (
            {"num_hidden_layers": 10**12},
            ValueError,
            "must hold the 1000000000000 layers",
        ),
        (
            {"vocab_size": 2**62},
            ValueError,
            r"embed_tokens.* shape \(4611686018427387904",
        ),
        ({"num_hidden_layers": 1}, ValueError, r"unexpected in model.saf.*layers\.1"),
        ({"tie_word_embeddings": False}, ValueError, "missing: lm_head.weight"),
        (
            {"intermediate_size": 60},
            ValueError,
            r"mlp.down_proj.weight in .* must have the shape \(32, 60\) for "
            r"blocks.0.ffn.down.kernel of the model; got \(32, 64\)",
        ),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused(tmp_path, change, error, message):
    write_folder(tmp_path, OLD | change, draw_weights(OLD))
    with pytest.raises(error, match=message) as caught:
        models.load_llama(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_damaged_folders_are_named(tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message) as caught:
            models.load_llama(tmp_path)
        assert str(tmp_path) in str(caught.value)

    refused(FileNotFoundError, "config.json")
    weights = draw_weights(OLD)
    write_folder(tmp_path, OLD, weights, num_files=2)
    models.load_llama(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("part-1", "../part-1"))
    refused(ValueError, r"files beside it; got '\.\./part-1")
    index.write_text(text.replace('norm.weight": "part-1', 'norm.weight": "part-0'))
    refused(ValueError, "by .*index.json; got it in")
    index.write_text(text.replace("model.norm.weight", "model.other.weight"))
    refused(ValueError, "model.norm.weight is in only one")
    index.write_text('{"weight_map": 3}')
    refused(ValueError, "must have an object `weight_map`; got 3")
    index.write_text(text)
    (tmp_path / "part-1.safetensors").write_bytes(b"no header at all")
    refused(ValueError, "part-1.safetensors is not a sound safetensors file")
    (tmp_path / "part-1.safetensors").unlink()
    refused(FileNotFoundError, "index.json must name.*; part-1.safetensors is missing")
    index.unlink()
    refused(FileNotFoundError, "there must be a file .*model.safetensors, or an index")
    int8 = {"model.norm.weight": np.ones(32, np.int8)}
    write_folder(tmp_path, OLD, weights | int8)
    refused(NotImplementedError, "model.norm.weight in .* must be F32.*; got I8")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(ValueError, "config.json is not sound JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(ValueError, "must hold a JSON object")
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing"):
        models.load_llama(tmp_path / "missing")


def test_one_file_of_a_folder_is_refused(tmp_path):
    write_folder(tmp_path, OLD, draw_weights(OLD))
    path = tmp_path / "model.safetensors"
    for read in (models.llama_config, models.load_llama):
        with pytest.raises(ValueError, match=f"got {re.escape(str(path))}.*its folder"):
            read(path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arch": "gpt2"}, NotImplementedError, "architecture.*got 'gpt2'"),
        (
            {"more": {"llama.rope.scaling.type": "yarn"}},
            NotImplementedError,
            "scaling.type.*got 'yarn'",
        ),
        (
            {"more": {"llama.rope.scaling.factor": 2}},
            NotImplementedError,
            "scaling.factor.*got 2",
        ),
        ({"more": {"llama.expert_count": 8}}, NotImplementedError, "expert_count.*8"),
        (
            {"more": {"llama.rope.dimension_count": 4}},
            NotImplementedError,
            "dimension_count.*must be 8.*got 4",
        ),
        ({"more": {"split.count": 2}}, NotImplementedError, "Merge the parts"),
        ({"more": {"llama.vocab_size": 41}}, ValueError, r"shape \(41, 32\)"),
        (
            {"drop": "model.layers.1.mlp.up_proj.weight"},
            ValueError,
            r"missing: blk\.1\.ffn_up\.weight\. Get the files again",
        ),
        ({"drop": "model.norm.weight"}, ValueError, "missing: output_norm.weight"),
        ({"add": "rope_other.weight"}, ValueError, "unexpected.*rope_other.weight"),
    ],
)
def test_a_gguf_file_that_is_not_the_model_is_refused(
    tmp_path, options, error, message
):
    weights = draw_weights(OLD)
    weights.pop(options.pop("drop", None), None)
    if name := options.pop("add", None):
        weights[name] = np.ones(4, np.float32)
    write_gguf(tmp_path / "w.gguf", weights, **options)
    with pytest.raises(error, match=message) as caught:
        models.load_llama(tmp_path / "w.gguf")
    assert str(tmp_path / "w.gguf") in str(caught.value)


def test_rotary_factors_of_a_gguf_file_are_refused_unless_ones(tmp_path):
    path, weights = tmp_path / "w.gguf", draw_weights(OLD)
    write_gguf(path, weights)
    want = models.load_llama(path)
    factors = np.ones(4, np.float32)
    write_gguf(path, weights | {"rope_freqs.weight": factors})
    got = models.load_llama(path)
    assert got.config == want.config
    assert_equal_bits(leaves_of(got), leaves_of(want))
    factors[2:] = 2, 8  # as of "llama3"
    write_gguf(path, weights | {"rope_freqs.weight": factors})
    for read in (models.llama_config, models.load_llama):
        with pytest.raises(
            NotImplementedError,
            match=f"rope_freqs.weight in {re.escape(str(path))} .*up to 8.*use a model",
        ):
            read(path)


def test_a_damaged_gguf_file_is_named(tmp_path):
    path = tmp_path / "w.gguf"
    write_gguf(path, draw_weights(OLD))
    data = path.read_bytes()
    for size in (0, 3, 20, 60, 200, 1_000, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a sound"):
            models.load_llama(path)


class TestSaving:
    @pytest.fixture
    def model(self, tmp_path):
        write_folder(tmp_path / "old", OLD, draw_weights(OLD))
        return models.load_llama(tmp_path / "old")

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            (
                {"ffn": functools.partial(nn.SparkFFN, k=4, split=None)},
                {},
                "`ffn` of layer 0 must be `sj.nn.GatedFFN`",
            ),
            ({"num_layers": 3}, {}, "in only one of the two: blocks.2.*and 5 more"),
            (
                {"vocab_size": 9},
                {},
                r"embed.* must be float32\[9, 32\].*got.*\[40, 32\]",
            ),
            ({"param_dtype": jnp.bfloat16}, {}, "must be bfloat16.*got float32"),
            ({"param_dtype": jnp.float8_e5m2}, {}, "`param_dtype`.*got float8_e5m2"),
            ({"param_dtype": np.float64}, {}, "one of float32.*got float64"),
            ({}, {"settings": {"vocab_size": 9}}, "must not repeat.*got vocab_size"),
            *(
                ({}, {"settings": {"eos_token_id": 2} | setting}, "must not repeat")
                for setting in (
                    {"rope_parameters": {"rope_theta": 5e5}},
                    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                    {"dtype": "bfloat16"},
                    {"quantization_config": {"bits": 4}},
                    {"partial_rotary_factor": 0.5},
                )
            ),
            ({}, {"max_shard_bytes": 0}, "`max_shard_bytes` must be at least 1; got 0"),
        ],
    )
    def test_what_a_reader_would_misread_is_refused(
        self, tmp_path, model, change, options, message
    ):
        config = dataclasses.replace(model.config, **change)
        with pytest.raises(ValueError, match=message):
            models.save_llama(
                tmp_path / "new", nnx.state(model, nnx.Param), config, **options
            )
        assert not (tmp_path / "new").exists()

    def test_a_model_is_not_written_over_another(self, tmp_path, model):
        params = nnx.state(model, nnx.Param)
        with pytest.raises(FileExistsError, match=r"it has model\.safetensors"):
            models.save_llama(tmp_path / "old", params, model.config)

    def test_an_interrupted_folder_is_no_model(self, tmp_path, model, monkeypatch):
        def full_disk(tensors, path, metadata):
            if any(path.parent.iterdir()):
                raise OSError("disk full")
            save_file(tensors, path, metadata)

        monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
        with pytest.raises(OSError, match="disk full"):
            models.save_llama(
                tmp_path / "new",
                nnx.state(model, nnx.Param),
                model.config,
                max_shard_bytes=1,
            )
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            models.load_llama(tmp_path / "new")


def test_what_a_folder_leaves_out_has_the_readers_defaults(tmp_path):
    left_out = ("num_key_value_heads", "hidden_act", "rms_norm_eps")
    values = {name: x for name, x in SHARED.items() if name not in left_out}
    write_folder(tmp_path, values, draw_weights(NEW))
    config = models.llama_config(tmp_path)
    assert config.num_kv_heads == values["num_attention_heads"]
    assert config.rope_base == 10_000 and config.norm_eps == 1e-6
    assert not config.tie_embeddings


def test_a_shard_may_be_filled_to_the_limit(tmp_path):
    weights = draw_weights(OLD)
    write_folder(tmp_path / "old", OLD, weights)
    model = models.load_llama(tmp_path / "old")
    total = sum(x.nbytes for x in weights.values())
    for name, limit, count in (("one", total, 1), ("two", total - 1, 2)):
        params = nnx.state(model, nnx.Param)
        models.save_llama(tmp_path / name, params, model.config, max_shard_bytes=limit)
        assert len(list((tmp_path / name).glob("*.safetensors"))) == count
