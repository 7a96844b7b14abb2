"""Predicts how long the kernels take on GPUs that are not here, from counted instructions. It measures nothing.

For each GPU and layer of a Llama, and of Mixtral's mixture of experts, the time of a kernel follows from what it moves
and executes, by the rules of roofline.py. --check compares these rules with times that others have published.

The main loop of each kernel is counted, and LoRA's loop (of rank 16) if the operation has LoRA. A Triton kernel without
a loop is counted whole. The counts are of lowbit's CUDA and Triton kernels as nvcc and Triton compile them here, and of
bitsandbytes' kernels in its wheel. Reads of shared memory by wgmma and tcgen05 are not counted, nor is tensor memory.

lowbit's CUDA kernels and bitsandbytes are shown by their fastest path. Triton is shown by what its backend would
launch: its tiles, its splits of sums and the launch that adds them up. For products of many rows each may decode the
weight and call cuBLAS. Latency, bank conflicts, and the code before and after the loop are left out for all, so that
close values do not tell which library is faster.

A row of a mixture's product is a token, which 2 of 8 experts multiply. Tokens are spread evenly. Only the weights of
experts that have tokens are read, and each expert's last tile counts as a whole. There is no prediction for the CUDA
kernels there: they are launched once per expert, with scales that torch decodes first.

    python benchmarks/predict_gpu.py --plot prediction.png --json prediction.json
    python benchmarks/predict_gpu.py --check
    python benchmarks/predict_gpu.py --gpu "H100 SXM" --layer "8B q, o" --operation linear --rows 1,64
"""

import argparse
import importlib.metadata
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tools", ".")]
import predict_cuda  # noqa: E402
import predict_triton  # noqa: E402
import published  # noqa: E402
from codegen import cuda_counts  # noqa: E402
from codegen.cuda_counts import BITSANDBYTES, CUDA  # noqa: E402
from codegen.instruction_costs import Counted  # noqa: E402
from codegen.triton_counts import count_all  # noqa: E402
from predict_triton import OPERATIONS, TRITON  # noqa: E402
from prediction_report import plot, print_comparison, print_counts, print_missing, print_predictions  # noqa: E402
from roofline import GPUS, TITLE, Gpu  # noqa: E402

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
#: The same of each expert.
MIXTURE_LAYERS = {
    "8x7B gate, up": (14336, 4096),
    "8x7B down": (4096, 14336),
}
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
CUDA_OPERATIONS = {loop.operation for loop in cuda_counts.LOOPS}

#: (operation, rows of x, or 0 where there is no x, out_features, in_features)
Case = tuple[str, int, int, int]


def cases_of(layers: list[str], operations: list[str], rows: tuple[int, ...]) -> list[tuple[str, Case]]:
    """(layer, case) for each layer, each of its operations, and each number of rows."""
    cases = []
    for layer in layers:
        n, k = (LAYERS | MIXTURE_LAYERS)[layer]
        for operation in operations:
            if OPERATIONS[operation].is_grouped == (layer in MIXTURE_LAYERS):
                cases += [(layer, (operation, m, n, k)) for m in (rows if OPERATIONS[operation].has_x else (0,))]
    return cases


def rows_of(gpu: Gpu, cases: list[tuple[str, Case]]) -> list[dict]:
    """One dict for each case."""
    if predict_triton.is_available():
        count_all([launch for _, case in cases for launch in predict_triton.launched(gpu, *case)], gpu.arch)
    result = []
    for layer, case in cases:
        operation, m, n, k = case
        row = {"gpu": gpu.name, "layer": layer, "n": n, "k": k, "operation": operation, "m": m}
        predictions = {}
        if operation in CUDA_OPERATIONS:
            for library in (CUDA, BITSANDBYTES):
                entries = tuple(entry for entry in cuda_counts.counts(gpu.arch) if entry.library == library)
                predictions[library] = predict_cuda.predict(gpu, entries, *case)
        if predict_triton.is_available():
            predictions[TRITON] = predict_triton.predict(gpu, *case)
        row |= {library: asdict(prediction) for library, prediction in predictions.items() if prediction}
        if CUDA in row and BITSANDBYTES in row:
            row["ratio"] = row[BITSANDBYTES]["microseconds"] / row[CUDA]["microseconds"]
        result.append(row)
    return result


def counts_of(gpus: list[Gpu], cases: list[tuple[str, Case]]) -> dict[str, list[Counted]]:
    """The counts that the predictions rest on, by architecture."""
    operations = CUDA_OPERATIONS & {operation for _, (operation, *_) in cases}
    found = {}
    for gpu in gpus:
        entries = []
        if operations:
            entries += [entry for entry in cuda_counts.counts(gpu.arch) if entry.operation in operations]
        if predict_triton.is_available():
            entries += [entry for _, case in cases for entry in predict_triton.counted(gpu, *case)]
        found[gpu.arch] = list(dict.fromkeys(found.get(gpu.arch, []) + entries))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="append", choices=[gpu.name for gpu in GPUS], help="default: all")
    parser.add_argument("--layer", action="append", choices=[*LAYERS, *MIXTURE_LAYERS], help="default: all")
    parser.add_argument("--operation", action="append", choices=list(OPERATIONS), help="default: all")
    parser.add_argument("--rows", help=f"default: {','.join(map(str, ROWS))}")
    parser.add_argument("--json", help="write the predictions and the counts here")
    parser.add_argument("--plot", help="draw time over rows, for the first layer, here")
    parser.add_argument("--check", action="store_true", help="compare with published times, and end")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    options = parser.parse_args(arguments)
    gpus = [gpu for gpu in GPUS if not options.gpu or gpu.name in options.gpu]
    layers = [name for name in (*LAYERS, *MIXTURE_LAYERS) if not options.layer or name in options.layer]
    operations = [name for name in OPERATIONS if not options.operation or name in options.operation]
    rows = tuple(int(m) for m in options.rows.split(",")) if options.rows else ROWS
    cases = cases_of(layers, operations, rows)
    if not cases:
        parser.error("none of these layers has one of these operations")
    if options.plot and not any(OPERATIONS[operation].has_x for _, (operation, *_) in cases):
        parser.error("--plot: expected a product among the operations")

    console = Console(width=None if sys.stdout.isatty() else 240)
    if options.check:
        print_comparison(console, published.comparison(), options.markdown)
        return 0
    try:
        predictions = {gpu: rows_of(gpu, cases) for gpu in gpus}
        counts = counts_of(gpus, cases)
    except FileNotFoundError as missing:  # nvcc, or the disassembler
        console.print(f"cannot count: {missing}", markup=False)
        return 1
    print_counts(console, counts, options.markdown)
    print_missing(console, counts, operations)
    for gpu, found in predictions.items():
        print_predictions(console, gpu, found, options.markdown)
    everything = [row for found in predictions.values() for row in found]
    if options.json:
        wheel = importlib.metadata.version(BITSANDBYTES) if cuda_counts.library_of_bitsandbytes() else None
        report = {
            "what": TITLE,
            "bitsandbytes": wheel,
            "gpus": [asdict(gpu) for gpu in gpus],
            "counts": {arch: [asdict(entry) for entry in entries] for arch, entries in counts.items()},
            "rows": everything,
        }
        Path(options.json).write_text(json.dumps(report, indent=1))
    if options.plot:
        plot(options.plot, everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
