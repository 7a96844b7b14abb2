"""lowbit against dense torch, bitsandbytes and torchao: products, quantize, dequantize, calls.

python benchmarks/bench_matmul.py --shapes llama-8b --dtype float32 bfloat16 --m 1,8,32,256,2048 --backward
"""

import argparse
import os
import re
import sys

SHAPES = {
    "default": ["4096x4096", "4096x14336", "14336x4096", "4096x1024"],
    "llama-8b": ["4096x4096", "1024x4096", "14336x4096", "4096x14336"],
    "smollm-135m": ["576x576", "192x576", "1536x576", "576x1536"],
    "beside": ["576x576", "192x576", "1536x576", "576x1536", "4096x4096"],
}
OPERATIONS = ("linear", "backward", "dequantize", "quantize", "int8", "search", "overhead")
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def _shape(text: str) -> list[str]:
    if text in SHAPES:
        return SHAPES[text]
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SHAPES)} or OUTxIN (4096x1024), got {text!r}")
    return [text]


def _rows(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers of rows of at least 1 (1,8,32), got {text!r}")
    return [int(part) for part in text.split(",")]


def _operations(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in OPERATIONS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(OPERATIONS)}, got {unknown[0]!r}")
    return chosen


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "stub"], default="cpu", help="stub: stub_cuda.py")
    parser.add_argument("--shapes", nargs="+", type=_shape, help="names, or OUTxIN")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--m", type=_rows, help="rows of x; default: 1,8,32,256,2048, and 1 with --beside")
    parser.add_argument(
        "--ops", type=_operations, default=["linear", "dequantize", "quantize"], help=",".join(OPERATIONS)
    )
    parser.add_argument("--backward", action="store_true", help="add the operation backward (dX)")
    parser.add_argument("--no-reference", action="store_true", help="leave out the slow reference backend")
    parser.add_argument("--format", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--jsonl", metavar="FILE", help="append each row to this file as it comes")
    parser.add_argument("--record", action="store_true", help="keep the ratios to others for this machine (ratios.py)")
    parser.add_argument("--check", action="store_true", help="fail if a ratio fell below 80%% of the recorded one")
    parser.add_argument("--plot", metavar="FILE", help="a roofline, as PNG")
    parser.add_argument("--plot-times", metavar="FILE", help="times side by side for the first shape, as PNG")
    parser.add_argument("--isa", choices=["avx2"], help="limit all contenders to this instruction set")
    parser.add_argument("--beside", action="store_true", help="times beside a busy process instead")
    parser.add_argument("--train", action="store_true", help="with --beside: training steps of the 135M model too")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 128x256, few rounds")
    options = parser.parse_args(argv)
    if (options.beside and options.device != "cpu") or (options.train and not options.beside):
        parser.error("--beside: expected --device cpu, and --train only with it")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.backward and "backward" not in options.ops:
        options.ops.append("backward")
    if options.record and (options.quick or options.isa or options.device != "cpu"):
        parser.error("--record: expected whole runs on a CPU, without --quick and --isa")
    options.shapes = options.shapes or [SHAPES["beside" if options.beside else "default"]]
    options.m = options.m or ([1] if options.beside else [1, 8, 32, 256, 2048])
    if options.quick:
        options.shapes, options.m, options.rounds = [["128x256"]], [1, 8], 3
    return options


def cases(options: argparse.Namespace, machine):
    """The functions that build the cases. Cases are built one at a time, because their weights fill the memory."""
    import contenders
    from machine import available_memory

    if "overhead" in options.ops:
        for recording in (False, True):
            yield lambda recording=recording: contenders.overhead_case(recording, options.dtype[0], options.device)
    skipped = {"int8": not contenders.has_int8(), "search": not contenders.has_search()}
    for dtype in options.dtype:
        for shape in dict.fromkeys(sum(options.shapes, [])):
            n, k = (int(size) for size in shape.split("x"))
            cache, memory = (
                (2**16, 2**30) if options.quick else (machine.cache_bytes, available_memory(options.device) // 8)
            )
            operands = contenders.Operands(
                n, k, dtype, options.device, options.format, options.block_size, cache, memory
            )
            for operation in options.ops:
                if operation == "overhead" or skipped.get(operation):
                    continue
                if operation == "quantize":
                    yield lambda o=operands: contenders.quantize_case(o, "absmax")
                elif operation == "search":
                    yield lambda o=operands: contenders.quantize_case(o, "search")
                elif operation == "dequantize":
                    yield lambda o=operands: contenders.dequantize_case(o)
                else:
                    for m in options.m:
                        if operation == "linear":
                            yield lambda o=operands, m=m: contenders.linear_case(o, m, not options.no_reference)
                        elif operation == "backward":
                            yield lambda o=operands, m=m: contenders.backward_case(o, m)
                        else:
                            yield lambda o=operands, m=m: contenders.int8_case(o, m)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.isa and any(os.environ.get(name) != value for name, value in AVX2_ONLY.items()):
        # torch and its libraries read these variables when they are loaded, so the program starts again with them.
        environment = os.environ | AVX2_ONLY
        os.execve(sys.executable, [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)], environment)
    import ratios
    import report
    import torch
    from machine import measure
    from rich.console import Console
    from timing import cuda_of, interleaved
    from tqdm import tqdm

    import lowbit  # noqa: F401  (loads the ops)

    if options.device != "cpu" and not cuda_of(options.device).is_available():
        print("--device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.isa:
        torch.ops.lowbit.set_cpu_isa(options.isa)
    if options.beside:
        import beside

        with torch.no_grad():
            return beside.main(options)
    console = Console(width=170)
    machine = measure(options.device, options.quick)
    limited = f" LIMITED to {options.isa} for every contender;" if options.isa else ""
    console.print(
        f"{machine.name}, {machine.threads} threads;{limited} lowbit {machine.lowbit_isa}, "
        f"torch {machine.torch_version} {machine.torch_capability}; last-level cache "
        f"{machine.cache_bytes / 2**20:.0f} MiB; measured: read {machine.read_bandwidth:.1f} GB/s, copy "
        f"{machine.copy_bandwidth:.1f} GB/s (read + written), fp32 F.linear {machine.peak:.0f} GFLOP/s"
    )
    shapes, products = len(dict.fromkeys(sum(options.shapes, []))), len({"linear", "backward", "int8"} & {*options.ops})
    rest = len({"quantize", "dequantize", "search"} & {*options.ops})
    total = 2 * ("overhead" in options.ops) + len(options.dtype) * shapes * (products * len(options.m) + rest)
    rows = []
    with torch.no_grad(), tqdm(total=total, unit="case", disable=None) as bar:
        for build in cases(options, machine):
            case = build()
            bar.set_postfix_str(f"{case.operation} {case.dtype} {case.n}x{case.k} m={case.m}")
            clock = "cpu" if case.by_host else options.device
            found = report.rows_of(case, interleaved(case.calls, options.rounds, clock, case.once), machine)
            report.append_json_lines(options.jsonl, found)
            rows += found
            bar.update()
    report.print_tables(console, rows)
    if options.json:
        report.write_json(options.json, {"machine": machine.as_dict(), "rows": rows})
    if options.plot:
        report.plot_roofline(options.plot, machine, rows)
    if options.plot_times:
        report.plot_times(options.plot_times, machine, rows)
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        console.print(
            f"WRONG: {row['operation']} {row['dtype']} {row['n']}x{row['k']} m={row['m']}: error {row['error']}"
        )
    behind = None
    if options.check:
        behind = ratios.regressions(rows)
        lines = ["no ratios are recorded for this machine: --record keeps them"] if behind is None else behind
        for line in lines or ["no ratio fell behind the recorded ones"]:
            console.print(line)
    if options.record and not wrong:
        ratios.record(machine, rows)
    return 1 if wrong or behind else 0


if __name__ == "__main__":
    sys.exit(main())
