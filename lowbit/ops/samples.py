"""Arguments for every op: what the self-test calls on each set of kernels, and the tests give to torch's opcheck."""

from collections.abc import Iterator

import torch

from ..format import WeightSpec
from ..reference_optim import RULES, STATE_BLOCK, Constants

ROWS, OUT, IN, RANK, EXPERTS = 5, 96, 200, 4, 3
SPECS = ("nf4:64:double_quant", "fp4:64:double_quant", "nf4:32", "int8")


def stored(weight: torch.Tensor, spec: str) -> tuple:
    """The arguments from packed to spec of a weight, made by the reference."""
    reference = torch.ops.lowbit_reference
    packed, absmax = reference.quantize(weight, spec)
    if not WeightSpec.parse(spec).double_quant:
        return packed, absmax, None, None, spec
    offset = absmax.mean()
    codes, group_scales = reference.quantize_scales(absmax, offset)
    return packed, codes, group_scales, offset, spec


def samples(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Iterator[tuple[str, str, tuple]]:
    """``(op's name, what is called, arguments)``: CPU tensors, ``rows`` rows of activations in ``dtype``.

    Rows of the weight begin inside blocks, and LoRA's factors are fp32.
    """
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight, x, grad = made(OUT, IN), made(rows, IN).to(dtype), made(rows, OUT).to(dtype)
    bias, lora_a, lora_b, t = made(OUT), made(RANK, IN), made(OUT, RANK), made(rows, RANK)
    for spec in SPECS:
        yield "quantize", spec, (weight.to(dtype), spec)
        w = stored(weight, spec)
        yield "dequantize", spec, (*w, [OUT, IN], dtype)
        yield "dequantize_out", spec, (*w, torch.empty(OUT, IN, dtype=dtype))
        yield "linear", spec, (x, *w, OUT, None, None, None, 1.0)
        yield "linear", f"{spec} with bias and LoRA", (x, *w, OUT, bias, t, lora_b, 0.5)
        yield "linear_approximate", spec, (x, *w, OUT, bias, None, None, 1.0)
        yield "lora_linear", spec, (x, *w, OUT, bias, lora_a, lora_b, 0.5)
        yield "lora_linear_shared", spec, (x, *w, OUT, bias, lora_a, lora_b, 0.5, [lora_a + 1, lora_a - 1])
        yield "lora_linear_backward", spec, (grad, x, t, *w, lora_a, lora_b, 0.5, True, True, True)
        yield "lora_linear_backward", f"{spec} for A", (grad, x, t, *w, lora_a, lora_b, 0.5, False, True, False)
        yield "linear_grad_input", spec, (grad, *w, IN, None, None)
        yield "linear_grad_input", f"{spec} with LoRA", (grad, *w, IN, t, lora_a)

    for factor, what in ((lora_a, "in its own order"), (lora_a.T.contiguous().T, "transposed")):
        yield "lora_down", what, (x, factor, 0.5)
        yield "lora_up", what, (t, factor.T, lora_a[0], 0.5, dtype)
    yield "lora_outer", "of A", (x, t, 0.5, True)
    yield "lora_outer", "of B", (grad, t, 0.5, False)

    yield "quantize_scales", "scales", (stored(weight, "nf4:32")[1], torch.tensor(1.0))
    few = weight[:2]  # the search takes 50 ms a block in Triton's interpreter
    yield "search_scales", "nf4:64", (few.to(dtype), torch.rand(IN, generator=generator), "nf4:64")
    yield "encode", "nf4:64", (weight.to(dtype), stored(weight, "nf4:64")[1], "nf4:64")

    block, candidates = weight[:20, :32].contiguous(), made(20, 5)
    hessian = (made(40, 32).T @ made(40, 32)).abs() + 40 * torch.eye(32)
    yield "gptq_block", "nf4:32", (block, hessian.triu(), candidates, "nf4:32")
    yield "descend_block", "fp4:32", (block, made(20, 32), hessian, candidates, 2, "fp4:32")

    stack = (*stored(made(EXPERTS, OUT, IN), SPECS[0]), torch.tensor([2, 2, rows], dtype=torch.int32))
    biases, a, b = made(EXPERTS, OUT), made(EXPERTS, RANK, IN), made(EXPERTS, OUT, RANK)
    yield "grouped_linear", "with bias and LoRA", (x, *stack, OUT, biases, t, b, 0.5)
    yield "grouped_lora_linear", "with bias", (x, *stack, OUT, biases, a, b, 0.5)
    yield "grouped_linear_grad_input", "with LoRA", (grad, *stack, IN, t, a)
    yield "grouped_matmul", "of LoRA", (x, a, stack[-1])
    yield "grouped_outer", "of LoRA", (t, x, stack[-1])
    yield from _steps(made, dtype)


def _steps(made, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """A step of three parameters: states in fp32, in 8 bits with a short last block, and of a scalar."""
    sizes, in_8_bits = ((3, 70), (600,), ()), (False, True, False)
    constants = torch.tensor([Constants(0.99, 0.9, 0.1, 0.99, 0.01, 0.01, 2.0, 1e-6), Constants(1, *[0.5] * 7)])
    grads = [made(*size).to(dtype) for size in sizes]
    for name, rule in RULES.items():
        layout, end = [], 0
        for i, (grad, eight) in enumerate(zip(grads, in_8_bits, strict=True)):
            row = [i % 2, 0]
            for _ in rule.signed_states:
                codes = -(-grad.numel() // 16) * 16
                row += [end, end + codes if eight else -1]
                end += codes + 4 * -(-grad.numel() // STATE_BLOCK) if eight else 4 * codes
            layout.append(row + [-1] * (6 - len(row)))
        for seed in (None, 7):
            # Bytes of codes below 128, so that no fp32 state is NaN, and second moments are not negative.
            arena = torch.rand(end // 4, generator=torch.Generator().manual_seed(1)).view(torch.uint8).clone()
            params = [made(*size).to(dtype) for size in sizes]
            scale = torch.tensor(0.5) if seed else None
            table = torch.tensor(layout)
            what = f"{name} rounded stochastically" if seed else name
            yield "optimizer_step", what, (params, grads, [arena], table, constants, name, scale, seed)
    yield "sum_of_squares", "of three", (grads,)
