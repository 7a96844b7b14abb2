"""The products of a mixture of experts: grouped_linear and grouped_linear_grad_input, one launch each.

The kernels are those of ``linear.py`` and ``linear_grad_input.py``. Tokens are sorted by expert, and ``expert_ends``
stays on the GPU: programs look up there which expert their tile of rows belongs to (``grid.py``), and those beyond the
last tile end at once. An expert without tokens has no tile: its weight is never read.
"""

import torch

from . import autotune, linear, linear_grad_input, shapes_backward, shapes_forward
from .dequantize import dequantize
from .gpu import gpu_of
from .grid import next_power_of_2
from .grouped_products import grouped_matmul
from .operands import check_dimensions, check_size, expert_ends_of, lora_factors, optional, rows_of_floats, weight_of
from .shapes import Problem, has_whole_blocks


def _expert_of_row(expert_ends: torch.Tensor, rows: int) -> torch.Tensor:
    found = torch.searchsorted(expert_ends, torch.arange(rows, device=expert_ends.device), right=True)
    return found.clamp(max=expert_ends.numel() - 1)


def grouped_linear(
    x,
    packed,
    absmax,
    group_scales,
    offset,
    format,
    block_size,
    expert_ends,
    out_features,
    bias,
    t,
    lora_b,
    scaling,
) -> torch.Tensor:
    tokens, experts = rows_of_floats("x", x), expert_ends.numel()
    check_dimensions("x", x, 2)
    check_size("out_features", out_features)
    in_features, matrix_rows = x.shape[1], experts * out_features
    shape = (experts, out_features, in_features)
    weight = weight_of(shape, x, packed, absmax, group_scales, offset, format, block_size)
    bias = optional("bias", bias, matrix_rows, x)
    t, lora_b = lora_factors(("t", "lora_b"), t, lora_b, tokens, matrix_rows, x)
    expert_ends = expert_ends_of(expert_ends, tokens, x)
    y = x.new_empty([tokens, out_features])
    if y.numel() == 0:
        return y
    rows = next_power_of_2(tokens)
    problem = Problem(rows, out_features, in_features, x.dtype, format, block_size, experts)
    if in_features == 0 or not has_whole_blocks(problem):
        y = grouped_matmul(x, dequantize(*weight, shape, torch.float32), expert_ends)
        if t is not None:
            y += scaling * grouped_matmul(t, lora_b.view(experts, out_features, -1), expert_ends)
        if bias is not None:
            y += bias.view(experts, out_features)[_expert_of_row(expert_ends, tokens)]
        return y.to(x.dtype)
    arguments = (x.contiguous(), *weight, bias, t, lora_b, scaling, y, expert_ends)
    gpu = gpu_of(x.device)
    run = lambda config: linear.fused(config, *arguments)  # noqa: E731
    run(autotune.chosen("grouped_linear", problem, gpu, shapes_forward.linear_configs(problem, gpu), run))
    return y


def grouped_linear_grad_input(
    grad, packed, absmax, group_scales, offset, format, block_size, expert_ends, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    tokens, experts = rows_of_floats("grad", grad), expert_ends.numel()
    check_dimensions("grad", grad, 2)
    check_size("in_features", in_features)
    out_features = grad.shape[1]
    shape = (experts, out_features, in_features)
    weight = weight_of(shape, grad, packed, absmax, group_scales, offset, format, block_size)
    grad_t, lora_a = lora_factors(("grad_t", "lora_a"), grad_t, lora_a, tokens, experts * in_features, grad)
    expert_ends = expert_ends_of(expert_ends, tokens, grad)
    out = grad.new_empty([tokens, in_features])
    if out.numel() == 0:
        return out
    rows = next_power_of_2(tokens)
    problem = Problem(rows, out_features, in_features, grad.dtype, format, block_size, experts)
    if not has_whole_blocks(problem):
        decoded = dequantize(*weight, shape, torch.float32)
        out = grouped_matmul(grad, decoded.transpose(1, 2), expert_ends)
        if grad_t is not None:
            out += grouped_matmul(grad_t, lora_a.view(experts, -1, in_features).transpose(1, 2), expert_ends)
        return out.to(grad.dtype)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    arguments = (grad, *weight, grad_t, lora_a, out, expert_ends)
    gpu = gpu_of(grad.device)
    run = lambda config: linear_grad_input.fused(config, *arguments)  # noqa: E731
    configs = shapes_backward.grad_input_configs(problem, gpu)
    run(autotune.chosen("grouped_linear_grad_input", problem, gpu, configs, run))
    return out
