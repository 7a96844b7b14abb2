"""benchmarks/predict_gpu.py: what it counts, what it predicts from it, and that it says that it predicts."""

import dataclasses
import functools
import importlib.metadata
import json

import predict_cuda
import predict_gpu
import predict_triton
import published
import pytest
import roofline
from codegen import cuda_counts, triton_counts
from codegen.instruction_costs import Counted
from codegen.machine_code import Kernel, cuobjdump
from conftest_cuda import ROOT, require_nvcc
from roofline import FIRST_LAUNCH, GPUS, NEXT_LAUNCH

H100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
A100 = next(gpu for gpu in GPUS if gpu.name == "A100 80GB")
LOOP = cuda_counts.Loop(
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


def require_triton():
    pytest.importorskip("triton")
    try:
        cuobjdump()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@functools.cache
def h100_counts():
    require_tools()
    return cuda_counts.counts("sm_90")


def test_a_loop_is_counted_per_weight():
    """16 rows are two row tiles, so two mma meet the same 8 weights of a lane."""
    counted = cuda_counts.counted(LOOP, kernel("LDS.64 R0, [R1]", "LDSM.16.M88.4 R0, [R1]", *["HMMA.16816.F32 R0"] * 4))
    assert counted.rows == 16
    assert counted.instructions == 7 / 16
    assert counted.cycles == (2 + 4) / 32 / 16  # the bytes of a warp, 128 in a cycle
    assert counted.macs == 4 * 2048 / 32 / 16
    assert cuda_counts.counted(LOOP, kernel("FFMA R0, R1, R2, R3")) is None
    assert cuda_counts.counted(LOOP, kernel("HMMA.16816.F32 R0", name="gemv")) is None


@pytest.mark.parametrize(
    ("costs", "bound"),
    [
        ((0.1, 0.001, 0.0), "DRAM"),
        ((50.0, 0.001, 0.0), "issue + tensor"),
        ((0.1, 1.0, 0.0), "L1/shared"),
        ((0.1, 0.0, 900.0), "issue + tensor"),
    ],
)
def test_the_largest_of_four_bounds(costs, bound):
    """Another bound than the bottleneck would decide the time."""
    entry = Counted("linear", "lowbit", "gemm", 16, *costs)
    prediction = predict_cuda.of_loop(H100, entry, 16, 4096, 4096)
    assert prediction.bound == bound
    bytes_moved = 4096 * 4096 * predict_cuda.WEIGHT_BYTES + 2 * 16 * 8192
    assert prediction.microseconds - FIRST_LAUNCH >= bytes_moved / H100.bandwidth / 1e3 * (1 - 1e-9)
    if costs[0] == 50.0:
        per_second = 128 * H100.processors * H100.clock * 1e9
        assert prediction.microseconds - FIRST_LAUNCH == pytest.approx(4096 * 4096 * 50 / 0.6 / per_second * 1e6)
        # Rows beyond 16 mean that W is decoded again.
        again = predict_cuda.of_loop(H100, entry, 17, 4096, 4096).microseconds
        assert again - FIRST_LAUNCH == pytest.approx(2 * (prediction.microseconds - FIRST_LAUNCH))


def test_blocks_that_do_not_fill_the_gpu():
    """64 blocks would be as fast on 132 multiprocessors as if they filled them, and few warps as fast as many."""
    entry = Counted("linear", "bitsandbytes", "gemm", 64, 11.0, 0.01, 64.0, columns=64, splits_k=False, resident=3)
    alone = predict_cuda.of_loop(H100, entry, 64, 4096, 4096)
    filled = predict_cuda.of_loop(H100, dataclasses.replace(entry, splits_k=True), 64, 4096, 4096)
    # 8 warps on a multiprocessor fill 44% of the issue slots, 24 the most that is assumed.
    assert alone.microseconds - FIRST_LAUNCH > 132 / 64 * (filled.microseconds - FIRST_LAUNCH)
    assert roofline.last_wave(H100, 133) == pytest.approx(264 / 133) and roofline.last_wave(H100, 0) == 1


def test_x_that_every_tile_of_columns_reads():
    """Narrow tiles read x as often as W, from the L2, and would seem to be bound by DRAM."""
    entry = Counted("linear", "lowbit", "gemm", 64, 0.1, 0.0, 1.0, columns=64)
    assert predict_cuda.of_loop(H100, entry, 64, 14336, 4096).bound == "L2"
    wide = dataclasses.replace(entry, columns=512)
    assert predict_cuda.of_loop(H100, wide, 64, 14336, 4096).bound == "DRAM"


def test_published_times_are_predicted():
    """Predictions that miss what others measured by more than 30% would be believed."""
    compared = published.comparison()
    assert {each.kernel for each, _, _ in compared} >= {published.MARLIN, published.DENSE}
    for each, _, ratio in compared:
        assert 0.7 < ratio < 1.3, each


def test_the_fastest_path_is_chosen():
    """Many rows decode once and go to cuBLAS; an operation whose kernels are not built has no prediction."""
    entries = (
        Counted("dequantize", "lowbit", "dequantize", 0, 4.5, 0.06, 0.0),
        Counted("linear", "lowbit", "gemm", 16, 4.0, 0.03, 4.0),
    )
    assert predict_cuda.predict(H100, entries, "linear", 8, 4096, 4096).path == "16 rows"
    assert predict_cuda.predict(H100, entries, "linear", 2048, 4096, 4096).path == "dequantize, cuBLAS"
    assert predict_cuda.predict(H100, entries[:1], "linear", 8, 4096, 4096) is None
    theirs = (dataclasses.replace(entries[0], library="bitsandbytes"),)
    # bitsandbytes has no kernel for the backward pass.
    assert predict_cuda.predict(H100, theirs, "linear_grad_input", 8, 4096, 4096).path == "dequantize, cuBLAS"


#: By operation and source of a kernel, and the rows of x that it serves: instructions of sm_90 and cycles of the data
#: path that nvcc 13.0 needs for a weight. Other versions of nvcc may differ by a tenth.
CUDA_COSTS = {
    ("dequantize.cu", 0): (4.22, 0.065),
    ("gemv.cu", 4): (1.72, 0.029),
    ("gemv.cu", 8): (1.94, 0.031),
    ("gemm.cu", 16): (2.91, 0.039),
    ("gemm.cu", 32): (3.53, 0.047),
    ("gemm.cu", 64): (5.23, 0.064),
    ("grad_input.cu", 8): (4.52, 0.052),
    ("grad_input.cu", 16): (4.66, 0.054),
    ("grad_input.cu", 32): (4.63, 0.058),
}


@pytest.mark.parametrize("source", sorted({loop.source for loop in cuda_counts.LOOPS if loop.library == "lowbit"}))
def test_every_pattern_finds_its_kernel(source):
    """A kernel that was renamed would silently leave the table, and one whose weights are miscounted be far off."""
    require_tools()
    if not (ROOT / "csrc" / "cuda" / source).exists():
        pytest.skip(f"{source} is not part of this build")
    seen = set()
    for loop in (loop for loop in cuda_counts.LOOPS if loop.source == source):
        found = [cuda_counts.counted(loop, each) for each in cuda_counts.kernels_of(source, "sm_90")]
        assert any(found), loop.kernel
        for entry in filter(None, found):
            instructions, cycles = CUDA_COSTS[source, entry.rows]
            assert entry.instructions == pytest.approx(instructions, rel=0.1), entry
            assert entry.cycles == pytest.approx(cycles, rel=0.1), entry
            # Each weight meets every row once; gemv's tile of 4 rows has two blocks of 64, and half of it is unused.
            assert entry.macs == entry.rows * (2 if (source, entry.rows) == ("gemv.cu", 4) else 1)
            seen.add((source, entry.rows))
    assert seen == {key for key in CUDA_COSTS if key[0] == source}


#: A layer of 4096 x 4096, an expert's of 14336 x 4096: rows, or tokens; bytes of DRAM for a weight, without x and the
#: output; instructions for a weight on an A100 and on an H100 with Triton 3.9. Other versions may differ by a sixth.
TRITON_CASES = {
    "quantize": (0, predict_cuda.WEIGHT_BYTES + 2, 38.3, 40.7),
    "dequantize": (0, predict_cuda.WEIGHT_BYTES + 2, 5.9, 6.0),
    "int8 dequantize": (0, 3, 5.8, 5.9),
    "linear": (128, predict_cuda.WEIGHT_BYTES, 9.5, 9.2),
    "linear with LoRA": (128, predict_cuda.WEIGHT_BYTES, 9.5, 9.2),
    "int8 linear": (128, 1, 12.4, 4.8),
    "linear_grad_input": (128, predict_cuda.WEIGHT_BYTES, 11.7, 9.9),
    "linear_grad_input with LoRA": (128, predict_cuda.WEIGHT_BYTES, 11.7, 9.8),
    "grouped_linear": (256, predict_cuda.WEIGHT_BYTES, 9.5, 8.3),
    "grouped_linear_grad_input": (256, predict_cuda.WEIGHT_BYTES, 11.8, 9.9),
}


def triton_case(operation, m):
    """The case of an operation at a layer's size."""
    return operation, m, 14336 if operation.startswith("grouped") else 4096, 4096


def least_seconds(gpu, entry, weights, weight_bytes, tiles_of_rows):
    """The least time of the kernel that multiplies: the largest of the bounds, from its costs per weight."""
    cycles_per_second = gpu.processors * gpu.clock * 1e9
    executed = weights * tiles_of_rows
    return max(
        weights * weight_bytes / (gpu.bandwidth * 1e9),
        executed * entry.cycles / cycles_per_second,
        executed * entry.instructions / (0.6 * 128 * cycles_per_second)
        + executed * entry.macs / (gpu.mma * cycles_per_second)
        + executed * entry.peak_macs / (gpu.peak / 2 * 1e12),
    )


def test_every_triton_operation_has_a_case():
    assert TRITON_CASES.keys() == predict_triton.OPERATIONS.keys()


@pytest.mark.parametrize("gpu", [A100, H100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("operation", TRITON_CASES)
def test_triton_is_counted(operation, gpu):
    """A loop that Triton lays out in another way would leave the table."""
    require_triton()
    m, weight_bytes, *instructions = TRITON_CASES[operation]
    case = triton_case(operation, m)
    entry = predict_triton.counted(gpu, *case)[0]
    assert (entry.library, entry.operation) == (predict_triton.TRITON, operation)
    assert entry.instructions == pytest.approx(instructions[gpu is H100], rel=1 / 6)
    # Each weight meets all rows of the tile once, and with 32 rows or more a Hopper's tensor cores are asked by wgmma.
    by_wgmma = gpu is H100 and entry.rows >= 64
    assert (entry.macs, entry.peak_macs) == ((0, entry.rows) if by_wgmma else (entry.rows, 0))
    found = triton_counts.costs(predict_triton.launched(gpu, *case)[0], gpu.arch)
    assert (found.tile is None) == (m == 0)
    assert (found.lora is not None) == operation.endswith("LoRA")

    _, _, n, k = case
    rows = predict_triton.rows_by_expert(m) if operation.startswith("grouped") else [m]
    tiles_of_rows = sum(-(-each // entry.rows) for each in rows) if m else 1
    least = 1e6 * least_seconds(gpu, entry, n * k, len(rows) * weight_bytes, tiles_of_rows)
    # Beside it there are x and the output, a LoRA of rank 16, the sums of splits, or the scales' own quantization.
    found_time = predict_triton.predict(gpu, *case).microseconds - FIRST_LAUNCH
    assert least * (1 - 1e-9) <= found_time <= 1.15 * least + NEXT_LAUNCH * len(predict_triton.launched(gpu, *case))


def test_a_lost_loop_is_an_error():
    """A kernel whose loop is not found would pass for a quick one."""
    tile = triton_counts.Tile(16, 8, 16)
    step = ("LDGSTS.E.128 [R1], [R2]", "HMMA.16816.F32 R0", "HMMA.16816.F32 R4")
    found = triton_counts.costs_of(kernel(*step), 4, tile)
    assert (found.body.instructions, found.body.macs) == (4 * 4, 4 * 2 * 2048)
    with pytest.raises(ValueError, match="0 main loops"):
        triton_counts.costs_of(kernel(*step[1:]), 4, tile)
    with pytest.raises(ValueError, match="0 main loops"):  # code behind the end that jumps back
        triton_counts.costs_of(kernel(*step, "EXIT"), 4, tile)
    with pytest.raises(ValueError, match="no tile"):
        triton_counts.costs_of(kernel(*step), 4, None)


@pytest.mark.parametrize("operation", ["linear", "linear_grad_input"])
def test_triton_splits_for_the_gpu(operation):
    """The configuration would not be the backend's for the GPU, or partial sums that fit L2 would go to DRAM."""
    require_triton()
    case = triton_case(operation, 128)
    small = dataclasses.replace(H100, processors=8)
    assert len(predict_triton.launched(small, *case)) == 1 and "splits" not in predict_triton.predict(small, *case).path
    _, adding = predict_triton.launched(H100, *case)
    assert predict_triton.predict(H100, *case).path.endswith(f", {adding.values['SPLITS']} splits")

    def bytes_moved(l2):
        slow = dataclasses.replace(H100, bandwidth=1, l2=l2)  # GB/s
        return predict_triton.predict(slow, *case).microseconds * 1e3

    operands = 4096 * 4096 * predict_cuda.WEIGHT_BYTES + 2 * 128 * 8192
    assert bytes_moved(50) == pytest.approx(operands, rel=1e-3)
    sums = 4 * adding.values["SPLITS"] * 128 * 4096
    assert bytes_moved(0) == pytest.approx(operands + 2 * sums, rel=1e-3)


def test_triton_decodes_first():
    """Many rows would not be predicted as the backend computes them: decoded first."""
    require_triton()
    assert predict_triton.launched(H100, *triton_case("linear", 2048)) == ()
    prediction = predict_triton.predict(H100, *triton_case("linear", 2048))
    assert prediction.path == "dequantize, cuBLAS"
    # int8 reads twice the bytes.
    assert predict_triton.predict(H100, *triton_case("int8 linear", 2048)).microseconds > prediction.microseconds


def test_a_mixture_reads_the_experts_that_have_tokens():
    """One token would read more than two of eight experts, or an expert's last tile would count in part."""
    require_triton()
    assert predict_triton.rows_by_expert(1) == [1, 1, 0, 0, 0, 0, 0, 0]
    slow = dataclasses.replace(H100, bandwidth=1)
    moved = predict_triton.predict(slow, *triton_case("grouped_linear", 256)).microseconds * 1e3
    assert moved == pytest.approx(8 * 14336 * 4096 * predict_cuda.WEIGHT_BYTES + 2 * 512 * (14336 + 4096), rel=1e-3)
    one = predict_triton.predict(slow, *triton_case("grouped_linear", 1)).microseconds * 1e3
    assert one == pytest.approx(2 * 14336 * 4096 * predict_cuda.WEIGHT_BYTES + 2 * 2 * (14336 + 4096), rel=1e-3)
    # 75 and 96 rows for each expert: as many tiles of 32, 64 or 128.
    few, more = (predict_triton.predict(H100, *triton_case("grouped_linear", tokens)) for tokens in (300, 384))
    assert few == more and few.bound != "DRAM"


def test_counts_of_bitsandbytes():
    """Its wheel takes 8.6 instructions per weight for one row and 24 to decode; other counts would be wrong."""
    pytest.importorskip("bitsandbytes")
    theirs = {(e.operation, e.rows): e for e in h100_counts() if e.library == "bitsandbytes"}
    if importlib.metadata.version("bitsandbytes") != "0.50.2":
        pytest.skip("the figures are those of version 0.50.2")
    assert theirs["linear", 1].instructions == pytest.approx(8.6, abs=0.15)
    assert theirs["dequantize", 0].instructions == pytest.approx(24, abs=0.5)


def test_the_report_says_that_it_predicts(tmp_path, capsys):
    """A picture or table that travels alone must not pass for a measurement."""
    h100_counts()
    layers = ("--layer", "8B q, o", "--layer", "8x7B gate, up")
    files = ("--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png"))
    assert predict_gpu.main(["--gpu", "H100 SXM", *layers, "--rows", "128,256", *files]) == 0
    printed = capsys.readouterr().out
    assert "H100 SXM: PREDICTION from counted instructions, not a measurement" in printed
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["what"].startswith("PREDICTION")
    ours = [row for row in report["rows"] if row["operation"] == "linear_grad_input"]
    assert [row["m"] for row in ours] == [128, 256]
    assert all(row["lowbit"]["microseconds"] > 0 for row in ours)
    if predict_triton.is_available():
        assert all(row[predict_triton.TRITON]["microseconds"] > 0 for row in report["rows"])
        counted = {entry["operation"] for entry in report["counts"]["sm_90"]}
        assert counted == predict_triton.OPERATIONS.keys()
    assert (tmp_path / "p.png").stat().st_size > 10_000
