"""A weight and its LoRA as one op in csrc/bindings/cuda.cpp: values, gradients, and how many launches they are."""

import contextlib

import pytest
import torch
from cases import UNIT_ROUNDOFF, assert_within, lora_tolerance, make_weight, product_tolerance
from conftest_cuda import launchers, unaligned
from conftest_models import llama
from cuda_bindings import OnStub, run

import lowbit
from lowbit.ops import shared_input
from lowbit_lora import LoraConfig, LoraModel

N, K, RANK, SCALING = 72, 192, 8, 0.7
#: Rows of x by the way that W takes there.
WAYS = {"gemv": 3, "gemm": 20, "decode": 260}


def layer(lora_dtype=torch.float32, bias=False, n=N, k=K, rank=RANK):
    """(weight, lora_a, lora_b, bias), all but the weight with a gradient."""
    generator = torch.Generator().manual_seed(0)
    q = lowbit.quantize(make_weight((n, k)))
    factors = [torch.randn(shape, generator=generator).to(lora_dtype) for shape in ((rank, k), (n, rank))]
    made = [*factors, torch.randn(n, generator=generator).to(lora_dtype) if bias else None]
    return q, *(each if each is None else each.requires_grad_() for each in made)


def exact_gradients(x, q, lora_a, lora_b, bias, grad, change=lambda tensor: tensor):
    """In fp64: [y, and the gradients for x, lora_a and lora_b], all operands having gone through ``change``."""
    leaves = [change(each.detach().double()).requires_grad_() for each in (x, lora_a, lora_b)]
    y = leaves[0] @ change(q.dequantize(torch.float32).double()).T
    y = y + SCALING * (leaves[0] @ leaves[1].T) @ leaves[2].T
    y = y if bias is None else y + change(bias.detach().double())
    return [y.detach(), *torch.autograd.grad(y, leaves, change(grad.double()))]


def assert_right(ours, x, q, lora_a, lora_b, bias, grad):
    """Check [y, and the gradients for x, lora_a and lora_b]."""
    exact = exact_gradients(x, q, lora_a, lora_b, bias, grad)
    magnitude = exact_gradients(x, q, lora_a, lora_b, bias, grad, torch.Tensor.abs)
    u = UNIT_ROUNDOFF[x.dtype]
    for i, our in enumerate(ours):
        of_weight = i < 2  # W or LoRA's product are rounded before the other is added to it
        terms = (K, N, max(x.shape[:-1].numel(), N), max(x.shape[:-1].numel(), K))[i] + RANK
        # LoRA's factors are split into two bf16 each, off by 2^-16; their products are three.
        bound = product_tolerance(magnitude[i], exact[i], 3 * terms, our.dtype, 3.1 * u * of_weight + 2.0**-13)
        assert our.shape == exact[i].shape
        assert_within(our, exact[i], bound)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_training_a_layer(way, dtype, lora_dtype, bias):
    """A factor read as its transpose, or a gradient of the other dtype, trains to something else."""
    q, lora_a, lora_b, bias_values = layer(lora_dtype, bias)
    x = torch.randn(WAYS[way], K, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    grad = torch.randn(WAYS[way], N, generator=torch.Generator().manual_seed(2)).to(dtype)
    with OnStub() as called:
        y = lowbit.lora_linear(x, q, lora_a, lora_b, SCALING, bias_values)
        leaves = [x, lora_a, lora_b, *([bias_values] if bias else [])]
        found = torch.autograd.grad(y, leaves, grad)
    assert [each.dtype for each in found] == [each.dtype for each in leaves]
    assert any(way.replace("decode", "dequantize") in name for name in called.launches) or dtype == torch.float32
    assert_right([y, *found[:3]], x, q, lora_a, lora_b, bias_values, grad)
    if bias:
        torch.testing.assert_close(found[3], grad.float().sum(0).to(lora_dtype))


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("is_dense", "bias", "dropout_p"), [(True, True, 0.0), (True, False, 0.3), (False, True, 0.3)])
def test_no_copy_in_fp32(is_dense, bias, dropout_p, lora_dtype):
    """Copies of x and grad in fp32 take three times their memory traffic, and fp32 products a tenth of bf16's speed.

    A dense weight's layer is 3 launches forward and 5 backward. Dropout adds itself, its gradient and the sum of two
    gradients of x; then LoRA's halves are launches of their own.
    """
    q, lora_a, lora_b, bias_values = layer(lora_dtype, bias)
    bias_values = bias_values.detach() if bias else None  # the base's, which is frozen
    weight = q.dequantize(torch.bfloat16) if is_dense else q
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(260, K, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(260, N, generator=generator).bfloat16()
    torch.manual_seed(2)
    mask = torch.nn.functional.dropout(torch.ones_like(x), dropout_p)
    torch.manual_seed(2)
    with OnStub() as called:
        y = lowbit.lora_linear(x, weight, lora_a, lora_b, SCALING, bias_values, dropout_p, training=True)
        forward, called.launches = called.launches, []
        found = torch.autograd.grad(y, (x, lora_a, lora_b), grad)
    # In torch's C++ for CPUs dropout is 3 ops, on a GPU one launch; its gradient is one, and the sum of x's gradients.
    of_dropout = (3, 2) if dropout_p else (0, 0)
    in_16_bits = lora_dtype != torch.float32  # the kernels make gradients of factors in fp32
    assert len(forward) - of_dropout[0] <= (3 if is_dense else 4), forward
    assert len(called.launches) - of_dropout[1] - 2 * in_16_bits <= (5 if is_dense else 6), called.launches

    exact, magnitude = (
        dropped_gradients(x, weight, lora_a, lora_b, bias_values, grad, mask, change)
        for change in (lambda tensor: tensor, torch.Tensor.abs)
    )
    u = UNIT_ROUNDOFF[torch.bfloat16]
    for i, our in enumerate((y, *found)):
        # LoRA's part is rounded on its own; with dropout both gradients of x are, and so is their sum.
        roundings = (3.1, 5.1)[bool(dropout_p)] * u * (i < 2) + (u if our.dtype != torch.float32 else 0)
        bound = product_tolerance(magnitude[i], exact[i], 3 * (260 + K + N + RANK), our.dtype, roundings + 2.0**-13)
        assert_within(our, exact[i], bound)


def dropped_gradients(x, weight, lora_a, lora_b, bias, grad, mask, change):
    """As :func:`exact_gradients`, LoRA's x being multiplied by ``mask``."""
    leaves = [change(each.detach().double()).requires_grad_() for each in (x, lora_a, lora_b)]
    dense = weight if type(weight) is torch.Tensor else weight.dequantize(torch.float32)
    y = leaves[0] @ change(dense.double()).T + SCALING * (leaves[0] * mask.double() @ leaves[1].T) @ leaves[2].T
    y = y if bias is None else y + change(bias.detach().double())
    return [y.detach(), *torch.autograd.grad(y, leaves, change(grad.double()))]


def launch_counts(way, lora_dtype, autocast) -> tuple[list[str], list[str]]:
    """What a layer's forward and backward launch, x being bf16.

    (Under autocast a norm's output is fp32, and casting it to bf16 is one launch more: nn.Linear's too.)
    """
    q, lora_a, lora_b, _ = layer(lora_dtype)
    x = torch.ones(WAYS[way], K, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.ones(WAYS[way], N, dtype=torch.bfloat16)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with OnStub() as called, context:
        y = lowbit.lora_linear(x, q, lora_a, lora_b, SCALING)
        forward = called.launches
        called.launches = []
        torch.autograd.grad(y, (x, lora_a, lora_b), grad)
        return forward, called.launches


def test_launches_of_a_layer():
    """Each launch more costs 2 to 5 us of the host, and a copy of x or grad in fp32 three times its memory traffic.

    Prints the table of docs/performance.md.
    """
    print("\n| rows go to | adapters | autocast | forward | backward |\n|---|---|---|---|---|")
    for way in WAYS:
        for lora_dtype in (torch.float32, torch.bfloat16):
            for autocast in (False, True):
                forward, backward = launch_counts(way, lora_dtype, autocast)
                name = str(lora_dtype).removeprefix("torch.")
                counts = f"{len(forward)} | {len(backward)}"
                print(f"| {way} | {name} | {'on' if autocast else 'off'} | {counts} |")
                assert len(forward) <= 3 and len(backward) <= (5 if way == "decode" else 6), (forward, backward)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("way", "with_lora", "without"), [("gemv", 2, 1), ("gemm", 2, 1), ("decode", 3, 2)])
def test_a_bias_is_no_launch(way, with_lora, without, bias_dtype):
    """A layer with a bias, as Qwen's q, k and v: converting it for the kernel would be a launch for each call."""
    (q, lora_a, lora_b, _), bias = layer(), torch.ones(N, dtype=bias_dtype)
    x = torch.ones(WAYS[way], K, dtype=torch.bfloat16)
    with OnStub() as called, torch.no_grad():
        lowbit.lora_linear(x, q, lora_a, lora_b, SCALING, bias)
        of_lora, called.launches = called.launches, []
        lowbit.linear(x, q, bias)
    assert len(of_lora) == with_lora, of_lora
    # torch's product, for a weight that is decoded first, takes a bias of its own dtype only.
    is_converted = way == "decode" and bias_dtype != x.dtype
    assert len(called.launches) == without + is_converted, called.launches


@pytest.mark.parametrize("rank", [RANK, 5])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_t_of_other_products(way, dtype, lora_dtype, rank):
    """What k and v take from q's launch is what they would compute, bit for bit: q gets its own all the same."""
    q, lora_a, lora_b, _ = layer(lora_dtype, rank=rank)
    x = torch.randn(WAYS[way], K, generator=torch.Generator().manual_seed(1)).to(dtype)
    downs = [lora_a.detach() * scale for scale in (1, -3, 2, 5)]
    weight = (*q.operands(), N, None)
    y, *ts = run("lora_linear_shared", x, *weight, downs[0], lora_b.detach(), SCALING, downs[1:])
    alone = [run("lora_linear", x, *weight, down, lora_b.detach(), SCALING) for down in downs]
    assert torch.equal(y, alone[0][0]) and len(ts) == 4
    for t, (_, own) in zip(ts, alone, strict=True):
        assert torch.equal(t, own)


def test_t_of_an_unaligned_factor():
    """One of k's factors that begins anywhere, as a view does, must not be read as q's that is aligned."""
    q, lora_a, lora_b, _ = layer()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    downs = [lora_a.detach(), unaligned(lora_a.detach() * 3).view(RANK, K)]
    _, *ts = run("lora_linear_shared", x, *q.operands(), N, None, downs[0], lora_b.detach(), SCALING, downs[1:])
    for t, down in zip(ts, downs, strict=True):
        exact, magnitude = x.double() @ down.double().T, x.double().abs() @ down.double().abs().T
        assert_within(t, exact, lora_tolerance(magnitude, exact, K, (x.dtype, down.dtype), torch.float32))


def test_too_many_or_unlike_others():
    """A direct call that the kernel does not serve is an error that says so, not a launch beside the memory."""
    q, lora_a, lora_b, _ = layer()
    down, x = lora_a.detach(), torch.ones(3, K, dtype=torch.bfloat16)
    for others, message in (
        ([down] * (shared_input.MOST + 1), f"others: expected at most {shared_input.MOST}"),
        ([down[:4]], "others"),
        ([down.half()], "others: expected dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run("lora_linear_shared", x, *q.operands(), N, None, down, lora_b.detach(), SCALING, others)


def attention_layers(lora_dtype):
    """q, k and v of a Llama, quantized and adapted."""
    model = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1).bfloat16()
    lowbit.quantize_(model, skip=["lm_head"])
    model = LoraModel(model, LoraConfig(rank=RANK, target_modules=["q_proj", "k_proj", "v_proj"]))
    layers = [module for name, module in model.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    return [layer.to(lora_dtype) if lora_dtype != torch.float32 else layer for layer in layers]


def launches_of_attention(way, lora_dtype, shares) -> tuple[int, int]:
    """How many launches q, k and v are, forward and backward, in the second of two steps."""
    layers, counts = attention_layers(lora_dtype), []
    with OnStub() as called, pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(launchers().set_idle, False)  # also where a known proof ends the test in its first step
        patch.setattr(shared_input, "_capture", lambda x: (1, 1) if shares else None)
        for step in range(2):
            launchers().set_idle(step == 0)  # its values and launches are nobody's business
            x = torch.randn(WAYS[way], 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
            called.launches = []
            ys = [layer(x) for layer in layers]
            counts.append(called.launches)
            called.launches = []
            leaves = [x, *(each for layer in layers for each in layer.parameters() if each.requires_grad)]
            grads = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
            counts.append(called.launches)
    return [*ys, *grads], [len(each) for each in counts[2:]]


def test_launches_of_q_k_and_v():
    """In a graph q, k and v share the launch that reads x for LoRA; nothing else changes: not a bit of the outputs.

    Prints the table of docs/performance.md.
    """
    print("\n| rows go to | adapters | forward, each alone | forward, shared | backward |\n|---|---|---|---|---|")
    for way in WAYS:
        for lora_dtype in (torch.float32, torch.bfloat16):
            alone, (forward_alone, backward_alone) = launches_of_attention(way, lora_dtype, shares=False)
            ours, (forward, backward) = launches_of_attention(way, lora_dtype, shares=True)
            name = str(lora_dtype).removeprefix("torch.")
            print(f"| {way} | {name} | {forward_alone} | {forward} | {backward} |")
            assert forward == forward_alone - (0 if way == "decode" else 2) and backward == backward_alone
            for our, their in zip(ours, alone, strict=True):
                assert torch.equal(our, their)
