"""Predicts how long the kernels take on GPUs that were not there, from counted instructions; measures nothing.

For each GPU and layer of a Llama the time of a product is the largest of four:

- DRAM: the bytes that have to be read and written once, at the data sheet's bandwidth;
- issue: machine instructions of the kernel's main loop, 128 lanes of them per cycle and multiprocessor;
- L1/shared: what the loop's loads, stores and shuffles move through the data path that L1 and shared memory have in
  common, 128 bytes per cycle and multiprocessor, bank conflicts not counted;
- tensor: the loop's mma.sync, or the operations of wgmma, tcgen05 and dense products, at the tensor cores' rate.

The counts are of lowbit's CUDA and Triton kernels as nvcc and Triton compile them here, and of bitsandbytes' as its
wheel has them. What wgmma and tcgen05 read of shared memory themselves is not counted. Of each
library the fastest path is shown; for products of many rows both decode the weight and call cuBLAS, which is taken to
reach the whole bandwidth or the whole peak. Left out for both: launches, what comes before and after the loop, GPUs
that are not filled, latency. So these are lower bounds, and where they are close nothing is said about who is faster.

    python benchmarks/predict_gpu.py --plot prediction.png --json prediction.json
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from machine_code import Kernel, count, disassemble
from rich.console import Console
from rich.table import Table
from triton_code import linear_configs, linear_loop

ROOT = Path(__file__).parent.parent
TITLE = "PREDICTION from counted instructions, not a measurement"


@dataclass(frozen=True)
class Gpu:
    """``mma``: 16-bit FMAs per cycle and multiprocessor that mma.sync reaches with fp32 sums. Sources: NVIDIA's data
    sheets (dense rates, boost clocks). mma.sync: on Hopper 62% of the peak (Luo et al., "Benchmarking and Dissecting
    the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024); on the B200, whose peak needs tcgen05, taken to be
    what it is on the A100."""

    name: str
    arch: str
    processors: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    peak: float  # TFLOP/s, bf16 with fp32 sums
    mma: float


GPUS = (
    Gpu("A100 80GB", "sm_80", 108, 1.41, 2039, 312, 1024),
    Gpu("H100 SXM", "sm_90", 132, 1.83, 3350, 989, 1270),
    Gpu("H200", "sm_90", 132, 1.83, 4800, 989, 1270),
    Gpu("B200", "sm_100", 148, 1.85, 8000, 2250, 1024),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1008, 165, 256),
)

#: out_features, in_features
LAYERS = {
    "8B q, o": (4096, 4096),
    "8B k, v": (1024, 4096),
    "8B gate, up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B q, o": (8192, 8192),
    "70B k, v": (1024, 8192),
    "70B gate, up": (28672, 8192),
    "70B down": (8192, 28672),
}
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)

#: Blocks of 64, double-quantized: 4 bits, 8 bits per block, 32 bits per 256 blocks.
WEIGHT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
CUDA, TRITON, BITSANDBYTES = "lowbit", "lowbit's Triton", "bitsandbytes"
LIBRARIES = (CUDA, TRITON, BITSANDBYTES)


@dataclass(frozen=True)
class Loop:
    """A kernel's main loop: where it is found, and how many weights a lane takes in it.

    ``kernel`` is a pattern of the mangled name; its group ``rows``, if it has one, is the number of rows of x that one
    reading of W serves, otherwise ``rows`` is (0: W is only decoded). ``weights`` is per instruction of an opcode of
    the loop, divided by rows / 8 where ``per_row_tile`` (mma of several row tiles meet one weight).
    """

    operation: str
    library: str
    source: str  # under csrc/cuda, or BITSANDBYTES
    kernel: str
    holds: tuple[str, ...]
    weights: dict[str, float]
    rows: int = 0
    per_row_tile: bool = False


#: Kernels that this build lacks are left out, and said to be.
LOOPS = (
    Loop("dequantize", "lowbit", "dequantize.cu", r"17dequantize_kernelI\w*4Bf16ELb1E", ("LDG.128", "STG.128"),
         {"LDG.128": 32}),
    Loop("linear", "lowbit", "gemv.cu", r"gemv_mma_kernelI\w*4Bf16ELi2ELi1E", ("HMMA.16816",), {"HMMA.16816": 8}, 4),
    Loop("linear", "lowbit", "gemv.cu", r"gemv_mma_kernelI\w*4Bf16ELi2ELi2E", ("HMMA.16816",), {"HMMA.16816": 4}, 8),
    Loop("linear", "lowbit", "gemm.cu", r"gemm_kernelI\w*4Bf16ELi(?P<rows>\d+)ELi64ELb1E", ("HMMA.16816", "LDGSTS"),
         {"HMMA.16816": 8}, per_row_tile=True),
    Loop("linear_grad_input", "lowbit", "grad_input.cu", r"grad_input_mma_kernelI\w*4Bf16ELi(?P<rows>\d+)ELb1E",
         ("HMMA.16816", "LDGSTS"), {"HMMA.16816": 8}, per_row_tile=True),
    Loop("dequantize", BITSANDBYTES, BITSANDBYTES, r"kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2E",
         ("LDG.U8", "STG"), {"STG.U16": 1, "STG.128": 8}),
    Loop("linear", BITSANDBYTES, BITSANDBYTES, r"gemm_4bit_simtI13__nv_bfloat16Li(?P<rows>\d+)E", ("LDG.EF.128",),
         {"LDG.EF.128": 32}),
    Loop("linear", BITSANDBYTES, BITSANDBYTES, r"gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li(?P<rows>\d+)E",
         ("LDG.EF", "HMMA"), {"LDG.EF.128": 32, "LDG.EF.64": 16}),
)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """What a loop costs per weight."""

    operation: str
    library: str
    kernel: str
    rows: int
    instructions: float
    cycles: float  # of the L1/shared data path, for a lane's weight: 32 lanes share each
    macs: float  # of mma.sync
    peak_macs: float = 0.0  # of wgmma and tcgen05, which reach the peak


#: Bytes that a lane moves through the L1/shared data path, by the opcode's last number.
_WIDTHS = {"U8": 4, "S8": 4, "U16": 4, "S16": 4, "64": 8, "128": 16}
_MMA_MACS = {"HMMA.16816": 2048, "HMMA.1688": 1024}


def data_path_cycles(body: list[str]) -> float:
    """Cycles in which L1 and shared memory serve one execution of a warp, without bank conflicts."""
    cycles = 0.0
    for text in body:
        opcode, *suffixes = text.split()[0].split(".")
        if opcode == "LDSM":
            cycles += 4 if suffixes[-1] == "4" else 2 if suffixes[-1] == "2" else 1
        elif opcode in ("LDS", "STS", "LDG", "STG", "LDGSTS", "SHFL"):
            width = max((_WIDTHS[suffix] for suffix in suffixes if suffix in _WIDTHS), default=4)
            cycles += 32 * width / 128
    return cycles


def counted(loop: Loop, kernel: Kernel) -> Counted | None:
    """The loop's costs per weight; None where this compilation of the kernel has no such loop."""
    named = re.search(loop.kernel, kernel.name)
    fitting = [body for body in kernel.loops() if all(count(body, opcode) for opcode in loop.holds)]
    if not named or not fitting:
        return None
    body = min(fitting, key=len)
    rows = int(named["rows"]) if "rows" in named.groupdict() else loop.rows
    weights = sum(count(body, opcode) * each for opcode, each in loop.weights.items())
    if loop.per_row_tile:
        weights /= rows / 8
    macs = sum(count(body, opcode) * each for opcode, each in _MMA_MACS.items())
    return Counted(
        loop.operation,
        loop.library,
        kernel.name,
        rows,
        len(body) / weights,
        data_path_cycles(body) / (32 * weights),
        macs / (32 * weights),
    )


def library_of_bitsandbytes() -> Path | None:
    """The newest CUDA library in its wheel."""
    spec = importlib.util.find_spec(BITSANDBYTES)
    found = sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so")) if spec else []
    return found[-1] if found else None


@functools.cache
def kernels_of(source: str, arch: str) -> tuple[Kernel, ...]:
    """The kernels of a source of lowbit, compiled now, or of bitsandbytes' wheel; none where it is not there."""
    if source == BITSANDBYTES:
        library = library_of_bitsandbytes()
        return tuple(disassemble(library, arch)) if library else ()
    path = ROOT / "csrc" / "cuda" / source
    if not path.exists():
        return ()
    cubin = ROOT / "build" / "predict" / f"{path.stem}.{arch}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    command = [
        "nvcc",
        "-O3",
        "-std=c++17",
        f"-I{ROOT / 'csrc'}",
        "-cubin",
        f"-arch={arch}",
        str(path),
        "-o",
        str(cubin),
    ]
    subprocess.run(command, check=True)
    return tuple(disassemble(cubin, arch))


def counted_triton(config, arch: str) -> Counted:
    """The costs per weight of Triton's linear with a configuration: each weight meets all rows of the tile."""
    _, loop = linear_loop(config, arch)
    weights = config.bn * config.bk / (32 * config.warps)
    by_mma_sync = count(loop, "HMMA") > 0
    return Counted(
        "linear",
        TRITON,
        f"linear_kernel, {config.bm} x {config.bn} x {config.bk}, {config.warps} warps",
        config.bm,
        len(loop) / weights,
        data_path_cycles(loop) / (32 * weights),
        config.bm if by_mma_sync else 0.0,
        0.0 if by_mma_sync else config.bm,
    )


@functools.cache
def counts(arch: str) -> tuple[Counted, ...]:
    """Every loop of :data:`LOOPS` that there is, and Triton's."""
    found = [counted(loop, kernel) for loop in LOOPS for kernel in kernels_of(loop.source, arch)]
    found += [counted_triton(config, arch) for config in linear_configs(arch, ROWS)]
    return tuple(entry for entry in found if entry)


@dataclass(frozen=True)
class Prediction:
    """Microseconds, what they are bound by, and the kernel, or the two steps, that take them."""

    microseconds: float
    bound: str
    path: str


def slowest(path: str, seconds: dict[str, float]) -> Prediction:
    bound = max(seconds, key=seconds.get)
    return Prediction(seconds[bound] * 1e6, bound, path)


def of_loop(gpu: Gpu, entry: Counted, m: int, n: int, k: int) -> Prediction:
    """A kernel that reads W once for every ``entry.rows`` rows of x, or (0) writes it in 16 bits."""
    weights = n * k
    passes = -(-m // entry.rows) if entry.rows else 1
    moved = weights * WEIGHT_BYTES + (2 * m * (n + k) if entry.rows else 2 * weights)
    cycles_per_second = gpu.processors * gpu.clock * 1e9
    return slowest(
        f"{entry.rows} rows at once" if entry.rows else "dequantize",
        {
            "DRAM": moved / (gpu.bandwidth * 1e9),
            "issue": passes * weights * entry.instructions / (128 * cycles_per_second),
            "L1/shared": passes * weights * entry.cycles / cycles_per_second,
            "tensor": passes
            * weights
            * (entry.macs / (gpu.mma * cycles_per_second) + entry.peak_macs / (gpu.peak / 2 * 1e12)),
        },
    )


def of_dense(gpu: Gpu, m: int, n: int, k: int) -> Prediction:
    """cuBLAS on the decoded weight."""
    moved = 2 * n * k + 2 * m * (n + k)
    return slowest("cuBLAS", {"DRAM": moved / (gpu.bandwidth * 1e9), "tensor": 2 * m * n * k / (gpu.peak * 1e12)})


def predict(gpu: Gpu, entries: tuple[Counted, ...], operation: str, m: int, n: int, k: int) -> Prediction | None:
    """The fastest path of one library's ``entries``; None where they lack what :data:`LOOPS` lists for the operation.

    m is not read for dequantize.
    """
    paths = [of_loop(gpu, entry, m, n, k) for entry in entries if entry.operation == operation]
    libraries = {entry.library for entry in entries}
    if not paths and any(loop.operation == operation and loop.library in libraries for loop in LOOPS):
        return None
    if operation != "dequantize":
        dense = of_dense(gpu, m, n, k)
        for decoded in (of_loop(gpu, entry, 0, n, k) for entry in entries if entry.operation == "dequantize"):
            longer = max(decoded, dense, key=lambda step: step.microseconds)
            total = decoded.microseconds + dense.microseconds
            paths.append(Prediction(total, longer.bound, "dequantize, cuBLAS"))
    return min(paths, key=lambda path: path.microseconds, default=None)


def rows_of(gpu: Gpu, rows: tuple[int, ...], layers: dict[str, tuple[int, int]]) -> list[dict]:
    """One dict per layer, operation and number of rows."""
    found = counts(gpu.arch)
    result = []
    cases = [("dequantize", 0), *((operation, m) for operation in ("linear", "linear_grad_input") for m in rows)]
    for layer, (n, k) in layers.items():
        for operation, m in cases:
            row = {"gpu": gpu.name, "layer": layer, "n": n, "k": k, "operation": operation, "m": m}
            for library in LIBRARIES:
                entries = tuple(entry for entry in found if entry.library == library)
                if library == TRITON and not linear_configs(gpu.arch, (m,)):
                    continue  # so many rows are not for its kernel
                prediction = predict(gpu, entries, operation, m, n, k)
                if prediction:
                    row[library] = asdict(prediction)
            if CUDA in row and BITSANDBYTES in row:
                row["ratio"] = row[BITSANDBYTES]["microseconds"] / row[CUDA]["microseconds"]
            result.append(row)
    return result


def print_counts(console: Console, archs: list[str]) -> None:
    """What the predictions rest on."""
    table = Table(
        "arch", "operation", "library", "rows", "instructions", "L1/shared cycles x 32", "kernel",
        title="Counted in the machine code, per weight",
    )  # fmt: skip
    for arch in archs:
        for e in counts(arch):
            name = re.sub(r".*?\d(?=[a-zA-Z_]*(?:gem|grad|dequant|kDequant))", "", e.kernel)[:48]
            costs = (f"{e.instructions:.2f}", f"{32 * e.cycles:.2f}")
            table.add_row(arch, e.operation, e.library, str(e.rows or ""), *costs, name)
    console.print(table)
    for loop in LOOPS:
        for arch in archs:
            if not any(re.search(loop.kernel, e.kernel) for e in counts(arch)):
                console.print(f"not there for {arch}: {loop.library} {loop.source} {loop.kernel}", markup=False)


def print_predictions(console: Console, gpu: Gpu, rows: list[dict]) -> None:
    sides = [title for library in LIBRARIES for title in (f"{library} us", "bound by", "path")]
    titles = ("layer", "out x in", "operation", "rows", *sides, "times faster")
    table = Table(*titles, title=f"{gpu.name}: {TITLE}")
    for row in rows:
        cells = [row["layer"], f"{row['n']} x {row['k']}", row["operation"], str(row["m"] or "")]
        for library in LIBRARIES:
            found = row.get(library)
            cells += [f"{found['microseconds']:.1f}", found["bound"], found["path"]] if found else [""] * 3
        table.add_row(*cells, f"{row['ratio']:.2f}" if "ratio" in row else "")
    console.print(table)


def plot(path: str, rows: list[dict], layer: str) -> None:
    """Time over rows of x for one layer, a picture per operation and GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    operations = ("linear", "linear_grad_input")
    figure, grid = pyplot.subplots(
        len(operations),
        len(gpus),
        figsize=(max(7.5, 3.2 * len(gpus)), 6.4),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for line, operation in zip(grid, operations, strict=True):
        for axes, gpu in zip(line, gpus, strict=True):
            shown = [r for r in rows if (r["gpu"], r["operation"], r["layer"]) == (gpu, operation, layer)]
            for library, style in ((CUDA, "C0o-"), (TRITON, "C2^:"), (BITSANDBYTES, "C1s--")):
                points = [(r["m"], r[library]["microseconds"]) for r in shown if library in r]
                axes.plot([m for m, _ in points], [time for _, time in points], style, label=library, markersize=4)
            axes.set_title(f"{operation}\n{gpu}, predicted", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
    for axes in grid[-1]:
        axes.set_xlabel("rows")
    for line in grid:
        line[0].set_ylabel("microseconds, predicted")
    grid[0][0].legend(fontsize=8)
    shape = " x ".join(map(str, LAYERS[layer]))
    figure.suptitle(f"Llama {layer} ({shape}), bf16, NF4, double quantization\n{TITLE}", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="append", choices=[gpu.name for gpu in GPUS], help="default: all")
    parser.add_argument("--layer", action="append", choices=list(LAYERS), help="default: all")
    parser.add_argument("--rows", help=f"default: {','.join(map(str, ROWS))}")
    parser.add_argument("--json", help="write the predictions and the counts here")
    parser.add_argument("--plot", help="draw time over rows, for the first layer, here")
    options = parser.parse_args(arguments)
    gpus = [gpu for gpu in GPUS if not options.gpu or gpu.name in options.gpu]
    layers = {name: size for name, size in LAYERS.items() if not options.layer or name in options.layer}
    rows = tuple(int(m) for m in options.rows.split(",")) if options.rows else ROWS

    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        predictions = {gpu: rows_of(gpu, rows, layers) for gpu in gpus}
    except FileNotFoundError as missing:  # nvcc, or the disassembler
        console.print(f"cannot count: {missing}", markup=False)
        return 1
    archs = list(dict.fromkeys(gpu.arch for gpu in gpus))
    print_counts(console, archs)
    for gpu, found in predictions.items():
        print_predictions(console, gpu, found)
    everything = [row for found in predictions.values() for row in found]
    if options.json:
        wheel = importlib.metadata.version(BITSANDBYTES) if library_of_bitsandbytes() else None
        report = {
            "what": TITLE,
            "bitsandbytes": wheel,
            "gpus": [asdict(gpu) for gpu in gpus],
            "counts": {arch: [asdict(entry) for entry in counts(arch)] for arch in archs},
            "rows": everything,
        }
        Path(options.json).write_text(json.dumps(report, indent=1))
    if options.plot:
        plot(options.plot, everything, next(iter(layers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
