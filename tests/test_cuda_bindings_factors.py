"""LoRA where it is no part of one op with the weight, on csrc/bindings/cuda.cpp: several adapters, hooks, rows, tables.

Activations have 16 bits and adapters fp32. No copy of x, of y or of a gradient may be made in fp32.
"""

import contextlib
import functools

import pytest
import torch
from cases import UNIT_ROUNDOFF, assert_within, product_tolerance
from cuda_bindings import OnStub
from torch import nn

import lowbit
from lowbit_lora import LoraConfig, LoraModel
from lowbit_lora.layers import LoRALinear

BATCH, TOKENS, N, K = 5, 52, 72, 192
ROWS = BATCH * TOKENS
RANKS = {"a": 8, "b": 4, "c": 8}
ADAPTER_OF_ROW = ["c", "a", "__base__", "b", "a"]
#: Kind of layer -> the dropout of its adapters.
KINDS = {
    "several with dropout": (0.3, 0.5, 0.0),
    "several without": (0.0, 0.0, 0.0),
    "hooked": (0.3, 0.0, 0.0),
    "dense": (0.3, 0.5, 0.0),
    "dense and hooked": (0.3, 0.5, 0.0),
    "rows": (0.0, 0.0, 0.0),
    "rows with dropout": (0.3, 0.5, 0.0),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def adapted(kind: str) -> LoraModel:
    """One layer with three adapters, which train."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).bfloat16()
    if "dense" not in kind:
        lowbit.quantize_(model)
    configs = [
        LoraConfig(rank=rank, lora_alpha=rank * scaling, lora_dropout=dropout, target_modules=["0"])
        for rank, scaling, dropout in zip(RANKS.values(), (0.5, 2, 1), KINDS[kind], strict=True)
    ]
    model = LoraModel(model, configs[0], "a")
    for name, config in zip(("b", "c"), configs[1:], strict=True):
        model.add_adapter(name, config)
    model.set_adapter(list(RANKS))
    layer = model.model[0]
    for name in RANKS:
        nn.init.normal_(layer.factors(name)[1], std=0.1)
    if "hooked" in kind:  # as accelerate's hooks
        layer.base_layer.forward = functools.partial(type(layer.base_layer).forward, layer.base_layer)
    return model.train()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, TOKENS, K, generator=generator).bfloat16().requires_grad_()
    return x, torch.randn(BATCH, TOKENS, N, generator=generator).bfloat16()


def leaves_of(layer: LoRALinear, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(factor for name in RANKS for factor in layer.factors(name))]


def step(model: LoraModel, kind: str, autocast=False) -> tuple[list[torch.Tensor], OnStub]:
    """[y and the gradients] of a step, and what was called."""
    x, grad = data()
    options = {"adapter_names": ADAPTER_OF_ROW} if "rows" in kind else {}
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    torch.manual_seed(2)
    with OnStub() as called:
        with context:
            y = model(x, **options)
        found = torch.autograd.grad(y, leaves_of(model.model[0], x), grad)
    return [y, *found], called


@pytest.mark.parametrize("autocast", [False, True])
@kinds
def test_nothing_of_the_size_of_activations_is_in_fp32(kind, autocast):
    """Copies of x, y or grad take three times their memory traffic, and fp32 products a tenth of bf16's speed."""
    _, called = step(adapted(kind), kind, autocast)
    assert called.in_fp32  # t
    assert not [each for each in called.in_fp32 if each[1] >= ROWS * min(N, K)]


def exact(model, kind, change=lambda tensor: tensor) -> list[torch.Tensor]:
    """What a step computes, in fp64, all operands having gone through ``change``."""
    layer, (x, grad) = model.model[0], data()
    torch.manual_seed(2)
    masks = [nn.functional.dropout(torch.ones_like(x), p) if p else torch.ones_like(x) for p in KINDS[kind]]
    if "rows" in kind:
        masks = [torch.tensor([[[own == name]] for own in ADAPTER_OF_ROW]) for name in RANKS]
    operands = (*leaves_of(layer, x), layer.base_weight(torch.float32), layer.bias)
    x, *factors, weight, bias = (change(each.detach().double()).requires_grad_() for each in operands)
    y = x @ weight.T + bias
    for name, mask, a, b in zip(RANKS, masks, factors[::2], factors[1::2], strict=True):
        y = y + layer.adapters[name].scaling * (x * mask.double()) @ a.T @ b.T
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], change(grad.double()))]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rows with dropout"])
def test_a_step_is_right(kind):
    """Ranks side by side that are mixed up, or another adapter's scaling, train something else."""
    model = adapted(kind)
    ours, _ = step(model, kind)
    u = UNIT_ROUNDOFF[torch.bfloat16]
    for i, (our, value, large) in enumerate(zip(ours, exact(model, kind), exact(model, kind, torch.abs), strict=True)):
        # W, and the products with the factors, are rounded each, and so is each of the sums of three gradients of x.
        roundings = 5.1 * u * (i < 2)
        assert_within(our, value, product_tolerance(large, value, 3 * (ROWS + K + N), our.dtype, roundings + 2.0**-13))


@pytest.mark.parametrize("count", [1, 2])
def test_launches_of_a_hooked_layer(count):
    """t, what it adds, and the sum: each launch more costs the host 2 to 5 us in every layer that accelerate moves."""
    model = adapted("hooked")
    model.set_adapter(["b", "c"][:count])
    x, _ = data()
    with OnStub() as called, torch.no_grad():
        model.model[0].base_layer(x)
        of_base, called.launches = len(called.launches), []
        model(x)
    joins = 4 * (count - 1)  # each B is scaled, and the factors are put side by side
    assert len(called.launches) - of_base - joins <= 3, called.launches


def test_an_embedding_adds_in_16_bits():
    """The rows of a long text in fp32, twice, would be the largest tensors of a step."""
    model = nn.Sequential(nn.Embedding(50, K)).bfloat16()
    layer = LoraModel(model, LoraConfig(rank=8, target_modules=["0"])).model[0]
    nn.init.normal_(layer.factors()[0])
    ids = torch.arange(ROWS) % 50
    with OnStub() as called:
        y = layer(ids)
        y.sum().backward()
    assert not [each for each in called.in_fp32 if each[1] >= ROWS * K]
    a, b = (factor.detach().double() for factor in layer.factors())
    base, low = layer.base_weight(torch.float32)[ids].double(), layer.adapter.scaling * a.T[ids]
    value, large = base + low @ b.T, base.abs() + low.abs() @ b.T.abs()
    # What LoRA adds is rounded, and then the sum.
    u = UNIT_ROUNDOFF[torch.bfloat16]
    assert_within(y, value, product_tolerance(large, value, 3 * 8, torch.bfloat16, u + 2.0**-13))
