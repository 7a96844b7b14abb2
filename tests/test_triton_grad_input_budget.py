"""What linear_grad_input and grouped_linear_grad_input in Triton cost in machine code: instructions per weight,
registers, accesses. The sizes are those of a layer of 4096 x 4096; tensors are on the meta device.
"""

import pytest
import torch
from codegen.machine_code import count
from conftest_triton import compiled, compiled_only, launches, machine_code, tensor, weight

from lowbit.backends.triton import shapes
from lowbit.backends.triton.shapes import Gpu, Problem
from lowbit.format import WeightSpec

pytestmark = compiled_only

N = K = 4096
EXPERTS = 8


def machine_code_of(folder, target, config, experts=0, dtype=torch.bfloat16, format="nf4", double_quant=True):
    """(machine code, shared memory) of a call with LoRA and as many rows as the tile."""
    from lowbit.backends.triton import linear_grad_input
    from lowbit.backends.triton.operands import weight_of

    lora = tensor(config.tile_m, 16), tensor(*([experts] if experts else []), 16, K)
    ends = tensor(experts, dtype=torch.int32) if experts else None
    grad, out = (tensor(config.tile_m, columns, dtype=dtype) for columns in (N, K))
    rows = max(experts, 1) * N
    parts = weight_of((rows, K), grad, *weight((rows, K), format, 64, double_quant))
    with launches(target) as made:
        linear_grad_input.fused(config, grad, parts, *lora, out, ends)
    kernel, _ = compiled(made[0], target)
    return machine_code(kernel, target, folder), kernel.metadata.shared


def problem_of(config, dtype, format, experts=0):
    """The problem that gets such a tile: one of as many rows."""
    rows = config.tile_m * max(experts, 1)
    return Problem("linear_grad_input", rows, N, K, dtype, WeightSpec(format), experts)


C = shapes.Config
#: (GPU, configuration, format, tensor-core instruction, instructions per weight and lane as counted, within 3%)
BUDGETS = [
    ("sm_80", C(16, 64, 256, 4, 3), "nf4", "HMMA", 8.0),
    ("sm_80", C(32, 64, 256, 4, 3), "nf4", "HMMA", 8.8),
    ("sm_80", C(64, 64, 256, 8, 3), "nf4", "HMMA", 11.9),
    ("sm_80", C(64, 64, 128, 8, 3), "int8", "HMMA", 12.1),
    ("sm_90", C(16, 64, 256, 4, 3), "nf4", "HGMMA", 7.95),
    ("sm_90", C(64, 64, 256, 8, 3), "fp4", "HGMMA", 9.6),
    ("sm_90", C(128, 64, 256, 8, 3), "nf4", "HGMMA", 10.1),
    ("sm_90", C(128, 64, 128, 4, 3), "int8", "HGMMA", 6.5),
    ("sm_120", C(64, 64, 256, 8, 3), "nf4", "HMMA", 11.7),
]


@pytest.mark.parametrize("experts", [0, EXPERTS])
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b[0]}-{b[1].tile_m}-{b[2]}")
def test_backward(tmp_path, budget, experts):
    """No spills, 16-byte copies of W and grad, decoded weights in registers: each lost slows every training step."""
    target, config, format, instruction, counted = budget
    problem = problem_of(config, torch.bfloat16, format, experts)
    gpu = Gpu(int(target[3:]), 100)
    assert config in shapes.tiles(problem, gpu), "no GPU runs it"
    code, shared = machine_code_of(tmp_path, target, config, experts, torch.bfloat16, format)
    assert (code.stack, code.local) == (0, 0)
    assert shared <= shapes.shared_bytes(config, problem) <= gpu.shared_bytes
    (loop,) = [body for body in code.loops() if count(body, "LDGSTS")]
    threads = 32 * config.warps
    assert count(loop, instruction)
    assert count(loop, "LDGSTS.128") == shapes.step_bytes(config, problem) // (16 * threads)
    # The rest are scales, of four blocks of each row of W: a code and its group's scale, by one thread each.
    scales = config.tile_n * 4 // threads
    assert count(loop, "LDGSTS") - count(loop, "LDGSTS.128") <= 2 * scales
    # Entries of the scales' map, and both parts of each scale on their way to all lanes: none of W's.
    assert count(loop, "LDG") <= scales and count(loop, "STS") <= 2 * scales
    weights = config.tile_n * config.tile_k / threads
    assert len(loop) <= 1.03 * counted * weights, f"{len(loop) / weights:.2f} per weight"
    modelled = shapes.instructions(config, problem, gpu) / config.warps
    assert 0.8 <= modelled / len(loop) <= 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("experts", [0, EXPERTS])
def test_no_spills_otherwise(tmp_path, experts, dtype):
    """fp32 takes another path, and plain scales other registers."""
    config = C(32, 32, 128, 4, 2) if dtype == torch.float32 else C(64, 64, 256, 8, 3)
    code, _ = machine_code_of(tmp_path, "sm_80", config, experts, dtype, double_quant=False)
    assert (code.stack, code.local) == (0, 0)


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_eight_bytes_a_load(tmp_path, target):
    """The exception that docs/performance.md names: of 16 rows of W of 64 bytes a thread of four warps has 8. Fewer
    bytes a load would be twice the loads.
    """
    config = C(16, 16, 128, 4, 2)
    assert config in shapes.tiles(problem_of(config, torch.float32, "nf4"), Gpu(int(target[3:]), 100))
    code, _ = machine_code_of(tmp_path, target, config, dtype=torch.float32)
    (loop,) = [body for body in code.loops() if count(body, "LDGSTS")]
    assert (code.stack, code.local) == (0, 0)
    # One of W and one of grad: 1024 bytes of each.
    assert count(loop, "LDGSTS.64") == 2 and not count(loop, "LDGSTS.128")
