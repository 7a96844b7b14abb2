"""What the compiled Triton kernels of the backward and of a mixture of experts cost: registers, accesses, instructions.

The sizes are those of a layer of 4096 x 4096; tensors are on the meta device. No GPU is needed.
"""

import pytest
import torch
from conftest_triton import compiled, compiled_only, launches, machine_code, spilled
from sass import count

grouped = pytest.importorskip("lowbit.backends.triton.grouped")
linear_grad_input = pytest.importorskip("lowbit.backends.triton.linear_grad_input")

N = K = 4096
EXPERTS = 8


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(experts=1, block_size=64, double_quant=True):
    blocks = experts * N * K // block_size
    packed = meta(experts * N * K // 2, dtype=torch.uint8)
    if not double_quant:
        return packed, meta(blocks), None, None, "nf4", block_size
    return packed, meta(blocks, dtype=torch.uint8), meta(blocks // 256), meta(), "nf4", block_size


def grad_input(rows, double_quant, dtype=torch.bfloat16):
    grad_t, lora_a = meta(rows, 16), meta(16, K)
    arguments = (meta(rows, N, dtype=dtype), *weight(double_quant=double_quant), K, grad_t, lora_a)
    return linear_grad_input.linear_grad_input(*arguments)


def grouped_grad_input(rows, double_quant, dtype=torch.bfloat16):
    ends, grad_t, lora_a = meta(EXPERTS, dtype=torch.int32), meta(rows, 16), meta(EXPERTS, 16, K)
    arguments = (meta(rows, N, dtype=dtype), *weight(EXPERTS, double_quant=double_quant), ends, K, grad_t, lora_a)
    return grouped.grouped_linear_grad_input(*arguments)


def grouped_linear(rows, double_quant, dtype=torch.bfloat16):
    ends, bias, t, lora_b = meta(EXPERTS, dtype=torch.int32), meta(EXPERTS, N), meta(rows, 16), meta(EXPERTS, N, 16)
    arguments = (*weight(EXPERTS, double_quant=double_quant), ends, N, bias, t, lora_b, 0.5)
    return grouped.grouped_linear(meta(rows, K, dtype=dtype), *arguments)


def kernel_of(call, target, tmp_path):
    """(launch, machine code) of the first kernel of a call."""
    with launches(target) as made:
        call()
    kernel, _ = compiled(made[0], target)
    assert spilled(kernel, target, tmp_path) == 0
    assert kernel.metadata.shared <= 100 * 1024  # what a block may have on sm_86, sm_89 and sm_120 too
    return made[0], machine_code(kernel, target, tmp_path)


#: (function, rows, GPU, tensor-core instruction, instructions per weight and lane)
BUDGETS = (
    (grad_input, 4, "sm_80", "HMMA", 8.1),
    (grad_input, 32, "sm_80", "HMMA", 8.9),
    (grad_input, 4096, "sm_80", "HMMA", 12.6),
    (grad_input, 4096, "sm_90", "HGMMA", 10.6),
    (grouped_grad_input, 64, "sm_80", "HMMA", 8.4),
    (grouped_grad_input, 4096, "sm_90", "HGMMA", 10.6),
)


@compiled_only
@pytest.mark.parametrize(("call", "rows", "target", "instruction", "budget"), BUDGETS)
def test_backward_budget(tmp_path, call, rows, target, instruction, budget):
    """No spills, 16-byte loads of W and grad, decoded weights in registers: each lost slows every training step."""
    launch, code = kernel_of(lambda: call(rows, False), target, tmp_path)
    loop = code.smallest_loop(instruction, "LDGSTS.128", "PRMT")
    values = launch.values
    threads = 32 * values["WARPS"]
    tile_bytes = values["TILE_N"] * values["BYTES"] + 2 * values["TILE_M"] * values["TILE_N"]
    assert count(loop, "LDGSTS.128") == tile_bytes // (16 * threads)
    # The rest are scales: fewer than one load for each thread's part of a tile.
    assert count(loop, "LDGSTS") - count(loop, "LDGSTS.128") <= 2 and not count(loop, "LDG")
    assert not count(loop, "STS"), "decoded weights pass through shared memory"
    weights = 2 * values["TILE_N"] * values["BYTES"] // threads
    assert len(loop) <= budget * weights, f"{len(loop) / weights:.2f} per weight"


@compiled_only
@pytest.mark.parametrize(
    ("rows", "target", "instruction", "budget"),
    [(64, "sm_80", "HMMA", 8.0), (4096, "sm_80", "HMMA", 12.0), (4096, "sm_90", "HGMMA", 12.0)],
)
def test_grouped_linear_budget(tmp_path, rows, target, instruction, budget):
    """As above, forward: decoded weights must stay in registers and each be decoded by one warp only."""
    launch, code = kernel_of(lambda: grouped_linear(rows, False), target, tmp_path)
    loop = code.smallest_loop(instruction, "LDGSTS.128", "PRMT")
    threads = 32 * launch.options["num_warps"]
    weights = 2 * launch.values["TILE_N"] * launch.values["TILE_K"] // threads
    assert not count(loop, "STS"), "decoded weights pass through shared memory"
    assert len(loop) <= budget * weights, f"{len(loop) / weights:.2f} per weight"


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("call", [grad_input, grouped_grad_input, grouped_linear])
def test_no_spills_in_other_dtypes(tmp_path, call, dtype):
    """fp32 takes another path, and double quantization more registers."""
    kernel_of(lambda: call(200, True, dtype), "sm_80", tmp_path)
