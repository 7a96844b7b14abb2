"""Predictions for lowbit's Triton kernels: what bounds each launch that the backend makes.

The backend's own functions are called with tensors that have no memory, at the layer's size, for the GPU's capability
and number of multiprocessors. So the backend chooses the tiles and the parts of split sums. A tile costs the same if x
has fewer rows or an expert's last tile is short.

DRAM moves every tensor of a launch once. Partial sums do not count: they pass from one launch to the next in the L2
cache.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from codegen.instruction_costs import Counted
from codegen.triton_code import Launch, backend, function, launches, tensor, weight
from codegen.triton_counts import Body, Costs, costs
from roofline import Gpu, Prediction, Work, dense_product, least_time, one_after_another

TRITON = "lowbit's Triton"

#: One step of the kernels' loops over LoRA's rank.
LORA_RANK = 16
#: Mixtral 8x7B's mixture: each token goes to 2 of 8 experts. Tokens are assumed to be spread evenly.
EXPERTS, EXPERTS_OF_TOKEN = 8, 2
#: The arguments of a kernel that hold one matrix per expert. Matrices of experts without tokens are not read.
_STACKS = ("packed", "absmax", "group_scales")
#: Kernels that only prepare operands of torch's product, and cost little beside it.
_PREPARING = ("rounded_factors_kernel",)


def _x(*shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.bfloat16)


def _quantize(m: int, n: int, k: int) -> None:
    _, absmax = function("quantize")(_x(n, k), "nf4:64")
    function("quantize_scales")(absmax, tensor())


def _dequantize(m: int, n: int, k: int, format: str = "nf4") -> None:
    function("dequantize")(*weight((n, k), format), (n, k), torch.bfloat16)


def _linear(m: int, n: int, k: int, format: str = "nf4", rank: int = 0) -> None:
    lora = (tensor(m, rank), tensor(n, rank)) if rank else (None, None)
    function("linear")(_x(m, k), *weight((n, k), format), n, None, *lora, 1.0)


def _linear_grad_input(m: int, n: int, k: int, rank: int = 0) -> None:
    lora = (tensor(m, rank), tensor(rank, k)) if rank else (None, None)
    function("linear_grad_input")(_x(m, n), *weight((n, k), "nf4"), k, *lora)


def _grouped_linear(m: int, n: int, k: int) -> None:
    x, ends = _x(m * EXPERTS_OF_TOKEN, k), tensor(EXPERTS, dtype=torch.int32)
    function("grouped_linear")(x, *weight((EXPERTS, n, k), "nf4"), ends, n, None, None, None, 1.0)


def _grouped_linear_grad_input(m: int, n: int, k: int) -> None:
    grad, ends = _x(m * EXPERTS_OF_TOKEN, n), tensor(EXPERTS, dtype=torch.int32)
    function("grouped_linear_grad_input")(grad, *weight((EXPERTS, n, k), "nf4"), ends, k)


@dataclass(frozen=True)
class Operation:
    """``call`` calls the backend for m rows of x, or tokens, and a W [n, k] in NF4 or int8; bf16."""

    call: Callable[[int, int, int], None]
    has_x: bool = True
    is_grouped: bool = False
    rank: int = 0  # of LoRA
    decoding: str = "dequantize"  # the operation that decodes such a W


OPERATIONS = {
    "quantize": Operation(_quantize, has_x=False),
    "dequantize": Operation(_dequantize, has_x=False),
    "int8 dequantize": Operation(functools.partial(_dequantize, format="int8"), has_x=False),
    "linear": Operation(_linear),
    "linear with LoRA": Operation(functools.partial(_linear, rank=LORA_RANK), rank=LORA_RANK),
    "int8 linear": Operation(functools.partial(_linear, format="int8"), decoding="int8 dequantize"),
    "linear_grad_input": Operation(_linear_grad_input),
    "linear_grad_input with LoRA": Operation(functools.partial(_linear_grad_input, rank=LORA_RANK), rank=LORA_RANK),
    "grouped_linear": Operation(_grouped_linear, is_grouped=True),
    "grouped_linear_grad_input": Operation(_grouped_linear_grad_input, is_grouped=True),
}


@functools.cache
def launched(gpu: Gpu, operation: str, m: int, n: int, k: int) -> tuple[Launch, ...]:
    """The launches of the backend on a GPU; none if it decodes W and leaves the product to torch."""
    with launches(gpu.arch, gpu.processors) as made:
        OPERATIONS[operation].call(m, n, k)
    return tuple(launch for launch in made if launch.kernel.__name__ not in _PREPARING)


def is_available() -> bool:
    """Whether Triton can be imported to compile its kernels."""
    return backend.missing_reason() is None


def rows_by_expert(tokens: int) -> list[int]:
    """Rows of x that meet each matrix of a mixture."""
    each, more = divmod(tokens * EXPERTS_OF_TOKEN, EXPERTS)
    return [each + (expert < more) for expert in range(EXPERTS)]


def _bytes(gpu: Gpu, made: tuple[Launch, ...], launch: Launch, of_stacks: float) -> float:
    """Bytes that a launch moves to and from DRAM. ``of_stacks`` is the share of the experts that have rows."""
    others = {id(value) for other in made if other is not launch for value in other.values.values()}
    moved = 0.0
    for name, value in launch.values.items():
        if not isinstance(value, torch.Tensor):
            continue
        passed_on = id(value) in others and value.nbytes <= gpu.l2 * 1e6
        if not passed_on:
            moved += value.nbytes * (of_stacks if name in _STACKS else 1)
    return moved


def _splits(launch: Launch, found: Costs, n: int, k: int) -> int:
    """How many programs share the sums of a tile. It is an error if the grid has other tiles than those counted."""
    # Only the GPU knows how many tiles of rows a mixture has. The surplus programs end at once.
    splits, rest = divmod(math.prod(launch.grid), launch.values["row_tiles"] * found.tile.outputs(n, k))
    if rest:
        raise ValueError(f"{found.kernel}: expected a grid of tiles {found.tile}, got {launch.grid}")
    return splits


def _bodies(launch: Launch, found: Costs, rows: list[int], n: int, k: int) -> list[tuple[int, Body]]:
    """How often all programs together execute what was counted."""
    if found.tile is None:
        return [(math.prod(launch.grid), found.body)]
    row_tiles = sum(-(-each // found.tile.rows) for each in rows)
    main = (row_tiles * found.tile.rounds(n, k), found.body)
    # Only the first of a tile's splits adds LoRA.
    return [main, (row_tiles * found.tile.outputs(n, k), found.lora)] if found.lora else [main]


def _work(moved: float, bodies: list[tuple[int, Body]]) -> Work:
    return Work(
        moved,
        sum(times * body.instructions for times, body in bodies),
        sum(times * body.cycles for times, body in bodies),
        sum(times * body.macs for times, body in bodies),
        sum(times * body.peak_macs for times, body in bodies),
    )


def _decoded_first(gpu: Gpu, operation: Operation, m: int, n: int, k: int) -> Prediction:
    steps = [predict(gpu, operation.decoding, 0, n, k), dense_product(gpu, m, n, k)]
    if operation.rank:
        steps.append(dense_product(gpu, m, n, operation.rank))
    return one_after_another("dequantize, cuBLAS", steps)


def predict(gpu: Gpu, operation: str, m: int, n: int, k: int) -> Prediction:
    """The time of all launches of an operation, one after another. m is 0 if there is no x."""
    made = launched(gpu, operation, m, n, k)
    if not made:
        return _decoded_first(gpu, OPERATIONS[operation], m, n, k)
    rows, of_stacks = [m], 1.0
    if OPERATIONS[operation].is_grouped:
        rows = rows_by_expert(m)
        of_stacks = sum(each > 0 for each in rows) / EXPERTS
    steps, tiles = [], []
    for launch in made:
        found = costs(launch, gpu.arch)
        work = _work(_bytes(gpu, made, launch, of_stacks), _bodies(launch, found, rows, n, k))
        steps.append(least_time(gpu, found.kernel.removesuffix("_kernel"), work))
        if found.tile:
            splits = _splits(launch, found, n, k)
            tiles.append(f"{found.tile.rows} rows" + (f", {splits} splits" if splits > 1 else ""))
    return one_after_another(", ".join(tiles or [step.path for step in steps]), steps)


def counted(gpu: Gpu, operation: str, m: int, n: int, k: int) -> list[Counted]:
    """Costs per weight of the kernels that read or write W."""
    entries = []
    for launch in launched(gpu, operation, m, n, k):
        found = costs(launch, gpu.arch)
        label, rows, body = f"{found.kernel}, {found.warps} warps", 0, found.body
        if found.tile:
            tile = (found.tile.rows, found.tile.out_features, found.tile.in_features)
            label, rows = f"{found.kernel}, {' x '.join(map(str, tile))}, {found.warps} warps", found.tile.rows
            weights = found.tile.out_features * found.tile.in_features
        elif not OPERATIONS[operation].has_x:
            weights = n * k / math.prod(launch.grid)
        else:
            continue  # sums of splits
        costs_per_weight = (32 * body.instructions, body.cycles, body.macs, body.peak_macs)
        entries.append(Counted(operation, TRITON, label, rows, *(cost / weights for cost in costs_per_weight)))
    return entries
