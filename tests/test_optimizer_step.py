"""The optimizers' ops: bits against the reference on every instruction set, and bitsandbytes' states; wrong calls."""

import math

import pytest
import torch
from cases import DTYPES, KERNELS, dtypes, kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import reference_optim
from lowbit.reference_optim import RULES, STATE_BLOCK, Constants

NATIVE = [name for name in KERNELS if name != "reference"]
needs_native = pytest.mark.skipif(not NATIVE, reason="no compiled extension")

#: Empty, single, around a vector, around a block of a state, and several blocks.
SIZES = (0, 1, 7, 16, 33, 255, 256, 257, 600, 1024, 2500)
#: Second moments are squares of these: subnormal, and near the largest.
MAGNITUDES = (1e-42, 1e-20, 1e-6, 1.0, 1e15)
CONSTANTS = torch.tensor(
    [
        Constants(0.99, 0.9, 0.1, 0.999, 0.001, 0.01, 2.0, 1e-8),
        Constants(1.0, 0.95, 0.05, 0.98, 0.02, 3e-4, 1.0, 1e-12),
    ]
)


def layout_of(sizes, in_8_bits, rule):
    """The table of parameters whose states lie in two arenas, and the arenas' sizes in bytes."""
    rows, ends = [], [0, 0]
    for i, (numel, eight) in enumerate(zip(sizes, in_8_bits, strict=True)):
        row = [i // 2 % 2, i % 2]
        for _ in RULES[rule].signed_states:
            begin = ends[i % 2]
            absmax = begin + (numel + 3) // 4 * 4
            row += [begin, absmax if eight else -1]
            ends[i % 2] = absmax + 4 * math.ceil(numel / STATE_BLOCK) if eight else begin + 4 * numel
        rows.append(row + [-1] * (6 - len(row)))
    return torch.tensor(rows, dtype=torch.long).view(-1, 6), ends


def make_step(sizes, rule="adamw", in_8_bits=None, param_dtypes=None, grad_dtypes=None, magnitude=1.0, seed=0):
    """The first five arguments of the op. Tensors begin one element past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    in_8_bits = in_8_bits or [False] * len(sizes)

    def made(numel, dtype, scale):
        limit = min(torch.finfo(dtype).max, 1e38)
        return (torch.randn(numel + 1, generator=generator) * scale).clamp(-limit, limit).to(dtype)[1:]

    params = [made(n, dtype, 1.0) for n, dtype in zip(sizes, param_dtypes or [torch.float32] * len(sizes), strict=True)]
    grads = [
        made(n, dtype, magnitude) for n, dtype in zip(sizes, grad_dtypes or [torch.float32] * len(sizes), strict=True)
    ]
    layout, ends = layout_of(sizes, in_8_bits, rule)
    arenas = [torch.zeros(end, dtype=torch.uint8) for end in ends]
    for numel, row in zip(sizes, layout.tolist(), strict=True):
        views = reference_optim.states_of(arenas[row[1]], numel, row, RULES[rule].signed_states)
        for (state, absmax), scale in zip(views, (magnitude, magnitude**2), strict=False):
            values = made(numel if absmax is None else absmax.numel(), torch.float32, scale).abs()
            if absmax is None:
                state.copy_(values)
            else:
                state.copy_(torch.randint(0, 256, (numel,), generator=generator))
                absmax.copy_(values)
    return params, grads, arenas, layout, CONSTANTS


def copies(arguments):
    """What a step changes, apart from the original."""
    params, grads, arenas, *tables = arguments
    return [p.clone() for p in params], grads, [a.clone() for a in arenas], *tables


def assert_same_bits(ours, theirs):
    for mine, expected in zip(ours[0] + ours[2], theirs[0] + theirs[2], strict=True):
        assert torch.equal(mine.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=60, deadline=None)
@given(
    parameters=st.lists(
        st.tuples(st.sampled_from(SIZES), dtypes, dtypes, st.booleans()),
        max_size=5,
    ),
    rule=st.sampled_from(sorted(RULES)),
    magnitude=st.sampled_from(MAGNITUDES),
    grad_scale=st.sampled_from((None, 0.3)),
    seed=st.sampled_from((None, 0, 2**63 - 1, -1)),
)
def test_bits_equal_the_reference(name, parameters, rule, magnitude, grad_scale, seed):
    """A run that goes on with another machine's kernels would train to something else."""
    sizes, param_dtypes, grad_dtypes, in_8_bits = ([row[i] for row in parameters] for i in range(4))
    ours = make_step(sizes, rule, in_8_bits, param_dtypes, grad_dtypes, magnitude)
    theirs = copies(ours)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    for _ in range(2):
        with kernels(name):
            torch.ops.lowbit.optimizer_step(*ours, rule, scale, seed)
        torch.ops.lowbit_reference.optimizer_step(*theirs, rule, scale, seed)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_bits_do_not_depend_on_threads(name, rule):
    """A run repeated on a machine with more cores would train to something else."""
    sizes, threads, results = (20001, 5, 0, 30000, *[300] * 40), torch.get_num_threads(), []
    start = make_step(sizes, rule, [i % 2 == 0 for i in range(len(sizes))], [DTYPES[i % 3] for i in range(len(sizes))])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = copies(start)
            with kernels(name):
                torch.ops.lowbit.optimizer_step(*step, rule, None, 5)
                squares = torch.ops.lowbit.sum_of_squares(list(step[0]))
            results.append((step, squares))
    finally:
        torch.set_num_threads(threads)
    for step, squares in results[1:]:
        assert_same_bits(step, results[0][0])
        assert torch.equal(squares, results[0][1])


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_absmax_shows_what_is_not_finite(name, bad, rule):
    """A bad gradient would silently become ordinary numbers in a state of 8 bits."""
    for at in (0, 255, 256, 599):
        params, grads, arenas, layout, constants = make_step((600,), rule, [True])
        grads[0][at] = bad
        with kernels(name):
            torch.ops.lowbit.optimizer_step(params, grads, arenas, layout, constants, rule, None, None)
        row = layout[0].tolist()
        for _, absmax in reference_optim.states_of(arenas[0], 600, row, RULES[rule].signed_states):
            assert absmax.isfinite().tolist() == [block != at // STATE_BLOCK for block in range(3)]


@pytest.mark.parametrize("signed", [True, False])
def test_state_maps_and_codes_equal_bitsandbytes(signed):
    """States loaded from a checkpoint of bitsandbytes would decode to other numbers."""
    bnb = pytest.importorskip("bitsandbytes")
    entries = bnb.functional.create_dynamic_map(signed=signed)
    assert torch.equal(reference_optim.state_map(signed), entries)
    positions = (torch.arange(65536, dtype=torch.float32) / 32767.5 - 1.0)[0 if signed else 32768 :]
    blocks = torch.nn.functional.pad(positions, (0, -len(positions) % 255)).view(-1, 255)
    blocks = torch.cat([torch.ones(len(blocks), 1), blocks], 1).reshape(-1)  # every absmax is 1
    expected, _ = torch.ops.bitsandbytes.quantize_blockwise(blocks, entries, STATE_BLOCK)
    codes, absmax = reference_optim.encode_state(blocks, signed)
    assert torch.equal(codes, expected) and (absmax == 1).all()
    assert torch.equal(codes.view(-1, 256)[:, 1:].reshape(-1)[: len(positions)], codes_at(positions, signed))


def codes_at(positions, signed):
    """What the reference's table holds at these positions."""
    return reference_optim.code_table(signed)[((positions + 1.0) * 32767.5 + 0.5).int()]


@pytest.mark.parametrize("name", NATIVE)
def test_every_position_has_the_code_of_the_reference(name):
    """One wrong entry of a kernel's table would be found by a random test only now and then."""
    positions = torch.arange(65536, dtype=torch.float32) / 32767.5 - 1.0
    positions = torch.cat([positions.view(-1, 128), torch.ones(512, 128)], 1).reshape(-1)
    # The gradients, and their squares, become the states.
    constants = torch.tensor([Constants(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0)])
    for rule, grad in (("lion", positions), ("adamw", positions.abs().sqrt())):
        params, _, arenas, layout, _ = make_step((len(grad),), rule, [True])
        ours = (params, [grad], arenas, layout, constants)
        theirs = copies(ours)
        with kernels(name):
            torch.ops.lowbit.optimizer_step(*ours, rule, None, None)
        torch.ops.lowbit_reference.optimizer_step(*theirs, rule, None, None)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("numel", [1, 300, 4097])
def test_states_equal_live_bitsandbytes(name, rule, numel):
    """A run begun with bitsandbytes' optimizers would go on differently."""
    bnb = pytest.importorskip("bitsandbytes").functional
    beta1, beta2, eps, lr, decay = 0.9, 0.98, 1e-8, 1e-3, 0.1
    maps = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
    codes = [torch.zeros(numel, dtype=torch.uint8) for _ in RULES[rule].signed_states]
    scales = [torch.zeros(math.ceil(numel / STATE_BLOCK)) for _ in codes]
    params, _, arenas, layout, _ = make_step((numel,), rule, [True])
    for arena in arenas:
        arena.zero_()
    theirs = params[0].clone()
    views = list(reference_optim.states_of(arenas[0], numel, layout[0].tolist(), RULES[rule].signed_states))
    ops = torch.ops.lowbit_reference if name == "reference" else torch.ops.lowbit
    for step in range(1, 6):
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(step))
        second = 1 / math.sqrt(1 - beta2**step) if rule == "adamw" else 1.0
        step_size = lr / (1 - beta1**step) if rule == "adamw" else lr
        constants = Constants(1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, second, eps)
        with kernels(name):
            ops.optimizer_step(params, [grad], arenas, layout, torch.tensor([constants]), rule, None, None)
        state2, map2, absmax2 = (codes[1], maps[1], scales[1]) if rule == "adamw" else (None, None, None)
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam" if rule == "adamw" else rule, grad, theirs, codes[0], state2, beta1, beta2, 0.0, 0.0, eps, step, lr,
            maps[0], map2, scales[0], absmax2, decay, 1.0,
        )  # fmt: skip
        for (state, absmax), their_codes, their_absmax in zip(views, codes, scales, strict=True):
            assert torch.equal(state, their_codes) and torch.equal(absmax, their_absmax)
        # Their order of operations is another one after the states.
        torch.testing.assert_close(params[0], theirs, rtol=1e-6, atol=1e-7)


def rounded_ones(ops, seed, count=2, numel=100_000, value=1.001):
    """``value`` in bf16 parameters, rounded stochastically."""
    params, grads, arenas, layout, _ = make_step([numel] * count, param_dtypes=[torch.bfloat16] * count)
    for tensor in (*params, *grads, *arenas):
        tensor.zero_()
    for param in params:
        param.fill_(1.0)
    constants = torch.tensor([Constants(value, 0.9, 0.1, 0.99, 0.01, 0.0, 1.0, 1.0)])
    ops.optimizer_step(params, grads, arenas, layout, constants, "adamw", None, seed)
    return params


@pytest.mark.parametrize("name", KERNELS)
def test_stochastic_rounding_has_the_mean_that_is_rounded(name):
    """Updates smaller than the spacing of bf16 would be lost, or added with a bias."""
    ops, value, spacing = torch.ops.lowbit_reference if name == "reference" else torch.ops.lowbit, 1.001, 2.0**-7
    with kernels(name):
        first, second = rounded_ones(ops, 3, value=value)
        again, other = rounded_ones(ops, 3, value=value)[0], rounded_ones(ops, 4, value=value)[0]
    assert set(first.unique().tolist()) == {1.0, 1.0 + spacing}
    share = (value - 1.0) / spacing
    deviation = spacing * math.sqrt(share * (1 - share) / first.numel())
    for rounded in (first, second, other):
        assert abs(rounded.double().mean() - value) < 5 * deviation
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares(name, dtype):
    """Gradients would be clipped to another norm."""
    ops = torch.ops.lowbit_reference if name == "reference" else torch.ops.lowbit
    generator = torch.Generator().manual_seed(0)
    scale = {torch.float32: 1e25, torch.bfloat16: 1e-25, torch.float16: 1.0}[dtype]
    tensors = [(torch.randn(n + 1, generator=generator) * scale).to(dtype)[1:] for n in (0, 1, 15, 17, 4096, 4097)]
    with kernels(name):
        total = ops.sum_of_squares([*tensors, torch.ones((), dtype=torch.float16)])
    assert total.dtype == torch.float64 and total.shape == ()
    exact = math.fsum([1.0, *(value**2 for tensor in tensors for value in tensor.tolist())])
    assert total.item() == pytest.approx(exact, rel=1e-12)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "sgd"}, "rule: expected adamw or lion, got sgd"),
        ({"grads": []}, "grads: expected 1 tensors, got 0"),
        ({"grads": [torch.ones(599)]}, "grads: expected 600 elements, got 599"),
        ({"grads": [torch.ones(600).double()]}, "grads: expected dtype float32, float16 or bfloat16, got float64"),
        ({"grads": [torch.ones(1200)[::2]]}, r"grads\[0\]: expected a contiguous tensor"),
        ({"params": [torch.ones(600).int()]}, "params: expected dtype float32, float16 or bfloat16, got int32"),
        ({"params": [torch.ones(1200)[::2]]}, r"params\[0\]: expected a contiguous tensor"),
        ({"arenas": []}, r"layout\[0\]: expected an arena below 0, got 0"),
        ({"arenas": [torch.zeros(2000)]}, "arenas: expected dtype uint8, got float32"),
        ({"arenas": [torch.zeros(4000, dtype=torch.uint8)[::2]]}, "arenas: expected contiguous"),
        ({"arenas": [torch.zeros(1223, dtype=torch.uint8)]}, r"layout\[0\]: .*arena of 1223 bytes, got 1212 and 12"),
        ({"arenas": [torch.zeros(2001, dtype=torch.uint8)[1:]]}, "arenas: expected memory aligned to 4"),
        ({"layout": torch.tensor([[2, 0, 0, 600, 612, 1212]])}, "row of constants below 2, got 2"),
        ({"layout": torch.tensor([[-1, 0, 0, 600, 612, 1212]])}, "row of constants below 2, got -1"),
        ({"layout": torch.tensor([[0, 1, 0, 600, 612, 1212]])}, "arena below 1, got 1"),
        ({"layout": torch.tensor([[0, 0, 2, 600, 612, 1212]])}, "multiples of 4"),
        ({"layout": torch.tensor([[0, 0, -4, 600, 612, 1212]])}, "multiples of 4 inside an arena"),
        ({"layout": torch.tensor([[0, 0, 0, -1, -1, -1]])}, "arena of 1224 bytes, got 0 and 2400"),
        ({"layout": torch.tensor([[0, 0, 0, 600, 612, 2**62]])}, "inside an arena of 1224 bytes"),
        ({"layout": torch.zeros(1, 6).int()}, r"layout: expected a contiguous CPU tensor, int64 \[n, 6\]"),
        ({"layout": torch.zeros(1, 5).long()}, r"layout: expected a contiguous CPU tensor, int64 \[n, 6\]"),
        ({"layout": torch.zeros(2, 6).long()}, "layout: expected 1 rows, got 2"),
        ({"constants": CONSTANTS.double()}, r"constants: expected a contiguous CPU tensor, float32 \[n, 8\]"),
        ({"constants": CONSTANTS[:, :7]}, "constants: expected a contiguous CPU tensor"),
        ({"grad_scale": torch.ones(2)}, "grad_scale: expected 1 elements, got 2"),
        ({"grad_scale": torch.ones(()).half()}, "grad_scale: expected dtype float32, got float16"),
    ],
)
def test_wrong_direct_calls_raise(change, message):
    """A wrong call would read and write out of bounds."""
    params, grads, _, _, constants = make_step((600,))
    arguments = {
        "params": params,
        "grads": grads,
        "arenas": [torch.zeros(1224, dtype=torch.uint8)],
        "layout": torch.tensor([[0, 0, 0, 600, 612, 1212]]),
        "constants": constants,
        "rule": "adamw",
        "grad_scale": None,
        "seed": None,
    }
    torch.ops.lowbit.optimizer_step(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.optimizer_step(**(arguments | change))


@needs_native
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.ones(4), torch.ones(4).double()], "tensors: expected dtype float32, float16 or bfloat16, got float64"),
        ([torch.ones(4), torch.ones(4, 4).T[1:]], r"tensors\[1\]: expected a contiguous tensor"),
    ],
)
def test_wrong_sums_raise(tensors, message):
    """A wrong call would sum another tensor's memory."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.sum_of_squares(tensors)
