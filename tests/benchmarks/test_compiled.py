"""What the compiler prints is read right; what is missing is named."""

import importlib.metadata

import pytest

from benchmarks import compiled
from benchmarks.parts import mosaic_compile

# By ptxas 13.0, of a product with too many sums for its registers.
SPILLING = """
.maxntid 384, 1, 1
ptxas info    : (C7519) warpgroup.arrive is injected in around line 533 by compiler \
to allow use of registers in GMMA in function 'body_mosaic_gpu_kernel'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are \
serialized due to insufficient register resources for the wgmma pipeline in the \
function 'body_mosaic_gpu_kernel'
ptxas warning : Registers are spilled to local memory in function \
'body_mosaic_gpu_kernel', 892 bytes spill stores, 892 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    512 bytes stack frame, 892 bytes spill stores, 892 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 512 bytes cumulative stack \
size, 1 bytes smem
        /*0c40*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0d10*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
dynamic shared memory: 131128 bytes
"""


def test_log_of_a_kernel_that_spills():
    report = mosaic_compile.parse(SPILLING, disassembled=True)
    assert report == mosaic_compile.Report(
        registers=168,
        spill_bytes=1784,
        stack_bytes=512,
        shared_bytes=131129,
        threads=384,
        serialized=1,
        hgmma=2,
    )
    row = compiled.row(compiled.Case("product", ("y",), print, ()), "y", report)
    assert not row["ok"]
    assert row["programs_per_sm"] == 1


def test_without_a_disassembler_its_count_is_unknown():
    assert mosaic_compile.parse(SPILLING, disassembled=False).hgmma is None


def test_a_log_without_numbers_is_refused():
    with pytest.raises(mosaic_compile.CompileError, match="no log of `ptxas -v`"):
        mosaic_compile.parse(".maxntid 128, 1, 1", disassembled=False)


@pytest.mark.parametrize(
    "registers, shared_bytes, threads, programs",
    [
        (168, 0, 384, 1),  # 12 warps of 5376 registers, of 65536
        (55, 100377, 128, 2),  # 101504 bytes each, of 233472
        (32, 0, 128, 16),  # 64 warps
        (16, 0, 32, 32),  # no more programs than that
        (255, 0, 128, 2),  # 8192 a warp: 8 warps
        (96, 0, 224, 2),  # 3072 a warp: 5 in each quarter, blocks of 7
        (32, 232448, 128, 1),  # the most that a program may have
        (32, 232449, 128, 0),
    ],
)
def test_programs_of_a_multiprocessor_by_hand(
    registers, shared_bytes, threads, programs
):
    report = mosaic_compile.Report(registers, 0, 0, shared_bytes, threads, 0)
    assert report.programs_per_sm == programs


def test_missing_tools_are_named_with_how_to_get_them(monkeypatch, tmp_path):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError) as error:
        mosaic_compile.Tools.find()
    message = str(error.value)
    assert "version 1.2.3" in message
    assert 'pip install "jax[cuda13]==1.2.3"' in message
    assert "gcc" in message and "ptxas" in message
