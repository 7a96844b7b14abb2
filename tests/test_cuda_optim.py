"""The optimizers' CUDA kernels, executed by the emulator through the bindings: bits equal to the reference's."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, dtypes, magnitudes
from conftest_cuda import launchers, multiprocessors, unaligned
from cuda_bindings import alive, run, stub
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_steps import BF16, CONSTANTS, F16, F32, Parameter, assert_same_step, made_step, parameters

from lowbit.reference_optim import RULES, STATE_BLOCK, Constants, states_of


def check(step):
    """Run a step here and in the reference, and compare every bit; return what the reference has changed."""
    return assert_same_step(step, functools.partial(run, "optimizer_step"))


@settings(max_examples=60, deadline=None)
@given(
    parameters=st.lists(parameters.filter(lambda each: each.numel <= 1025), min_size=1, max_size=5),
    rule=st.sampled_from(list(RULES)),
    magnitude=magnitudes,
    grad_scale=st.sampled_from((None, 0.37, 1e-12, 1e20)),
    seed=st.sampled_from((None, 0, 2**40 + 5, -1)),
)
def test_bits_equal_the_reference(parameters, rule, magnitude, grad_scale, seed):
    """A run continued on a GPU would drift from the same run on a CPU, and states would be others in bitsandbytes."""
    check(made_step(parameters, rule, magnitude, grad_scale, seed))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", list(RULES))
def test_every_pair_of_dtypes(rule, dtype, grad_dtype):
    """Each dtype has its own accesses and conversions: whole blocks, a short last one, and memory without alignment."""
    some = Parameter(600, dtype, grad_dtype)
    states = ((False, False), (True, True), (True, False))
    every = [replace(some, in_8_bits=each, aligned=aligned) for each in states for aligned in (True, False)]
    check(made_step(every, rule, seed=3))


def test_warps_that_take_several_blocks():
    """On a small GPU each warp goes from parameter to parameter; one that was lost would keep its old values."""
    every = [Parameter(size, in_8_bits=(size % 2 == 1,) * 2) for size in (5000, 1, 0, 9000, 300, 7, 8191)]
    with multiprocessors(1):
        check(made_step(every))


def test_more_parameters_than_a_launch_holds():
    """The parameters that the table has no place for go to the next launch; 8B models have 448 factors of LoRA."""
    for count, launches in ((537, 1), (540, 2)):
        launchers().launches.clear()
        check(made_step([Parameter(3, BF16)] * count, seed=1))
        assert len(launchers().launches) == launches


def test_many_groups_of_parameters():
    """A launch holds 16 sets of constants: parameters of a 17th must not get those of another."""
    constants = [Constants(*torch.rand(8, generator=torch.Generator().manual_seed(i)).tolist()) for i in range(40)]
    launchers().launches.clear()
    check(made_step([Parameter(9, constants=i) for i in range(40)], constants=constants))
    assert len(launchers().launches) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(bad):
    """absmax alone says that a state is lost: a block that hid NaN would be garbage in silence."""
    for where in (0, 700):
        step = made_step([Parameter(701, in_8_bits=(True, True))])
        step[1][0][where] = bad
        _, _, arenas, layout, *_ = check(step)
        for _, absmax in states_of(arenas[0], 701, layout.tolist()[0], (True, False)):
            assert (~absmax.isfinite()).tolist() == [block == where // STATE_BLOCK for block in range(3)]


def test_every_position_of_a_state():
    """A state at one of the 65536 rounding positions, or at an edge between two, would get another code than on a CPU.

    The first moment becomes the gradient here, and the second its square.
    """
    positions = torch.arange(258 * 255, dtype=torch.float64).clamp(max=65535)
    middles, edges = ((positions - shift) / 32767.5 - 1.0 for shift in (0.0, 0.5))
    middles, edges, infinity = middles.float(), edges.float(), torch.tensor(math.inf)
    constants = [Constants(1.0, 0.0, 1.0, 0.0, 1.0, 0.1, 1.0, 1e-8)]
    for values in (middles, middles.abs().sqrt(), torch.nextafter(edges, -infinity), edges, edges.abs().sqrt()):
        # Each block begins with the 1 that is its absmax.
        grad = torch.cat([torch.ones(258, 1), values.clamp(-1, 1).view(258, 255)], 1).reshape(-1)
        step = made_step([Parameter(len(grad), in_8_bits=(True, True))], constants=constants)
        step[1][0].copy_(grad)
        check(step)


def test_every_code_is_decoded():
    """A wrong entry of a map would move one state in 256, which no loss curve shows."""
    step = made_step([Parameter(512, in_8_bits=(True, True))])
    for state, absmax in states_of(step[2][0], 512, step[3][0].tolist(), (True, False)):
        state.copy_(torch.arange(512).to(torch.uint8))
        absmax.copy_(torch.tensor([0.7, 3.0]))
    check(step)


def test_a_step_without_parameters():
    """A launch of an empty grid is an error of CUDA."""
    launchers().launches.clear()
    run("optimizer_step", [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0, dtype=torch.uint8)],
        torch.tensor([[0, 0, 0, -1, 0, -1]]), torch.tensor([CONSTANTS[0]]), "adamw", None, None)  # fmt: skip
    run("optimizer_step", [], [], [], torch.zeros(0, 6, dtype=torch.int64), torch.zeros(0, 8), "lion", None, None)
    assert not launchers().launches


#: (rule, states in 8 bits, dtype, bytes per element, most instructions per element as PTX counts them).
BUDGETS = (
    ("adamw", False, F32, 28, 52),
    ("adamw", False, BF16, 22, 58),
    ("adamw", True, F32, 16, 176),
    ("adamw", True, BF16, 10, 182),
    ("lion", False, F32, 20, 45),
    ("lion", True, F32, 14, 107),
)


@pytest.mark.parametrize(("rule", "in_8_bits", "dtype", "moved", "budget"), BUDGETS)
def test_budget_of_an_element(rule, in_8_bits, dtype, moved, budget):
    """DRAM leaves an H200 (4.3 TB/s; 132 processors, 128 lanes, 1.7 GHz) 6.7 instructions for each byte that moves.

    That is 187 for AdamW in fp32, which takes 50, and 20 more where the GPU has no instruction for a square root or a
    quotient: it waits for DRAM. With states in 8 bits it leaves 107 to fp32 parameters and 67 to bf16 ones; the machine
    code takes about 145, most for two codes (a step of their search is 3 instructions there, 5 in PTX). Every sector
    that moves is used; an absmax is 4 bytes of one, for each state of 256 elements.
    """
    results = []
    with multiprocessors(1):
        for blocks in (16, 48):
            run("optimizer_step", *made_step([Parameter(256 * blocks, dtype, dtype, (in_8_bits,) * 2)], rule))
            results.append(launchers().launches[-1].result)
    first, last = results
    elements = 32 * 256
    sectors = last.load_sectors + last.store_sectors - first.load_sectors - first.store_sectors
    scales = 64 / 256 * (2 if rule == "adamw" else 1) if in_8_bits else 0
    assert 32 * sectors == (moved + scales) * elements
    assert 32 * (last.warp_instructions - first.warp_instructions) <= budget * elements


def sum_of_squares(tensors):
    """The kernels' sum, checked against exact arithmetic."""
    total = run("sum_of_squares", tensors)
    assert total.shape == () and total.dtype == torch.float64
    exact = math.fsum(value * value for tensor in tensors for value in tensor.double().tolist())
    assert abs(total.item() - exact) <= 1e-12 * exact
    return total.item()


@settings(max_examples=25, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(st.one_of(st.integers(0, 40), st.sampled_from((4095, 4096, 4097, 9000))), dtypes, st.booleans()),
        min_size=1,
        max_size=4,
    ),
    magnitude=st.sampled_from((1e-30, 1.0, 1e4)),
)
def test_sum_of_squares(tensors, magnitude):
    """Gradients would be clipped to another norm."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for size, dtype, aligned in tensors:
        values = torch.randn(size, generator=generator) * magnitude
        values = (values.clamp(-6e4, 6e4) if dtype == F16 else values).to(dtype)
        made.append(values if aligned else unaligned(values))
    sum_of_squares(made)


def test_the_sum_is_the_same_on_every_gpu():
    """Runs continued on another GPU would clip by another norm in the last bit, and end as other models."""
    tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (70_000, 5, 9000)]
    launchers().launches.clear()
    large = sum_of_squares(tensors)
    with multiprocessors(1):
        assert sum_of_squares(tensors) == large
    # Where memory begins decides how it is read, not in which order it is summed.
    assert sum_of_squares([unaligned(tensor) for tensor in tensors]) == large


def test_sum_of_more_tensors_than_a_launch_holds():
    """Partial sums of the first launch would be overwritten by the second."""
    values = torch.randn(2182 + 4 + 9000, generator=torch.Generator().manual_seed(0))
    alive.append(launchers().know(values))
    launchers().launches.clear()
    total = stub().sum_of_squares([*values[:2186].split(1), values[2186:]])
    assert len(launchers().launches) == 3
    assert total.item() == pytest.approx(values.double().square().sum().item(), rel=1e-12, abs=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_that_is_not_finite(bad):
    """A loss scaler that is not told of an overflow would step with it."""
    assert not math.isfinite(run("sum_of_squares", [torch.ones(300), torch.tensor([1.0, bad])]).item())
