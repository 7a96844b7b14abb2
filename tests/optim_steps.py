"""Steps of optimizers for tests of the kernels: arguments that hurt, and the comparison with the reference."""

from dataclasses import dataclass

import torch
from cases import DTYPES, dtypes
from hypothesis import strategies as st

from lowbit.reference_optim import RULES, STATE_BLOCK, Constants, encode_state, states_of

F32, F16, BF16 = DTYPES
#: A usual step, one with extreme numbers, and one whose division may be by zero.
CONSTANTS = (
    Constants(0.999, 0.9, 0.1, 0.999, 0.001, 1e-3, 1.5, 1e-8),
    Constants(0.5, 0.99, 0.01, 0.9, 0.1, 2.0, 300.0, 1e-30),
    Constants(1.0, 0.5, 0.5, 0.5, 0.5, 0.01, 1.0, 0.0),
)


@dataclass(frozen=True)
class Parameter:
    numel: int
    dtype: torch.dtype = F32
    grad_dtype: torch.dtype = F32
    in_8_bits: tuple[bool, bool] = (False, False)
    aligned: bool = True
    constants: int = 0


sizes = st.one_of(st.integers(0, 70), st.sampled_from((255, 256, 257, 512, 767, 1025, 2048, 2049, 4100)))
parameters = st.builds(
    Parameter, sizes, dtypes, dtypes, st.tuples(st.booleans(), st.booleans()), st.booleans(), st.integers(0, 2)
)


class Arena:
    """States, one after the other: at multiples of 16 bytes, or of 4 only."""

    def __init__(self):
        self.parts, self.size = [], 0

    def add(self, values: torch.Tensor, aligned: bool) -> int:
        padding = -self.size % 16 + (0 if aligned else 4)
        begin = self.size + padding
        self.parts += [torch.zeros(padding, dtype=torch.uint8), values.view(torch.uint8)]
        self.size = begin + self.parts[-1].numel()
        return begin


def made_state(numel, in_8_bits, signed, magnitude, generator):
    """``(values, absmax or None)`` of a state as training has it: second moments are not negative."""
    values = torch.randn(numel, generator=generator) * (magnitude if signed else min(magnitude, 1e15) ** 2)
    values = values if signed else values.abs()
    return encode_state(values, signed) if in_8_bits else (values, None)


def made_step(parameters, rule="adamw", magnitude=1.0, grad_scale=None, seed=None, constants=CONSTANTS):
    """The op's arguments. Gradients are of this magnitude, and states of those."""
    generator = torch.Generator().manual_seed(7)
    params, grads, layout, arenas = [], [], [], (Arena(), Arena())
    for i, each in enumerate(parameters):
        values = torch.randn(each.numel, generator=generator), torch.randn(each.numel, generator=generator) * magnitude
        for made, like, dtype in zip((params, grads), values, (each.dtype, each.grad_dtype), strict=True):
            like = like.clamp(-6e4, 6e4) if dtype == F16 else like
            made.append(like.to(dtype) if each.aligned else moved(like.to(dtype)))
        row, arena = [each.constants, i % 2], arenas[i % 2]
        for in_8_bits, signed in zip(each.in_8_bits, RULES[rule].signed_states, strict=False):
            state, absmax = made_state(each.numel, in_8_bits, signed, magnitude, generator)
            row += [arena.add(state, each.aligned), -1 if absmax is None else arena.add(absmax, True)]
        layout.append(row + [-1] * (6 - len(row)))
    joined = [torch.cat([*arena.parts, torch.zeros(4, dtype=torch.uint8)]) for arena in arenas]
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    return (
        params,
        grads,
        joined,
        torch.tensor(layout, dtype=torch.int64).view(-1, 6),
        torch.tensor(constants),
        rule,
        scale,
        seed,
    )


def moved(tensor):
    """A copy that begins one element after a multiple of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor])[1:]


def copied(step):
    """The same arguments; what is changed in place is copied, to memory of the same alignment."""
    copies = [p.clone() if p.data_ptr() % 16 == 0 else moved(p) for p in step[0]]
    return copies, step[1], [arena.clone() for arena in step[2]], *step[3:]


def forget_what_is_not_finite(step):
    """Make NaN one NaN, and codes whose absmax is not finite zeros: the reference says no more of them."""
    params, _, arenas, layout, _, rule, *_ = step
    for param, row in zip(params, layout.tolist(), strict=True):
        param[param.isnan()] = torch.nan
        for state, absmax in states_of(arenas[row[1]], param.numel(), row, RULES[rule].signed_states):
            if absmax is None:
                state[state.isnan()] = torch.nan
                continue
            bad = ~absmax.isfinite()
            absmax[bad] = torch.inf
            state[bad.repeat_interleave(STATE_BLOCK)[: len(state)]] = 0


def assert_same_step(step, run):
    """Compare all bits of parameters and arenas after ``run`` did a step with the reference's; return those."""
    ours, theirs = copied(step), copied(step)
    run(*ours)
    torch.ops.lowbit_reference.optimizer_step(*theirs)
    for done in (ours, theirs):
        forget_what_is_not_finite(done)
    for our, their in zip([*ours[0], *ours[2]], [*theirs[0], *theirs[2]], strict=True):
        assert torch.equal(our.view(torch.uint8), their.view(torch.uint8))
    return theirs
