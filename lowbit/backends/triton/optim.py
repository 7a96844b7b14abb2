"""optimizer_step and sum_of_squares: one launch for all tensors of a kind, which reads their addresses from a table.

A kind is what code is compiled for: dtypes, and which states are in 8 bits. LoRA's parameters are of one kind. A second
table says which part of which tensor each program takes. It depends on sizes alone, so it stays on the device; that of
addresses is made at each call, in pinned memory, and copied without waiting.

The states are bit for bit those of ``lowbit/reference_optim.py``: ``launch`` keeps products and sums apart, and what is
one rounding there is ``tl.fma`` here.
"""

import functools
from collections.abc import Hashable, Iterable

import torch
import triton
import triton.language as tl

from ... import reference_optim
from ...reference_optim import LAYOUT, RULES, STATE_BLOCK, Constants
from .decode import DTYPES, round_to
from .launch import launch
from .operands import check_contiguous, checked, wrong
from .quantize import largest_magnitude
from .shapes import OPTIMIZER_TILE, SUM_OF_SQUARES_TILE, WARPS

_STATE_BLOCK = tl.constexpr(STATE_BLOCK)
#: What a row of the step's table has, one int64 word each: addresses of states are in the columns that say in the op's
#: ``layout`` where they are in the arena. The constants follow, two in a word.
_PARAM, _GRAD, _STATE1, _ABSMAX1, _STATE2, _ABSMAX2, _NUMEL, _KEY, _CONSTANTS = map(tl.constexpr, range(9))
_STEP_WORDS = tl.constexpr(_CONSTANTS.value + len(Constants._fields) // 2)
#: Addresses and sizes that vectors of 16 bytes need to be multiples of 16.
_OF_VECTORS = [column.value for column in (_PARAM, _GRAD, _STATE1, _STATE2, _NUMEL)]
#: A row of the sum's table: an address, and how many elements are there.
_SUM_WORDS = tl.constexpr(2)
_GOLDEN, _MIX1, _MIX2 = tl.constexpr(0x9E3779B9), tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)


@triton.jit
def _tile_of_program(table, tiles, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Return (the row of this program's tensor, its first element there, int64)."""
    entry = tiles + 2 * tl.program_id(0).to(tl.int64)
    return table + tl.load(entry) * WORDS, tl.load(entry + 1).to(tl.int64) * TILE


@triton.jit
def _pointer(word, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return what the address in a word of a table points to. ``ALIGNED``: it is a multiple of 16."""
    pointer = tl.load(word).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _elements_left(word, first, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how many elements a program has, int32, where a word has those of its tensor."""
    numel = tl.load(word)
    left = tl.minimum(numel - first, TILE).to(tl.int32)
    return tl.multiple_of(left, 16) if ALIGNED else left


@triton.jit
def _constants(words):
    """Return the numbers that two of each word are, in the order of ``Constants``."""
    numbers = words.to(tl.pointer_type(tl.float32))
    first_four = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    return first_four + (tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7))


@triton.jit
def _load_state(values, absmax, first, element, block, left, state_map):
    """Return the fp32 elements of a state, which is fp32 where there is no map."""
    if state_map is None:
        return tl.load(values + first + element, mask=element < left, other=0.0)
    else:
        codes = tl.load(values + first + element, mask=element < left, other=0)
        scales = tl.load(absmax + first // _STATE_BLOCK + block, mask=block * _STATE_BLOCK < left, other=0.0)
        return tl.load(state_map + codes.to(tl.int32)) * scales[:, None]


@triton.jit
def _store_state(values, absmax, first, element, block, left, state_map, code_table, state):
    if state_map is None:
        tl.store(values + first + element, state, mask=element < left)
    else:
        scales = largest_magnitude(tl.where(element < left, state, 0.0))
        # A block of zeros has no inverse.
        inverse = tl.div_rn(tl.full([block.shape[0]], 1.0, tl.float32), tl.where(scales == 0.0, 1.0, scales))
        scaled = state * inverse[:, None]
        scaled = tl.where(scaled > -1.0, scaled, -1.0)  # NaN too
        scaled = tl.where(scaled < 1.0, scaled, 1.0)
        codes = tl.load(code_table + ((scaled + 1.0) * 32767.5 + 0.5).to(tl.int32))
        codes = tl.where(scales[:, None] == 0.0, 0, codes).to(tl.uint8)
        tl.store(values + first + element, codes, mask=element < left)
        tl.store(absmax + first // _STATE_BLOCK + block, scales, mask=block * _STATE_BLOCK < left)


@triton.jit
def _adamw(param, grad, state1, state2, constants):
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, second_scale, eps = constants
    state1 = tl.fma(grad, one_minus_beta1, state1 * beta1)
    state2 = tl.fma(grad * one_minus_beta2, grad, state2 * beta2)
    denominator = tl.sqrt_rn(state2) * second_scale + eps
    return param * decay - tl.div_rn(state1 * step_size, denominator), state1, state2


@triton.jit
def _lion(param, grad, state1, constants):
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, _, _ = constants
    direction = tl.fma(grad, one_minus_beta1, state1 * beta1)
    direction = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, 0.0))
    state1 = tl.fma(grad, one_minus_beta2, state1 * beta2)
    return param * decay - direction * step_size, state1


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 13)) * _MIX2
    return x ^ (x >> 16)


@triton.jit
def _dithered(values, key, first, element):
    """Return fp32 ``values`` rounded stochastically to bf16, by the hash of the element's number in its parameter."""
    # The number's lower half does not wrap within a program, whose first element is a multiple of their count.
    start = first.to(tl.uint32) * _GOLDEN + (first >> 32).to(tl.uint32) * _MIX1 + key.to(tl.uint32)
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + (_mix(start + element.to(tl.uint32) * _GOLDEN) >> 16)) & 0xFFFF0000
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def optimizer_step_kernel(
    table,
    tiles,
    grad_scale,
    map1,
    codes1,
    map2,
    codes2,
    RULE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program steps TILE elements of one parameter, in rows that are the blocks of its states.

    ``map1``, ``codes1``: what the codes of the first state stand for, and the code of each position; None for fp32.
    """
    row, first = _tile_of_program(table, tiles, _STEP_WORDS, TILE)
    left = _elements_left(row + _NUMEL, first, TILE, ALIGNED)
    block = tl.arange(0, TILE // _STATE_BLOCK)
    element = block[:, None] * _STATE_BLOCK + tl.arange(0, _STATE_BLOCK)[None, :]
    constants = _constants(row + _CONSTANTS)

    grad = tl.load(_pointer(row + _GRAD, GRAD_DTYPE, ALIGNED) + first + element, mask=element < left, other=0.0)
    grad = grad.to(tl.float32)
    if grad_scale is not None:
        grad *= tl.load(grad_scale)
    params = _pointer(row + _PARAM, PARAM_DTYPE, ALIGNED) + first + element
    param = tl.load(params, mask=element < left, other=0.0).to(tl.float32)
    values1 = _pointer(row + _STATE1, tl.float32 if map1 is None else tl.uint8, ALIGNED)
    absmax1 = _pointer(row + _ABSMAX1, tl.float32, False)
    state1 = _load_state(values1, absmax1, first, element, block, left, map1)
    if RULE == "adamw":
        values2 = _pointer(row + _STATE2, tl.float32 if map2 is None else tl.uint8, ALIGNED)
        absmax2 = _pointer(row + _ABSMAX2, tl.float32, False)
        state2 = _load_state(values2, absmax2, first, element, block, left, map2)
        param, state1, state2 = _adamw(param, grad, state1, state2, constants)
        _store_state(values2, absmax2, first, element, block, left, map2, codes2, state2)
    else:
        param, state1 = _lion(param, grad, state1, constants)
    _store_state(values1, absmax1, first, element, block, left, map1, codes1, state1)
    if STOCHASTIC:
        param = _dithered(param, tl.load(row + _KEY), first, element)
    tl.store(params, round_to(param, PARAM_DTYPE), mask=element < left)


@triton.jit
def sum_of_squares_kernel(table, tiles, partial_sums, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Each program sums the squares of TILE elements of one tensor."""
    row, first = _tile_of_program(table, tiles, _SUM_WORDS, TILE)
    left = _elements_left(row + 1, first, TILE, ALIGNED)
    element = tl.arange(0, TILE)
    values = tl.load(_pointer(row, DTYPE, ALIGNED) + first + element, mask=element < left, other=0.0)
    values = values.to(tl.float32).to(tl.float64)
    tl.store(partial_sums + tl.program_id(0), tl.sum(values * values, axis=0))


@functools.lru_cache(maxsize=32)
def _tiles(sizes: tuple[tuple[int, int], ...], tile: int, device: torch.device) -> torch.Tensor:
    """Return for each program (row of its tensor, number of its tile there), int32, of (row, elements) of tensors."""
    rows, elements = torch.tensor(sizes).view(-1, 2).unbind(1)
    counts = -(-elements // tile)
    ends = counts.cumsum(0)
    number = torch.arange(int(counts.sum())) - (ends - counts).repeat_interleave(counts)
    return torch.stack([rows.repeat_interleave(counts), number], 1).to(device, torch.int32)


@functools.cache
def _state_tables(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what codes stand for, fp32 [256], and the code of each position, uint8 [65536], on ``device``."""
    return reference_optim.state_map(signed).to(device), reference_optim.code_table(signed).to(device)


def _kinds(kinds: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """Return where each kind is."""
    found = {}
    for row, kind in enumerate(kinds):
        found.setdefault(kind, []).append(row)
    return found


def _copied(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a table on ``device``; no GPU is waited for."""
    return (table.pin_memory() if device.type in ("cuda", "xpu") else table).to(device, non_blocking=True)


def _addresses(name: str, tensors, numels: list[int], like: torch.Tensor | None = None) -> torch.Tensor:
    """Return where each tensor is: contiguous, of so many floats, on ``like``'s device (that of the first).

    A step has hundreds of them, so each is only looked at once unless it is wrong.
    """
    like = tensors[0] if like is None else like
    device = like.device
    for i, (tensor, numel) in enumerate(zip(tensors, numels, strict=True)):
        fits = tensor.dtype in DTYPES and tensor.numel() == numel and tensor.device == device
        if not (fits and tensor.is_contiguous()):
            checked(name, tensor, numel, like)
            check_contiguous(f"{name}[{i}]", tensor)
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def _check_tables(layout: torch.Tensor, constants: torch.Tensor, count: int) -> None:
    for name, table, dtype, columns in (
        ("layout", layout, torch.int64, len(LAYOUT)),
        ("constants", constants, torch.float32, len(Constants._fields)),
    ):
        if table.device.type != "cpu" or table.dtype != dtype or table.dim() != 2 or table.shape[1] != columns:
            expected = f"a CPU tensor, {str(dtype).removeprefix('torch.')} [n, {columns}]"
            raise wrong(name, expected, f"{table.device}, {table.dtype} {list(table.shape)}")
    if len(layout) != count:
        raise wrong("layout", f"{count} rows", len(layout))


def _check_below(what: str, column: torch.Tensor, end: int) -> None:
    for i in ((column < 0) | (column >= end)).nonzero()[:1, 0].tolist():
        raise wrong(f"layout[{i}]", f"{what} below {end}", int(column[i]))


def _check_inside(begin: torch.Tensor, sizes: torch.Tensor, arena_sizes: torch.Tensor) -> None:
    """RuntimeError unless so many bytes from ``begin`` on are in the arena, for each parameter."""
    for i in ((begin < 0) | (begin % 4 != 0) | (sizes > arena_sizes - begin)).nonzero()[:1, 0].tolist():
        expected = f"multiples of 4 inside an arena of {arena_sizes[i]} bytes"
        raise wrong(f"layout[{i}]", expected, f"{begin[i]} and {sizes[i]} bytes from there")


def _checked_arenas(arenas: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return (address, bytes) of each arena."""
    for arena in arenas:
        checked("arenas", arena, arena.numel(), like, torch.uint8)
        check_contiguous("arenas", arena)
        if arena.data_ptr() % 4:
            raise wrong("arenas", "memory aligned to 4 bytes", f"address {arena.data_ptr()}")
    return torch.tensor([(arena.data_ptr(), arena.numel()) for arena in arenas]).view(-1, 2)


def _step_table(params, grads, arenas, layout, constants, states: int, seed) -> torch.Tensor:
    """Return the kernel's table, on the host, of checked arguments. ``states``: how many the rule has."""
    numels = [param.numel() for param in params]
    of_params, of_grads = _addresses("params", params, numels), _addresses("grads", grads, numels, params[0])
    arena_ranges = _checked_arenas(arenas, params[0])
    _check_below("a row of constants", layout[:, 0], len(constants))
    _check_below("an arena", layout[:, 1], len(arenas))
    addresses, arena_sizes = arena_ranges[layout[:, 1]].unbind(1)

    table = torch.zeros(len(params), _STEP_WORDS.value, dtype=torch.int64)
    table[:, _PARAM.value], table[:, _GRAD.value] = of_params, of_grads
    numel = table[:, _NUMEL.value] = torch.tensor(numels)
    for i in range(2, 2 + 2 * states, 2):
        state, absmax = layout[:, i], layout[:, i + 1]
        in_8_bits = absmax >= 0
        _check_inside(state, torch.where(in_8_bits, numel, 4 * numel), arena_sizes)
        _check_inside(absmax.clamp(min=0), torch.where(in_8_bits, 4 * -(-numel // STATE_BLOCK), 0), arena_sizes)
        table[:, i] = addresses + state
        table[:, i + 1] = torch.where(in_8_bits, addresses + absmax, 0)
    if seed is not None:
        table[:, _KEY.value] = reference_optim.rounding_key(seed, torch.arange(len(params)))
    table[:, _CONSTANTS.value :] = constants[layout[:, 0]].view(torch.int64)
    return table


def optimizer_step(params, grads, arenas, layout, constants, rule, grad_scale, seed) -> None:
    if rule not in RULES:
        raise wrong("rule", " or ".join(RULES), rule)
    if len(grads) != len(params):
        raise wrong("grads", f"{len(params)} tensors", len(grads))
    _check_tables(layout, constants, len(params))
    if not params:
        return
    device, signed_states = params[0].device, RULES[rule].signed_states
    if grad_scale is not None:
        grad_scale = checked("grad_scale", grad_scale, 1, params[0], torch.float32)
    on_host = _step_table(params, grads, arenas, layout, constants, len(signed_states), seed)
    table = _copied(on_host, device)
    have_absmax = (layout[:, _ABSMAX1.value :: 2][:, : len(signed_states)] >= 0).tolist()
    kinds = (
        (param.dtype, grad.dtype, *of_states) for param, grad, of_states in zip(params, grads, have_absmax, strict=True)
    )
    for (param_dtype, grad_dtype, *in_8_bits), rows in _kinds(kinds).items():
        of_kind = on_host[rows]
        tiles = _tiles(tuple(zip(rows, of_kind[:, _NUMEL.value].tolist(), strict=True)), OPTIMIZER_TILE, device)
        tables = [None] * 4
        for i, signed in enumerate(signed_states):
            if in_8_bits[i]:
                tables[2 * i : 2 * i + 2] = _state_tables(signed, device)
        launch(
            optimizer_step_kernel,
            (len(tiles),),
            *(table, tiles, grad_scale, *tables),
            RULE=rule,
            PARAM_DTYPE=DTYPES[param_dtype],
            GRAD_DTYPE=DTYPES[grad_dtype],
            STOCHASTIC=seed is not None and param_dtype == torch.bfloat16,
            ALIGNED=_is_aligned(of_kind[:, _OF_VECTORS]),
            TILE=OPTIMIZER_TILE,
            num_warps=WARPS,
        )


def _is_aligned(words: torch.Tensor) -> bool:
    return not bool((words % 16).any())


def sum_of_squares(tensors) -> torch.Tensor:
    device, partial_sums = tensors[0].device, []
    numels = [tensor.numel() for tensor in tensors]
    on_host = torch.stack([_addresses("tensors", tensors, numels), torch.tensor(numels)], 1)
    table = _copied(on_host, device)
    for dtype, rows in _kinds(tensor.dtype for tensor in tensors).items():
        tiles = _tiles(tuple((row, numels[row]) for row in rows), SUM_OF_SQUARES_TILE, device)
        partial_sums.append(torch.empty(len(tiles), dtype=torch.float64, device=device))
        launch(
            sum_of_squares_kernel,
            (len(tiles),),
            *(table, tiles, partial_sums[-1]),
            DTYPE=DTYPES[dtype],
            ALIGNED=_is_aligned(on_host[rows]),
            TILE=SUM_OF_SQUARES_TILE,
            num_warps=WARPS,
        )
    return torch.cat(partial_sums).sum()
