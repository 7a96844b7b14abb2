"""benchmarks/predict_gpu.py: what it counts, what it makes of the counts, and that it says that it predicts."""

import dataclasses
import functools
import json
import sys

import pytest
from conftest_cuda import ROOT, require_nvcc

sys.path.append(str(ROOT / "benchmarks"))
import predict_gpu  # noqa: E402
from machine_code import Kernel, cuobjdump  # noqa: E402

H100 = next(gpu for gpu in predict_gpu.GPUS if gpu.name == "H100 SXM")
LOOP = predict_gpu.Loop(
    "linear", "lowbit", "x.cu", r"gemmILi(?P<rows>\d+)E", ("HMMA.16816",), {"HMMA.16816": 8}, 0, True
)


def kernel(*texts, name="gemmILi16E"):
    """A kernel that is one loop of these instructions."""
    lines = [(16 * i, text) for i, text in enumerate((*texts, "BRA 0x0"))]
    return Kernel(name, "sm_90", 32, 0, 0, lines)


def require_tools():
    require_nvcc()
    try:
        cuobjdump()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@functools.cache
def h100_counts():
    require_tools()
    return predict_gpu.counts("sm_90")


def test_a_loop_is_counted_per_weight():
    """16 rows are two row tiles: two mma meet the same 8 weights of a lane."""
    counted = predict_gpu.counted(LOOP, kernel("LDS.64 R0, [R1]", "LDSM.16.M88.4 R0, [R1]", *["HMMA.16816.F32 R0"] * 4))
    assert counted.rows == 16
    assert counted.instructions == 7 / 16
    assert counted.cycles == (2 + 4) / 32 / 16  # the bytes of a warp, 128 in a cycle
    assert counted.macs == 4 * 2048 / 32 / 16
    assert predict_gpu.counted(LOOP, kernel("FFMA R0, R1, R2, R3")) is None
    assert predict_gpu.counted(LOOP, kernel("HMMA.16816.F32 R0", name="gemv")) is None


@pytest.mark.parametrize(
    ("costs", "bound"),
    [
        ((0.1, 0.001, 0.0), "DRAM"),
        ((50.0, 0.001, 0.0), "issue"),
        ((0.1, 1.0, 0.0), "L1/shared"),
        ((0.1, 0.0, 900.0), "tensor"),
    ],
)
def test_the_largest_of_four_bounds(costs, bound):
    """Whatever is the bottleneck decides."""
    entry = predict_gpu.Counted("linear", "lowbit", "gemm", 16, *costs)
    prediction = predict_gpu.of_loop(H100, entry, 16, 4096, 4096)
    assert prediction.bound == bound
    bytes_moved = 4096 * 4096 * predict_gpu.WEIGHT_BYTES + 2 * 16 * 8192
    assert prediction.microseconds >= bytes_moved / H100.bandwidth / 1e3 * (1 - 1e-9)
    if bound == "issue":
        per_second = 128 * H100.processors * H100.clock * 1e9
        assert prediction.microseconds == pytest.approx(4096 * 4096 * 50 / per_second * 1e6)
        # Rows beyond 16 mean that W is decoded again.
        assert predict_gpu.of_loop(H100, entry, 17, 4096, 4096).microseconds == 2 * prediction.microseconds


def test_the_fastest_path_is_chosen():
    """Many rows decode once and go to cuBLAS; an operation whose kernels are not built has no prediction."""
    entries = (
        predict_gpu.Counted("dequantize", "lowbit", "dequantize", 0, 4.5, 0.06, 0.0),
        predict_gpu.Counted("linear", "lowbit", "gemm", 16, 4.0, 0.03, 4.0),
    )
    assert predict_gpu.predict(H100, entries, "linear", 8, 4096, 4096).path == "16 rows at once"
    assert predict_gpu.predict(H100, entries, "linear", 2048, 4096, 4096).path == "dequantize, cuBLAS"
    assert predict_gpu.predict(H100, entries[:1], "linear", 8, 4096, 4096) is None
    theirs = (dataclasses.replace(entries[0], library="bitsandbytes"),)
    # bitsandbytes has no kernel for the backward pass.
    assert predict_gpu.predict(H100, theirs, "linear_grad_input", 8, 4096, 4096).path == "dequantize, cuBLAS"


@pytest.mark.parametrize("source", sorted({loop.source for loop in predict_gpu.LOOPS if loop.library == "lowbit"}))
def test_every_pattern_finds_its_kernel(source):
    """A kernel that was renamed would silently leave the table."""
    require_tools()
    if not (ROOT / "csrc" / "cuda" / source).exists():
        pytest.skip(f"{source} is not part of this build")
    for loop in (loop for loop in predict_gpu.LOOPS if loop.source == source):
        found = [predict_gpu.counted(loop, each) for each in predict_gpu.kernels_of(source, "sm_90")]
        assert any(found), loop.kernel
        for entry in filter(None, found):
            assert 1 < entry.instructions < 10 and 0 < entry.cycles < 0.2, entry


@pytest.mark.parametrize(("arch", "rows", "by_mma_sync"), [("sm_80", 8, True), ("sm_90", 128, False)])
def test_triton_is_counted(arch, rows, by_mma_sync):
    """Beside the CUDA kernels; a loop that Triton lays out in another way must not leave the table."""
    pytest.importorskip("triton")
    (config,) = predict_gpu.linear_configs(arch, (rows,))
    entry = predict_gpu.counted_triton(config, arch)
    assert (entry.library, entry.operation, entry.rows) == (predict_gpu.TRITON, "linear", rows)
    assert (entry.macs, entry.peak_macs) == ((rows, 0) if by_mma_sync else (0, rows))
    assert 4 < entry.instructions < 10 and 0.01 < entry.cycles < 0.3
    gpu = next(gpu for gpu in predict_gpu.GPUS if gpu.arch == arch)
    tensor_seconds = 4096**2 * rows / (gpu.peak / 2 * 1e12)
    assert predict_gpu.of_loop(gpu, entry, rows, 4096, 4096).microseconds >= tensor_seconds * 1e6
    assert predict_gpu.linear_configs(arch, (2048,)) == []  # decoded first


def test_counts_of_bitsandbytes():
    """From its wheel: 8.6 instructions per weight for one row, 24 to decode."""
    pytest.importorskip("bitsandbytes")
    theirs = {(e.operation, e.rows): e for e in h100_counts() if e.library == "bitsandbytes"}
    if predict_gpu.importlib.metadata.version("bitsandbytes") != "0.50.2":
        pytest.skip("the figures are those of version 0.50.2")
    assert theirs["linear", 1].instructions == pytest.approx(8.6, abs=0.15)
    assert theirs["dequantize", 0].instructions == pytest.approx(24, abs=0.5)


def test_the_report_says_that_it_predicts(tmp_path, capsys):
    """A picture or table that travels alone must not pass for a measurement."""
    h100_counts()
    files = ("--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png"))
    assert predict_gpu.main(["--gpu", "H100 SXM", "--layer", "8B q, o", "--rows", "1,64,2048", *files]) == 0
    printed = capsys.readouterr().out
    assert "H100 SXM: PREDICTION from counted instructions, not a measurement" in printed
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["what"].startswith("PREDICTION")
    ours = [row for row in report["rows"] if row["operation"] == "linear_grad_input"]
    assert [row["m"] for row in ours] == [1, 64, 2048]
    assert all(row["lowbit"]["microseconds"] > 0 for row in ours)
    assert (tmp_path / "p.png").stat().st_size > 10_000
