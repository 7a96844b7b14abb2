"""The oracle of the optimizers' ops: one pure update function for each rule, and states in 8 bits, in plain torch.

Every backend computes the same bits: each line below is one fp32 operation, rounded once, and :func:`fma` is one too.
``lowbit/ops/optim.py`` has the schemas; what the tables that the ops take mean is said at :class:`Constants` and
:data:`LAYOUT`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Elements of a state in 8 bits that share a scale.
STATE_BLOCK = 256

#: What a row of the op's ``layout`` says of one parameter: the row of its constants, the arena that holds its states,
#: and where in it, in bytes, each state and its scales begin; -1 for what there is not. States without scales are fp32.
LAYOUT = ("constants", "arena", "state1", "absmax1", "state2", "absmax2")


class Constants(NamedTuple):
    """The numbers of one step that parameters of a group share, each rounded to fp32 once."""

    decay: float  # 1 - lr * weight_decay
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1 ** step); of lion lr
    second_scale: float  # 1 / sqrt(1 - beta2 ** step); of lion 1
    eps: float


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c`` of fp32 tensors, rounded once, as one instruction does."""
    product, addend = a.double() * b.double(), c.double()  # the product is exact
    total = product + addend
    # What the sum in fp64 has lost. Where that is not nothing it becomes odd: rounding to fp32 is then the only one.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    odd = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), lost))
    is_even = (total.view(torch.int64) & 1) == 0
    return torch.where((lost != 0) & is_even & lost.isfinite(), odd, total).float()


def adamw(param, grad, state1, state2, c: Constants):
    """``(param, state1, state2)`` after a step of AdamW with decoupled weight decay; fp32 tensors, none is changed.

    Source: Loshchilov and Hutter, 2019 (arXiv 1711.05101); the order of operations is bitsandbytes' on a CPU.
    """
    state1 = fma(grad, _like(grad, c.one_minus_beta1), state1 * _like(grad, c.beta1))
    state2 = fma(grad * _like(grad, c.one_minus_beta2), grad, state2 * _like(grad, c.beta2))
    # torch's fp32 square root on a CPU is MKL's, whose last bit may be wrong.
    root = state2.double().sqrt().float()
    denominator = root * _like(grad, c.second_scale) + _like(grad, c.eps)
    return param * _like(grad, c.decay) - (state1 * _like(grad, c.step_size)) / denominator, state1, state2


def lion(param, grad, state1, state2, c: Constants):
    """The same for Lion, which has one state; ``state2`` is None.

    Source: Chen et al., 2023 (arXiv 2302.06675).
    """
    direction = fma(grad, _like(grad, c.one_minus_beta1), state1 * _like(grad, c.beta1)).sign()
    state1 = fma(grad, _like(grad, c.one_minus_beta2), state1 * _like(grad, c.beta2))
    return param * _like(grad, c.decay) - direction * _like(grad, c.step_size), state1, None


def _like(tensor: torch.Tensor, number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float32, device=tensor.device)


@dataclass(frozen=True)
class Rule:
    """How an optimizer changes a parameter: its pure function, and for each state whether it has negative values."""

    update: Callable
    signed_states: tuple[bool, ...]


#: Every rule, by the name that the op takes.
RULES = {"adamw": Rule(adamw, (True, False)), "lion": Rule(lion, (True,))}


@functools.cache
def state_map(signed: bool) -> torch.Tensor:
    """What the 256 codes of a state in 8 bits stand for, in units of the block's absmax: fp32 [256], sorted.

    bitsandbytes' dynamic map; without a sign each decade holds twice as many values. Source: Dettmers et al., "8-bit
    Optimizers via Block-wise Quantization", 2021 (arXiv 2110.02861).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        magnitudes = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += magnitudes.tolist() + (-magnitudes).tolist() * signed
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def code_table(signed: bool) -> torch.Tensor:
    """The code of the map's entry nearest to i / 32767.5 - 1, the lower of two: uint8 [65536].

    bitsandbytes rounds a state to such a position first, on a CPU, and computes its table in fp32.
    """
    entries = state_map(signed)
    positions = torch.arange(65536, dtype=torch.float32) / 32767.5 - 1.0
    above = torch.searchsorted(entries, positions).clamp(1, 255)
    below_is_nearer = (positions - entries[above - 1]) <= (entries[above] - positions)
    return torch.where(below_is_nearer, above - 1, above).to(torch.uint8)


def encode_state(state: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes uint8 [n], absmax fp32 [ceil(n / 256)])`` of a state, fp32 [n].

    Bytes are bitsandbytes'. Only where a block has NaN or inf they are not: its absmax is not finite here, and codes
    are whatever.
    """
    blocks = torch.nn.functional.pad(state, (0, -len(state) % STATE_BLOCK)).view(-1, STATE_BLOCK)
    absmax = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    positions = ((scaled + 1.0) * 32767.5 + 0.5).int()
    codes = code_table(signed).to(state.device)[positions]
    codes = torch.where((absmax == 0)[:, None], torch.zeros_like(codes), codes)
    return codes.view(-1)[: len(state)], absmax


def decode_state(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """The fp32 [n] of codes and scales as :func:`encode_state` returns them."""
    values = state_map(signed).to(codes.device)[codes.int()]
    return values * absmax.repeat_interleave(STATE_BLOCK)[: len(values)]


def round_stochastically(x: torch.Tensor, key: int) -> torch.Tensor:
    """fp32 [n] rounded to bf16 up or down, with probabilities that make the mean x. The same for the same key.

    16 bits of a hash of the element's index are added below the last bit that is kept. What is not finite stays.
    """
    index = torch.arange(x.numel(), device=x.device)
    mixed = _wrapped((index & _MASK) * _GOLDEN) + (index >> 32) * 0x85EBCA6B + key
    bits = (x.view(torch.int32) + (mix(mixed & _MASK) >> 16).int()) >> 16
    return torch.where(x.isfinite(), bits.to(torch.int16).view(torch.bfloat16), x.bfloat16())


def rounding_key(seed: int, parameter: int) -> int:
    """The key of a parameter, by its place in the list of a call with this seed (64 bits)."""
    high = mix(((seed >> 32 & _MASK) + parameter * _GOLDEN) & _MASK)
    return mix((seed & _MASK) ^ high)


_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def _wrapped(product):
    return product & _MASK  # int64 products wrap, and their low 32 bits are those of the product


def mix(x):
    """32 bits mixed, of an int or an int64 tensor: murmur3's finalizer."""
    x = _wrapped((x ^ x >> 16) * 0x85EBCA6B)
    x = _wrapped((x ^ x >> 13) * 0xC2B2AE35)
    return x ^ x >> 16


def states_of(arena: torch.Tensor, numel: int, row: list[int], signed_states: tuple[bool, ...]):
    """For each state of a row of the layout its views in the arena: ``(fp32 [n], None)`` or ``(codes, absmax)``."""
    blocks = -(-numel // STATE_BLOCK)
    for i in range(len(signed_states)):
        state, absmax = row[2 + 2 * i : 4 + 2 * i]
        if absmax < 0:
            yield arena[state : state + 4 * numel].view(torch.float32), None
        else:
            yield arena[state : state + numel], arena[absmax : absmax + 4 * blocks].view(torch.float32)


def optimizer_step(params, grads, arenas, layout, constants, rule, grad_scale, seed) -> None:
    """One step of every parameter, in place."""
    how, rows = RULES[rule], [Constants(*row) for row in constants.tolist()]
    for i, (param, grad, row) in enumerate(zip(params, grads, layout.tolist(), strict=True)):
        stored = list(states_of(arenas[row[1]], param.numel(), row, how.signed_states))
        states = [
            state.clone() if absmax is None else decode_state(state, absmax, signed)
            for (state, absmax), signed in zip(stored, how.signed_states, strict=True)
        ]
        grad = grad.reshape(-1).float()
        grad = grad if grad_scale is None else grad * grad_scale
        values = param.reshape(-1).float()
        new_values, *new_states = how.update(values, grad, *(states + [None])[:2], rows[row[0]])
        if seed is not None and param.dtype == torch.bfloat16:
            new_values = round_stochastically(new_values, rounding_key(seed, i))
        param.copy_(new_values.view(param.shape))
        for (state, absmax), new, signed in zip(stored, new_states, how.signed_states, strict=False):
            if absmax is None:
                state.copy_(new)
            else:
                codes, scales = encode_state(new, signed)
                state.copy_(codes), absmax.copy_(scales)


def sum_of_squares(tensors) -> torch.Tensor:
    """The sum of the squares of all elements, fp64."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    return sum((tensor.double().square().sum() for tensor in tensors), total)
