"""The main job end to end, tiny: every method, every pattern, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from safetensors import safe_open

import sparsejax as sj
from examples import train_lm
from sparsejax import models, training

pytestmark = pytest.mark.once

TINY = [
    *("--dense-steps", "6", "--steps", "12", "--evaluate-every", "6"),
    *("--d-model", "32", "--num-layers", "1", "--num-heads", "2"),
    *("--batch-size", "2", "--seq-len", "16"),
]


@pytest.fixture(autouse=True, scope="module")
def _compile_fast(tmp_path_factory):
    """Nearly all of a tiny run is compilation, and much of it is that of the last."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    # name: (in these tests, by default)
    options = {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (cache, None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    }
    for name, (here, _) in options.items():
        jax.config.update(name, here)
    compilation_cache.reset_cache()
    yield
    for name, (_, default) in options.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()


@pytest.fixture
def text(tmp_path):
    """Text that a model can learn in a few steps, large enough for the table."""
    path = tmp_path / "text.txt"
    path.write_text("sparse is more, " * 6000)
    return path


def run(tmp_path, text, *options):
    everything = ["--runs", str(tmp_path / "runs"), "--text", str(text)]
    return train_lm.main([*everything, *TINY, *options])


def test_cast_ends_at_exact_2_4(tmp_path, text, capsys):
    rows = run(tmp_path, text)
    assert [row["sparsity"] for row in rows] == [0, 0, 0.5, 0, 0.5]
    assert [row["steps"] for row in rows] == [6, 18, 18, 18, 18]
    assert rows[1]["to dense, %"] == 0
    losses = [row["bits per byte"] for row in rows]
    assert losses[0] > losses[1]
    folder = tmp_path / "runs" / "train_lm"
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.md").read_text() in capsys.readouterr().out + "\n"
    assert json.loads((folder / "table.json").read_text()) == rows

    # The file alone makes the model again, and every group of four has two zeros.
    path = folder / "sparse.safetensors"
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])
    config = models.DecoderConfig(**config["model"])
    graph, like = nnx.split(models.Decoder(config, rngs=nnx.Rngs(9)), nnx.Param)
    weights, _ = training.load_weights(path, like)
    kernels = [
        np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(weights)
        if sj.typing.plain_path(key)[-1] == "kernel"
    ]
    assert len(kernels) == 7
    for kernel in kernels:
        groups = kernel.reshape(-1, 4, kernel.shape[1])
        assert ((groups != 0).sum(axis=1) == 2).all()
    tokens = np.array([[115, 112, 97]])
    assert np.isfinite(nnx.merge(graph, weights)(tokens)).all()


@pytest.mark.parametrize(
    ("method", "options", "sparsity"),
    [
        ("adams", (), 0.5),
        ("sr_ste", ("--pattern", "1:16"), 15 / 16),
        ("mask_decay", ("--pattern", "1:4"), 0.75),
        ("structure_decay", ("--pattern", "1:4"), 0.75),
        ("magnitude", ("--pattern", "channel", "--sparsity", "0.5"), 0.5),
        ("static", ("--pattern", "block:16x16", "--sparsity", "0.5"), 0.5),
        ("set", ("--pattern", "unstructured", "--sparsity", "0.75"), 0.75),
        ("rigl", ("--dense-steps", "0"), 0.5),
        ("rigl", ("--lr", "0"), 0.5),  # what has grown stays 0, and is kept
        (
            "rigl",
            (
                *("--ffn", "block", "--pattern", "block:16x16"),
                *("--sparsity", "0.5", "--dense-steps", "0"),
            ),
            0.5,
        ),
        ("dense", ("--ffn", "gemma3n"), 0.5),
    ],
)
def test_every_method_runs(tmp_path, text, method, options, sparsity):
    rows = run(tmp_path, text, "--method", method, *options)
    assert all(np.isfinite(row["bits per byte"]) for row in rows)
    for row in (rows[2], rows[-1]):
        assert row["sparsity"] == pytest.approx(sparsity)
    logged = training.Run(tmp_path / "runs" / "train_lm").rows()
    if method != "dense":
        steps = [row for row in logged if row["phase"] == method and "loss" in row]
        assert len(steps) == 12
        assert steps[-1]["sparsity"] == pytest.approx(sparsity)


def test_resume_reads_and_repeats_the_table(tmp_path, text):
    rows = run(tmp_path, text, "--method", "sr_ste")
    assert run(tmp_path, text, "--method", "sr_ste", "--resume") == rows


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_lm.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_named_before_anything_is_written(tmp_path, text, capsys):
    runs = ("--runs", tmp_path / "runs", "--text", text, *TINY)
    short = tmp_path / "short.txt"
    short.write_text("short")
    missing = tmp_path / "missing.txt"
    for options, message in [
        (("--text", missing), f"cannot read the text {missing}"),
        (("--text", short), r"train part .* 34 bytes; got 5 bytes from .*short.txt"),
        (("--pattern", "2:5"), r"divide.*got.*5.*\(32, "),
        (("--pattern", "4:2"), "0 < n <= m"),
        (("--pattern", "twofour"), "must be N:M, unstructured.*'twofour'"),
        (("--pattern", "block:24x24", "--sparsity", "0.5"), r"24.*\['blocks'\]\[0\]"),
        (("--pattern", "unstructured"), "`sparsity` must be given"),
        (("--pattern", "unstructured", "--sparsity", "1.5"), "1.5"),
        (("--method", "structure_decay", "--pattern", "channel"), "needs an N:M"),
        (("--ffn", "block"), "needs --pattern block:HEIGHTxWIDTH; got NM"),
        (
            (
                *("--ffn", "block", "--pattern", "block:8x8", "--sparsity", "0.5"),
                *("--method", "sr_ste"),
            ),
            "must be masked; got the method `sr_ste`",
        ),
        (("--sparsity", "0.9"), "0.9"),
        (("--steps=-1",), "must be 0 or more; got '-1'"),
        (("--evaluate-every", "0"), "must be 1 or more; got '0'"),
        (("--num-heads", "32"), "`head_dim` must be even"),
        (("--seed=-1",), "must be 0 or more; got '-1'"),
        (("--lr", "nan"), "must be 0 or more; got 'nan'"),
        (("--eta", "two"), r"must be in \[0, 1\]; got 'two'"),
        (
            ("--method", "dense", "--pattern", "unstructured"),
            "`sparsity` must be given",
        ),
        (("--method", "structure_decay", "--sparsity", "0.9"), "is 0.5; got 0.9"),
    ]:
        said = refused(capsys, *runs, *options)
        assert re.search(message, said, re.DOTALL), (options, said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--density", "0.3"), "--density is read with --ffn spark or gemma3n alone"),
        (("--ffn", "block", "--density", "0.08"), "--density .* got --ffn block"),
        (("--attended", "4", "--ffn", "spark"), "--attended .* got --attention dense"),
        (("--method", "rigl", "--cast-lr", "1e-3"), "--cast-lr .*cast or adams alone"),
        (("--method", "dense", "--l1-decay", "0"), "--l1-decay .* got --method dense"),
        (("--method", "adams", "--eta", "0.1"), "--eta is read with --method cast"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(tmp_path, capsys, options, message):
    said = refused(capsys, "--runs", tmp_path, *TINY, *options)
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


def test_an_option_that_is_read_and_not_given_has_its_default():
    parser = train_lm.make_parser()
    assert train_lm.parse_args(parser, []) == parser.parse_args([])
    spark = ["--ffn", "spark", "--attention", "spark", "--attended", "4"]
    args = train_lm.parse_args(parser, spark)
    assert (args.attended, args.density) == (4, 0.08)


def test_a_run_is_never_overwritten(tmp_path, text, capsys):
    runs = ("--runs", tmp_path / "runs", "--text", text, *TINY)
    train_lm.main([*map(str, runs), "--method", "dense"])
    folder = tmp_path / "runs" / "train_lm"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said = refused(capsys, *runs, "--method", "dense")
    assert "already holds a run" in said and "Here --resume is `resume=True`" in said
    said = refused(capsys, *runs, "--method", "dense", "--seed", 1, "--resume")
    assert "seed: 0 there, 1 now" in said
    text.write_text("another text, " * 6000)
    said = refused(capsys, *runs, "--method", "dense", "--resume")
    assert "text.sha256" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_stop_says_how_to_go_on(tmp_path, text, capsys, monkeypatch):
    def stopped(*args, **options):
        raise training.Stopped(130)

    monkeypatch.setattr(training, "fit", stopped)
    with pytest.raises(training.Stopped):
        run(tmp_path, text)
    assert "Go on by --resume." in capsys.readouterr().err


def test_spark_layers(tmp_path, text, capsys):
    """Densities are logged, printed and drawn, and a bad one is named."""
    spark = ("--method", "dense", "--ffn", "spark", "--attention", "spark")
    run(tmp_path, text, *spark, "--attended", "4", "--density", "0.1")
    folder = tmp_path / "runs" / "train_lm"
    assert (folder / "density.png").read_bytes().startswith(b"\x89PNG")
    rows = [row for row in training.Run(folder).rows() if "density" in row]
    assert rows and set(rows[0]["density"]) == {"ffn 0", "attention 0"}
    for row in rows:
        assert row["density"]["ffn 0"] == pytest.approx(0.1, abs=0.04)
        assert row["density"]["attention 0"] < 0.75
    assert "density: ffn 0 " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path / "other", text, *spark, "--density", "0.0001")
    assert "error: `k` must be at least 1" in capsys.readouterr().err
