"""The Triton kernels of the optimizers: bits equal to the reference's, and sums of squares near the exact ones."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, magnitudes
from conftest_triton import compiled_only, emulate, interpreted, launches
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_steps import BF16, CONSTANTS, F16, F32, Parameter, assert_same_step, made_step, moved, parameters

from lowbit import reference_optim
from lowbit.backends.triton import optim as module
from lowbit.backends.triton.shapes import OPTIMIZER_TILE, SUM_OF_SQUARES_TILE
from lowbit.reference_optim import RULES, STATE_BLOCK, Constants, rounding_key

ops = torch.ops.lowbit_triton


def emulated(*step, target="sm_80"):
    """Run the op's launches on the emulator; return them."""
    params, grads, arenas, *_ = step
    with launches(target) as made:
        module.optimizer_step(*step)
    reached = [tensor for tensor in (*params, *grads, *arenas) if tensor.numel()]
    for launch in made:
        emulate(launch, target=target, reached=reached)
    return made


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    parameters=st.lists(parameters, min_size=1, max_size=4),
    rule=st.sampled_from(list(RULES)),
    magnitude=magnitudes,
    grad_scale=st.sampled_from((None, 0.37, 1e-12, 1e20)),
    seed=st.sampled_from((None, 0, 2**40 + 5, -1)),
)
def test_bits_equal_the_reference(parameters, rule, magnitude, grad_scale, seed):
    """A run continued on a GPU would drift from the same run on a CPU, and states would be others in bitsandbytes."""
    assert_same_step(made_step(parameters, rule, magnitude, grad_scale, seed), ops.optimizer_step)


@interpreted
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("in_8_bits", [True, False])
def test_many_steps(rule, in_8_bits):
    """Errors of one step that no test sees would add up over the steps of a training."""
    step = made_step([Parameter(700, BF16, BF16, (in_8_bits,) * 2), Parameter(2500, in_8_bits=(in_8_bits,) * 2)], rule)
    for seed in range(5):
        step = assert_same_step((*step[:7], seed), ops.optimizer_step)


@interpreted
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    """The norm of a gradient that is not finite may be found late: codes must stay codes, and a block's scale tell."""
    for rule, numel in itertools.product(RULES, (600, 3)):
        step = made_step([Parameter(numel, BF16, BF16, (True, True)), Parameter(numel)], rule, seed=1)
        for grad in step[1]:
            grad[-1] = bad
        assert_same_step(step, ops.optimizer_step)


@interpreted
def test_zeros():
    """Where gradients have always been zero, a state's block has no scale: its codes must be what they were."""
    every = [Parameter(300, dtype, in_8_bits=(True, True)) for dtype in DTYPES]
    for rule in RULES:
        step = made_step(every, rule, magnitude=0.0)
        assert_same_step(step, ops.optimizer_step)


@interpreted
def test_nothing_to_do():
    """A group of parameters may be empty, or a parameter of an expert that a rank does not have."""
    empty = made_step([])
    ops.optimizer_step(*empty)
    assert_same_step(made_step([Parameter(0), Parameter(0, BF16, in_8_bits=(True, True))]), ops.optimizer_step)


@interpreted
def test_stochastic_rounding_is_not_biased():
    """Steps that are small next to a bf16 parameter have to move it as far in the mean as an fp32 one."""
    step = made_step([Parameter(4096, BF16)], "lion", constants=(Constants(1.0, 1.0, 0.0, 1.0, 0.0, 2**-12, 1.0, 0.0),))
    step[0][0].fill_(1.0)
    step[2][0][: 4 * 4096].view(torch.float32).fill_(1.0)
    ops.optimizer_step(*step[:7], 11)
    lost = 1.0 - step[0][0].double()
    assert set(lost.tolist()) == {0.0, 2.0**-8}
    assert abs(float(lost.mean()) - 2**-12) < 2**-12 / 3  # 256 of 4096 go down, with a deviation of 15


@interpreted
@pytest.mark.parametrize("rule", list(RULES))
def test_wrong_arguments(rule):
    """A table that does not fit the tensors would have a kernel write anywhere in the GPU's memory."""
    step = made_step([Parameter(600, in_8_bits=(True, True)), Parameter(70)], rule)
    names = ("params", "grads", "arenas", "layout", "constants", "rule", "grad_scale", "seed")

    def refused(expected, **changes):
        with pytest.raises(RuntimeError, match=expected):
            ops.optimizer_step(*(dict(zip(names, step, strict=True)) | changes).values())

    def layout(row, column, value):
        changed = step[3].clone()
        changed[row, column] = value
        return changed

    params, grads, arenas = step[:3]
    refused("rule: expected adamw or lion, got sgd", rule="sgd")
    refused("grads: expected 2 tensors, got 1", grads=grads[:1])
    refused("grads: expected 600 elements, got 70", grads=grads[::-1])
    refused("params: expected dtype", params=[params[0].double(), params[1]])
    refused(r"params\[0\]: expected a contiguous tensor", params=[torch.zeros(1200)[::2], params[1]])
    refused(r"grads\[1\]: expected a contiguous tensor", grads=[grads[0], torch.zeros(140)[::2]])
    refused(r"layout: expected 2 rows, got 1", layout=step[3][:1])
    refused(r"layout: expected a CPU tensor, int64 \[n, 6\]", layout=step[3].int())
    refused(r"constants: expected a CPU tensor, float32 \[n, 8\]", constants=step[4][:, :7])
    refused("grad_scale: expected 1 elements", grad_scale=torch.ones(2))
    refused("arenas: expected dtype uint8", arenas=[arenas[0].view(torch.int8), arenas[1]])
    refused("arenas: expected memory aligned to 4 bytes", arenas=[moved(arenas[0]), arenas[1]])
    refused(r"layout\[1\]: expected a row of constants below 3, got 3", layout=layout(1, 0, 3))
    refused(r"layout\[0\]: expected an arena below 2, got -1", layout=layout(0, 1, -1))
    size = arenas[0].numel()
    refused(r"layout\[0\]: expected multiples of 4 inside an arena of", layout=layout(0, 2, size - 596))
    refused(r"layout\[0\]: expected multiples of 4 inside an arena of", layout=layout(0, 2, 2))
    refused(r"layout\[0\]: expected multiples of 4 inside an arena of", layout=layout(0, 3, size - 8))
    refused(r"layout\[1\]: expected multiples of 4 inside an arena of", layout=layout(1, 2, -4))
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: expected a contiguous tensor"):
        ops.sum_of_squares([params[0], torch.zeros(140)[::2]])


@interpreted
@settings(max_examples=15, deadline=None)
@given(parameters=st.lists(parameters, min_size=1, max_size=5), magnitude=magnitudes)
def test_sum_of_squares(parameters, magnitude):
    """A wrong norm would clip all gradients wrongly."""
    _, grads, *_ = made_step(parameters, magnitude=magnitude)
    assert_near(ops.sum_of_squares(grads), grads)


def assert_near(ours, tensors):
    exact = math.fsum(float(value) ** 2 for tensor in tensors for value in tensor.double())
    assert ours.dtype == torch.float64 and ours.shape == ()
    assert abs(float(ours) - exact) <= 1e-12 * exact


@interpreted
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sum_of_squares_is_not_finite(bad):
    """A step is left out where the gradient is not finite; a sum that hid that would write NaN to all parameters."""
    tensors = [torch.ones(5000), torch.ones(3, dtype=BF16)]
    tensors[1][2] = bad
    assert not math.isfinite(float(ops.sum_of_squares(tensors)))


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(F32, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize("rule", list(RULES))
def test_machine_instructions(rule, dtype, grad_dtype, target):
    """Roundings as NVIDIA's GPUs execute them: an approximate root or quotient, or a contraction, changes bits.

    Parameters of several programs, with a short last block and without alignment; then those of the accesses of 16
    bytes alone.
    """
    some = Parameter(OPTIMIZER_TILE + 600, dtype, grad_dtype, constants=1)
    states = ((False, False), (True, True), (True, False))
    every = [replace(some, in_8_bits=each, aligned=aligned) for each in states for aligned in (True, False)]
    run = lambda *step: emulated(*step, target=target)  # noqa: E731
    assert_same_step(made_step(every, rule, grad_scale=0.37, seed=3), run)
    whole = [Parameter(numel, dtype, grad_dtype, (True, True)) for numel in (16, 4096 + 48)]
    assert_same_step(made_step(whole, rule), run)


@compiled_only
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-20, 1e15, 1e30])
def test_machine_instructions_at_the_ends_of_fp32(magnitude):
    """A GPU that took subnormal numbers for zero would have other states than the CPU that continues its run."""
    every = [Parameter(700, in_8_bits=(in_8_bits,) * 2, constants=i) for i in range(3) for in_8_bits in (True, False)]
    for rule in RULES:
        assert_same_step(made_step(every, rule, magnitude), emulated)


@compiled_only
def test_not_finite_stays_in_bounds():
    """NaN as a position of the table would read anywhere."""
    for rule, bad in itertools.product(RULES, (math.nan, math.inf)):
        step = made_step([Parameter(600, BF16, BF16, (True, True))], rule, seed=1)
        step[1][0][300] = bad
        assert_same_step(step, emulated)


@compiled_only
def test_one_launch_of_each_kind():
    """Hundreds of LoRA's factors would be hundreds of launches, 5 us each."""
    factors = [Parameter(16 * (i + 1), BF16, BF16, (True, True)) for i in range(9)]
    with launches("sm_80") as made:
        module.optimizer_step(*made_step(factors, seed=0))
        assert len(made) == 1 and made[0].values["ALIGNED"]
        module.optimizer_step(*made_step([*factors, replace(factors[0], dtype=F32)]))
        assert len(made) == 3
        module.optimizer_step(*made_step([*factors, replace(factors[0], aligned=False)]))
        assert len(made) == 4 and not made[3].values["ALIGNED"]
    assert made[0].values["tiles"] is made[1].values["tiles"], "what depends on sizes alone is copied to the GPU once"


@compiled_only
def test_sum_of_squares_machine_instructions():
    """Each dtype's own loads, whole programs and the rest of one, with alignment and without."""
    for aligned, sizes in ((True, (SUM_OF_SQUARES_TILE, 4096 + 48)), (False, (SUM_OF_SQUARES_TILE + 7, 1, 0))):
        every = [Parameter(size, grad_dtype=dtype, aligned=aligned) for dtype in DTYPES for size in sizes]
        _, grads, *_ = made_step(every)
        with launches("sm_80") as made:
            module.sum_of_squares(grads)
        assert len(made) == len(DTYPES)
        for launch in made:
            emulate(launch, reached=[grad for grad in grads if grad.numel()])
        assert_near(sum(launch.values["partial_sums"].sum() for launch in made), grads)


@compiled_only
def test_more_than_31_bits():
    """An embedding or a stack of experts may have more elements than 32 bits can number: its last program."""
    last, first = OPTIMIZER_TILE - 100, 2**32
    numel = first + last
    param, grad = (torch.empty(numel, dtype=BF16) for _ in range(2))  # no memory where nothing is written
    absmax_at = -(-numel // 16) * 16
    arena = torch.empty(absmax_at + 4 * -(-numel // STATE_BLOCK), dtype=torch.uint8)
    ends = param[first:], grad[first:], arena[first:]
    small = made_step([Parameter(last, BF16, BF16, (True, True))], "lion", seed=5)
    ends[0].copy_(small[0][0])
    ends[1].copy_(small[1][0])
    ((codes, absmax),) = reference_optim.states_of(small[2][0], last, small[3][0].tolist(), (True,))
    arena[first:numel].copy_(codes)
    arena[-absmax.nbytes :].copy_(absmax.view(torch.uint8))

    layout = torch.tensor([[0, 0, 0, absmax_at, -1, -1]])
    with launches("sm_80") as made:
        module.optimizer_step([param], [grad], [arena], layout, torch.tensor(CONSTANTS), "lion", None, 5)
    emulate(made[0], reached=ends, blocks=[made[0].grid[0] - 1])

    # The reference's step on the last elements, with their numbers in the hash.
    state = reference_optim.decode_state(codes, absmax, True)
    values, state, _ = reference_optim.lion(small[0][0].float(), small[1][0].float(), state, None, CONSTANTS[0])
    numbers = torch.arange(first, numel)
    mixed = (numbers & 0xFFFFFFFF) * 0x9E3779B9 + (numbers >> 32) * 0x85EBCA6B + rounding_key(5, 0)
    dither = (reference_optim.mix(mixed & 0xFFFFFFFF) >> 16).int()
    assert torch.equal(ends[0].view(torch.int16), (values.view(torch.int32) + dither >> 16).to(torch.int16))
    codes, absmax = reference_optim.encode_state(state, True)
    assert torch.equal(arena[first:numel], codes)
    assert torch.equal(arena[-absmax.nbytes :], absmax.view(torch.uint8))
