"""Calls and operands for the tests of Triton's kernels.

:data:`CALLS` together launch every kernel in each way that it is compiled; test_triton_compile.py compiles these
launches. Their tensors are on the meta device, so shapes may be those of real models. Launches are specialized as for
memory aligned to 16 bytes. The other functions make small operands for tests that look at numbers.
"""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, make_weight
from conftest_triton import function, tensor, weight

from lowbit import reference
from lowbit.format import WeightSpec, block_count
from lowbit.reference_optim import RULES, Constants

RANKS = (0, 1, 8, 17, 64)
#: Rows of each expert: none at all, some without any, one with all, few and many.
COUNTS = ((0,), (1,), (0, 3), (2, 0, 1), (5, 0, 0, 9), (0, 0, 0, 0, 4), (1, 1, 1, 1, 1, 1, 1), (13, 40, 7))


def parts_of(weight: torch.Tensor, format="nf4", block_size=64, double_quant=True) -> tuple:
    """The arguments of an op from packed to spec, as the reference quantizes ``weight``."""
    spec = WeightSpec(format, block_size, double_quant)
    packed, absmax = reference.quantize(weight, str(spec))
    if not spec.double_quant:
        return packed, absmax, None, None, str(spec)
    offset = absmax.mean() if absmax.numel() else torch.zeros(())
    return packed, *reference.quantize_scales(absmax, offset), offset, str(spec)


def varied_parts(shape, format="nf4", block_size=64, double_quant=True, magnitude=0.02) -> tuple:
    """`parts_of` blocks of different magnitudes, so that a wrong block's scale is far outside of every tolerance."""
    weight = make_weight(shape, torch.float32, magnitude)
    weight *= 2.0 ** (torch.arange(weight.numel()) // 32 * 5 % 7).view(shape)
    return parts_of(weight, format, block_size, double_quant)


def grad_operands(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> tuple:
    """grad [m, n], grad_t [m, rank], lora_a [rank, k]. With rank 0 the last two are None."""
    generator = torch.Generator().manual_seed(m + n + k)
    grad, grad_t, lora_a = (torch.randn(size, generator=generator) for size in ((m, n), (m, rank), (rank, k)))
    return (grad.to(dtype), grad_t, lora_a) if rank else (grad.to(dtype), None, None)


def ends_of(counts, experts: int) -> torch.Tensor:
    """expert_ends for so many experts: counts repeated."""
    return torch.tensor([counts[i % len(counts)] for i in range(experts)]).cumsum(0).to(torch.int32)


def expert_product(x, weight, ends, transposed=False) -> torch.Tensor:
    """Each expert's rows times its matrix, in the operands' own dtype."""
    parts = [x[at] @ (weight[e] if transposed else weight[e].T) for e, at in enumerate(reference.expert_rows(ends))]
    return torch.cat([x.new_zeros(0, weight.shape[2 if transposed else 1]), *parts])


def model_step(
    rule: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    in_8_bits: bool,
    seed: int | None = None,
    numel: int = 1 << 20,
    grad_scale: torch.Tensor | None = None,
) -> tuple:
    """The arguments of optimizer_step for one parameter on meta, with that dtype and its gradient's."""
    param, grad = (tensor(numel, dtype=dtype) for dtype in dtypes)
    row, end = [0, 0], 0
    for _ in RULES[rule].signed_states:
        row += [end, end + numel if in_8_bits else -1]
        end += numel + 4 * block_count(numel, 256) if in_8_bits else 4 * numel
    layout = torch.tensor([row + [-1] * (6 - len(row))])
    constants = torch.tensor([Constants(0.99, 0.9, 0.1, 0.99, 0.01, 1e-3, 1.0, 1e-8)])
    return [param], [grad], [tensor(end, dtype=torch.uint8)], layout, constants, rule, grad_scale, seed


def unaligned(like: torch.Tensor) -> torch.Tensor:
    """A CPU tensor such as ``like`` that begins one element after a multiple of 16 bytes."""
    storage = torch.empty(like.numel() + 16, dtype=like.dtype)
    first = next(i for i in range(1, 17) if storage[i:].data_ptr() % 16 == like.element_size() % 16)
    return storage[first : first + like.numel()].view(like.shape)


@dataclasses.dataclass
class Call:
    """``make()`` calls one op. ``every_run``: compiled at each run of the tests, not only when asked for all."""

    name: str
    make: Callable[[], object]
    every_run: bool


CALLS: list[Call] = []


def add(op: str, *arguments, detail: str = "", every_run: bool = False) -> None:
    """Another call of ``op``, a function of the module that ``lowbit.backends.triton.MODULES`` names."""

    def make():
        return function(op)(*arguments)

    CALLS.append(Call(f"{op} {detail}".strip(), make, every_run))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


for dtype, format in itertools.product(DTYPES, FORMATS):
    model_weight, detail = tensor(4096, 4096, dtype=dtype), f"{format} {name_of(dtype)}"
    often = (dtype, format) == (torch.bfloat16, "nf4")
    add("quantize", model_weight, f"{format}:64", detail=detail, every_run=often)
    add("search_scales", model_weight, None, f"{format}:64", detail=detail)
    add("search_scales", model_weight, tensor(4096), f"{format}:64", detail=f"{detail} weighted", every_run=often)
    add("encode", model_weight, tensor(4096 * 64), f"{format}:64", detail=detail, every_run=often)
for block_size in BLOCK_SIZES:
    spec, detail = f"nf4:{block_size}", f"ragged blocks of {block_size}"
    add("quantize", tensor(33, 131, dtype=torch.float16), spec, detail=detail)
    add("encode", tensor(33, 131), tensor(block_count(33 * 131, block_size)), spec, detail=detail)
add("search_scales", tensor(131, 1), tensor(1), "nf4:32", detail="one column")
for dtype in DTYPES:
    add("quantize", tensor(4096, 4096, dtype=dtype), "int8", detail=f"int8 {name_of(dtype)}")
add("quantize", tensor(33, 131), "int8", detail="int8 ragged")
add("quantize_scales", tensor(4096 * 64), tensor(), every_run=True)
add("quantize_scales", tensor(131), tensor(), detail="ragged")

for dtype, format, double_quant in itertools.product(DTYPES, FORMATS, (True, False)):
    add(
        "dequantize",
        *weight((4096, 4096), format, double_quant=double_quant),
        (4096, 4096),
        dtype,
        detail=f"{format} {'double-quantized ' * double_quant}{name_of(dtype)}",
        every_run=(dtype, format, double_quant) == (torch.bfloat16, "nf4", True),
    )
for dtype in DTYPES:
    add(
        "dequantize_out",
        *weight((4096, 4096), "int8"),
        tensor(4096, 4096, dtype=dtype),
        detail=f"int8 {name_of(dtype)}",
        every_run=dtype == torch.bfloat16,
    )

#: Rows of x: one for each tile of linear in lowbit/backends/triton/shapes.py.
LINEAR_ROWS = (1, 8, 16, 32, 64, 128)
for rows, dtype, format in itertools.product(LINEAR_ROWS, DTYPES, (*FORMATS, "int8")):
    if dtype == torch.float32 and rows > 16:
        continue  # decodes first
    operands = (tensor(14336), tensor(rows, 16), tensor(14336, 16), 0.5)
    add(
        "linear",
        tensor(rows, 4096, dtype=dtype),
        *weight((14336, 4096), format),
        14336,
        *operands,
        detail=f"{format} {name_of(dtype)} {rows} rows",
        every_run=(dtype, format) == (torch.bfloat16, "nf4") and rows in (8, 128),
    )
for block_size in BLOCK_SIZES:
    x = tensor(8, 4096, dtype=torch.bfloat16)
    arguments = (*weight((1024, 4096), "nf4", block_size, double_quant=False), 1024, None, None, None, 1.0)
    add("linear", x, *arguments, detail=f"blocks of {block_size}, in parts")
x = tensor(1, 4096, dtype=torch.bfloat16)
add("linear_approximate", x, *weight((1024, 4096), "nf4"), 1024, None, None, None, 1.0, detail="(exact)")
for columns, format in ((4096, "nf4"), (4096, "int8"), (4100, "int8")):
    x, a, b = tensor(8, columns, dtype=torch.bfloat16), tensor(8, columns), tensor(1024, 8)
    add("lora_linear", x, *weight((1024, columns), format), 1024, None, a, b, 0.5, detail=f"{format} {columns} columns")
for rows in (16, 32, 64, 256):
    x, ragged = tensor(rows, 4100, dtype=torch.bfloat16), weight((1024, 4100), "int8")
    lora = (tensor(rows, 8), tensor(1024, 8))
    add("linear", x, *ragged, 1024, tensor(1024), *lora, 0.5, detail=f"int8 4100 columns {rows} rows")
    add(
        "linear_grad_input",
        tensor(rows, 1024, dtype=torch.bfloat16),
        *ragged,
        4100,
        detail=f"int8 4100 columns {rows} rows",
    )
    ends, stack = tensor(4, dtype=torch.int32), weight((4, 1024, 4100), "int8")
    lora = (tensor(rows, 8), tensor(4, 1024, 8))
    add("grouped_linear", x, *stack, ends, 1024, tensor(4, 1024), *lora, 0.5, detail=f"int8 4100 columns {rows} rows")

# One number as the result, of a sum in parts: Triton makes a constant of an argument that is 1.
for op in ("linear", "linear_grad_input"):
    row = tensor(1, 4096, dtype=torch.bfloat16)
    shape, ends = (1, 4096) if op == "linear" else (4096, 1), tensor(1, dtype=torch.int32)
    no_lora = (None, None, None, 1.0) if op == "linear" else ()
    add(op, row, *weight(shape, "int8"), 1, *no_lora, detail="one number", every_run=True)
    # Not int8 forward: in one part, which autotune alone may try, that spills 8 bytes on sm_120.
    stack = weight((1, *shape), "nf4" if op == "linear" else "int8")
    add(f"grouped_{op}", row, *stack, ends, 1, *no_lora, detail="one number", every_run=True)
add(
    "grouped_matmul",
    *(tensor(1, 4096, dtype=torch.bfloat16), tensor(1, 1, 4096), tensor(1, dtype=torch.int32)),
    detail="one number",
    every_run=True,
)

for dtype, format in itertools.product(DTYPES, (*FORMATS, "int8")):
    for rows in (4, 32, 64, 200):
        if dtype == torch.float32 and rows > 64:
            continue  # decodes first
        add(
            "linear_grad_input",
            tensor(rows, 4096, dtype=dtype),
            *weight((4096, 4096), format),
            4096,
            detail=f"{format} {name_of(dtype)} m={rows}",
            every_run=(dtype, format, rows) == (torch.bfloat16, "nf4", 200),
        )
    for rows in (64, 256, 4096):
        ends, stack = tensor(8, dtype=torch.int32), weight((8, 4096, 1024), format)
        lora = (tensor(rows, 16), tensor(8, 4096, 16))
        add(
            "grouped_linear",
            *(tensor(rows, 1024, dtype=dtype), *stack, ends, 4096, tensor(8, 4096), *lora, 0.5),
            detail=f"{format} {name_of(dtype)} m={rows}",
            every_run=(dtype, format, rows) == (torch.bfloat16, "nf4", 4096),
        )
        add(
            "grouped_linear_grad_input",
            *(tensor(rows, 4096, dtype=dtype), *stack, ends, 1024, tensor(rows, 16), tensor(8, 16, 1024)),
            detail=f"{format} {name_of(dtype)} m={rows}",
            every_run=(dtype, format, rows) == (torch.bfloat16, "nf4", 4096),
        )
for block_size in (32, 4096):
    many = tensor(256, 4096, dtype=torch.bfloat16)
    add(
        "linear_grad_input",
        *(many, *weight((4096, 4096), "nf4", block_size, False), 4096, tensor(256, 16), tensor(16, 4096)),
        detail=f"LoRA, blocks of {block_size}",
    )
add("linear_grad_input", tensor(33, 70), *weight((70, 64), "nf4"), 64, detail="narrow")
# Decoded first, where LoRA's factors are rounded by a kernel.
for dtype, often in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
    many, lora = weight((4096, 4100), "nf4"), (tensor(512, 16), tensor(4096, 16, dtype=torch.bfloat16), 0.5)
    detail = f"LoRA of {name_of(dtype)}, decoded first"
    add("linear", tensor(512, 4100, dtype=dtype), *many, 4096, None, *lora, detail=detail, every_run=often)
    lora = (tensor(512, 16), tensor(16, 4100, dtype=torch.bfloat16))
    add("linear_grad_input", tensor(512, 4096, dtype=dtype), *many, 4100, *lora, detail=detail, every_run=often)
for dtype, lora_dtype in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
    many, ends = tensor(4096, 1024, dtype=dtype), tensor(8, dtype=torch.int32)
    detail, often = f"{name_of(dtype)} by {name_of(lora_dtype)}", dtype != lora_dtype
    add("grouped_matmul", many, tensor(8, 16, 1024, dtype=lora_dtype), ends, detail=detail, every_run=often)
    add("grouped_outer", tensor(4096, 16, dtype=lora_dtype), many, ends, detail=detail, every_run=often)

for rule, dtype, in_8_bits in itertools.product(RULES, DTYPES, (True, False)):
    detail = f"{rule} {name_of(dtype)} {'8 bits' if in_8_bits else 'fp32'}"
    often = (rule, dtype, in_8_bits) == ("adamw", torch.bfloat16, True)
    add("optimizer_step", *model_step(rule, (dtype, dtype), in_8_bits, 7), detail=detail, every_run=often)
    mixed = model_step(rule, (torch.float32, dtype), in_8_bits, None, (1 << 20) + 4, tensor())
    add("optimizer_step", *mixed, detail=f"{detail} gradient, ragged")
for dtype in DTYPES:
    add("sum_of_squares", [tensor(4096, 16, dtype=dtype)], detail=name_of(dtype), every_run=dtype == torch.bfloat16)
    add("sum_of_squares", [tensor(4095, dtype=dtype)], detail=f"{name_of(dtype)} ragged")
