"""What linear and grouped_linear in Triton cost in machine code: instructions per weight, registers, accesses."""

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


def launches_of(target, config, experts=0, dtype=torch.bfloat16, format="nf4", block_size=64, k=K):
    """The launches of a call with as many rows as the tile, LoRA, bias and double-quantized scales."""
    from lowbit.backends.triton import linear
    from lowbit.backends.triton.operands import weight_of

    rows = max(experts, 1) * N
    ends = tensor(experts, dtype=torch.int32) if experts else None
    x, y = (tensor(config.tile_m, columns, dtype=dtype) for columns in (k, N))
    parts = weight_of((rows, k), x, *weight((rows, k), format, block_size))
    with launches(target) as made:
        linear.fused(config, x, parts, tensor(rows), tensor(config.tile_m, 16), tensor(rows, 16), 0.5, y, ends)
    return made


def main_loop(folder, target, config, *options, **size):
    """(kernel, its loop over k, its shared memory) of such a call."""
    kernel, _ = compiled(launches_of(target, config, *options, **size)[0], target)
    code = machine_code(kernel, target, folder)
    # Copies of the next step's tiles are in no other loop.
    (loop,) = [body for body in code.loops() if count(body, "LDGSTS")]
    return code, loop, kernel.metadata.shared


def per_weight(loop, config):
    """Instructions per weight, if the weights of a step are shared out to all lanes."""
    return len(loop) * 32 * config.warps / (config.products * config.tile_n * config.tile_k)


def gpu_named(target):
    return Gpu(int(target[3:]), 100)


def problem_of(config, experts=0, dtype=torch.bfloat16, format="nf4", block_size=64, k=K):
    """The problem that gets such a tile: one of as many rows."""
    return Problem("linear", config.tile_m * max(experts, 1), N, k, dtype, WeightSpec(format, block_size), experts)


def is_run(target, config, *options, **size):
    """Whether the GPU may run the tile. The budget of one that was replaced would hold, and bound nothing."""
    return config in shapes.tiles(problem_of(config, *options, **size), gpu_named(target))


def has_wgmma(target, config):
    return target == "sm_90" and config.tile_m >= 64 and not config.weight_first


C = shapes.Config
#: (target, configuration, block size, instructions per weight), as counted; of one matrix and of a stack, within 3%.
#: For 64 and 128 rows sm_90 has wgmma.
BUDGETS = [
    ("sm_80", C(8, 64, 64, 2, 4, True), 64, 4.95),
    ("sm_80", C(8, 64, 128, 2, 4, True), 128, 4.3),
    ("sm_80", C(16, 64, 64, 2, 4, True), 64, 5.4),
    ("sm_80", C(16, 64, 128, 2, 4, True), 128, 4.8),
    ("sm_80", C(16, 64, 32, 2, 4, True), 32, 6.0),
    ("sm_80", C(32, 64, 64, 2, 4, True), 64, 6.3),
    ("sm_80", C(64, 64, 64, 4, 3, True, products=2), 64, 9.7),
    ("sm_80", C(64, 128, 64, 8, 3, True, products=2), 64, 9.4),
    ("sm_80", C(128, 128, 64, 8, 3), 64, 17.6),
    ("sm_90", C(8, 64, 64, 2, 4, True), 64, 5.1),
    ("sm_90", C(16, 64, 64, 2, 4, True), 64, 5.5),
    ("sm_90", C(64, 64, 64, 4, 4), 64, 8.0),
    ("sm_90", C(128, 128, 64, 8, 3), 64, 9.2),
    ("sm_120", C(8, 64, 64, 2, 4, True), 64, 5.0),
    ("sm_120", C(16, 64, 64, 2, 4, True), 64, 5.4),
    ("sm_120", C(64, 128, 64, 8, 3, True, products=2), 64, 9.4),
    ("sm_120", C(128, 128, 64, 8, 3), 64, 17.2),
]


#: With each budget 0, and EXPERTS where a stack gets the tile.
OF_STACKS = [
    pytest.param(budget, experts, id=f"{target}-{config.tile_m}x{config.tile_n}x{config.tile_k}-{experts}")
    for budget in BUDGETS
    for target, config, block_size, _ in [budget]
    for experts in (0, EXPERTS)
    if not experts or is_run(target, config, experts, block_size=block_size)
]


@pytest.mark.parametrize(("budget", "experts"), OF_STACKS)
def test_four_bits(tmp_path, budget, experts):
    """DRAM leaves each weight 4.6 issue slots on an H100. Decoded weights go from register to tensor core.

    A few percent above what is counted today: a compiler that no longer finds the layout takes far more.
    """
    target, config, block_size, counted = budget
    problem, gpu = problem_of(config, experts, block_size=block_size), gpu_named(target)
    assert is_run(target, config, experts, block_size=block_size), "no GPU runs it"
    code, loop, shared = main_loop(tmp_path, target, config, experts, torch.bfloat16, "nf4", block_size)
    wgmma = has_wgmma(target, config)

    assert (code.stack, code.local) == (0, 0)
    assert shared <= shapes.shared_bytes(config, problem) <= gpu.shared_bytes
    assert per_weight(loop, config) <= 1.03 * counted, f"{per_weight(loop, config):.2f}"
    # The cost model that chooses configurations may not be further off than its choices are apart.
    modelled = config.products * shapes.instructions(config, problem, gpu)
    assert 0.8 <= modelled / (len(loop) * config.warps) <= 1.25
    # x and W: 16 bytes a copy, as many as the tiles have, and W's codes reach registers four at a time or more.
    tile_bytes = shapes.step_bytes(config, problem)
    assert count(loop, "LDGSTS") == count(loop, "LDGSTS.128")
    assert count(loop, "LDGSTS") <= tile_bytes / (16 * 32 * config.warps) + 1
    assert not count(loop, "LDS.U8") and not count(loop, "LDS.U16") and not count(loop, "LDS.S8")
    # From global memory directly: a scale's code, its group, its map's entry.
    assert count(loop, "LDG") <= 3 * config.products
    assert count(loop, "HGMMA" if wgmma else "HMMA.16816") == count(loop, "HGMMA") + count(loop, "HMMA") > 0
    # To shared memory: scales, and what wgmma reads of W from there.
    decoded_stores = config.tile_n * config.tile_k * 2 // (16 * 32 * config.warps) if wgmma else 0
    assert count(loop, "STS.128") == decoded_stores and count(loop, "STS") <= decoded_stores + config.products


@pytest.mark.parametrize("experts", [0, EXPERTS])
@pytest.mark.parametrize(
    ("target", "config", "limit"),
    [
        ("sm_80", C(16, 64, 64, 2, 4, True), 4.0),
        ("sm_80", C(64, 128, 64, 8, 3, True, products=2), 7.0),
        ("sm_90", C(16, 64, 64, 2, 4, True), 3.7),
        ("sm_90", C(64, 64, 64, 4, 4), 5.0),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{getattr(value, 'tile_m', value)}",
)
def test_int8(tmp_path, target, config, limit, experts):
    """DRAM leaves 9.2 issue slots for a byte on an H100."""
    assert is_run(target, config, experts, format="int8"), "no GPU runs it"
    code, loop, _ = main_loop(tmp_path, target, config, experts, torch.bfloat16, "int8")
    wgmma = has_wgmma(target, config)
    assert (code.stack, code.local) == (0, 0)
    assert per_weight(loop, config) <= 1.03 * limit, f"{per_weight(loop, config):.2f}"
    assert count(loop, "LDGSTS") == count(loop, "LDGSTS.128") > 0
    assert not count(loop, "LDG") and not count(loop, "LDS.U8")
    assert bool(count(loop, "HGMMA")) == wgmma and bool(count(loop, "HMMA.16816")) != wgmma
    assert bool(count(loop, "STS")) == wgmma


@pytest.mark.parametrize(
    ("config", "limit"), [(C(1, 64, 64, 2, 3), 5.3), (C(4, 64, 32, 2, 3), 11.8), (C(16, 64, 32, 2, 3), 24.3)]
)
def test_fp32(tmp_path, config, limit):
    """An FMA for each row of the tile, and W through shared memory: FMAs of one weight come from many threads."""
    assert is_run("sm_80", config, dtype=torch.float32), "no GPU runs it"
    code, loop, _ = main_loop(tmp_path, "sm_80", config, 0, torch.float32)
    assert (code.stack, code.local) == (0, 0)
    assert per_weight(loop, config) <= 1.03 * limit
    weights = config.tile_n * config.tile_k // (32 * config.warps)
    assert count(loop, "FFMA") <= config.tile_m * (weights + 1)
    assert count(loop, "LDGSTS.128") >= 1  # W's; x's tiles have fewer bytes
    assert not count(loop, "HMMA")
    assert not count(loop, "LDS.U8") and not count(loop, "STS.U8")


@pytest.mark.parametrize(
    ("target", "config", "format", "k"),
    [
        ("sm_80", C(64, 64, 32, 4, 3, True, products=2), "nf4", K),
        ("sm_80", C(64, 128, 32, 8, 3, True, products=2), "nf4", K),
        ("sm_80", C(128, 128, 32, 8, 3), "nf4", K),
        ("sm_90", C(64, 64, 32, 4, 4), "nf4", K),
        ("sm_120", C(64, 64, 32, 4, 3, True, products=2), "nf4", K),
        ("sm_90", C(16, 64, 64, 4, 4, True), "int8", K + 16),
    ],
    ids=lambda value: f"{value.tile_m}x{value.tile_n}" if isinstance(value, C) else str(value),
)
def test_eight_bytes_a_load(tmp_path, target, config, format, k):
    """The exceptions that docs/performance.md names. Blocks of 32 leave a thread 8 bytes of W where 64 rows of W have
    4 warps; sm_90 reads int8 so where it needs masks. Fewer bytes than that would be twice the loads.
    """
    options = {"dtype": torch.bfloat16, "format": format, "block_size": 32}
    assert is_run(target, config, **options, k=k), "no GPU runs it"
    code, loop, _ = main_loop(tmp_path, target, config, 0, *options.values(), k=k)
    weight_bytes = config.products * config.tile_n * config.tile_k // (2 if format == "nf4" else 1)
    x_bytes = config.products * config.tile_m * config.tile_k * 2
    threads = 32 * config.warps
    assert (code.stack, code.local) == (0, 0)
    assert count(loop, "LDGSTS.64") == weight_bytes / (8 * threads)
    assert count(loop, "LDGSTS.128") == count(loop, "LDGSTS") - count(loop, "LDGSTS.64") == x_bytes / (16 * threads)


def test_int8_rows_of_any_length(tmp_path):
    """Rows that begin at any address are read byte by byte, which docs/performance.md admits: two bytes' loads for one
    would be slower still.
    """
    config = C(16, 64, 64, 4, 4, True)
    assert is_run("sm_80", config, format="int8", k=K + 4), "no GPU runs it"
    made = launches_of("sm_80", config, format="int8", k=K + 4)
    code = machine_code(compiled(made[0], "sm_80")[0], "sm_80", tmp_path)
    loop = code.smallest_loop("LDG.U8")
    assert (code.stack, code.local) == (0, 0)
    assert count(loop, "LDG.U8") == config.tile_n * config.tile_k / (32 * config.warps)


def test_split_k_sum(tmp_path):
    """The parts of k have to be read by 16-byte loads: memory alone bounds this kernel."""
    made = launches_of("sm_80", C(8, 64, 64, 2, 4, True, splits=8))
    kernel, _ = compiled(made[1], "sm_80")
    code = [text for _, text in machine_code(kernel, "sm_80", tmp_path).instructions]
    assert count(code, "LDG") == count(code, "LDG.128") > 0
