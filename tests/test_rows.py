"""lowbit/ops/rows.py, and layers that use it: rows of one batch that are of several adapters."""

import pytest
import torch
from cases import UNIT_ROUNDOFF, assert_within, product_tolerance
from torch import nn

import lowbit
from lowbit.ops.rows import Groups, add_lora_by_row
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

kinds = pytest.mark.parametrize(
    ("model_type", "config_type"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)], ids=["LoRA", "QLoRA"]
)
RANKS = {"a": 3, "b": 5, "c": 5}
ROWS = ["c", "a", "__base__", "b", "a", "c"]


def three(model_type=LoraModel, config_type=LoraConfig, dtype=torch.float32):
    """One layer with three adapters, which train, of two ranks and several scalings."""
    torch.manual_seed(0)
    model = model_type(nn.Sequential(nn.Linear(72, 40)).to(dtype), config_type(rank=3, target_modules=["0"]), "a")
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(rank=RANKS[name], lora_alpha=len(RANKS) + ord(name), target_modules=["0"]))
    with torch.no_grad():
        for name in RANKS:
            model.model[0].factors(name)[1].normal_(std=0.1)
    model.set_adapter(list(RANKS))
    return model


def batch(dtype=torch.float32, tokens=4):
    x = torch.randn(len(ROWS), tokens, 72, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def in_double(layer, x, grad, name):
    """``(y, its base's part, dx, dA, dB)`` of one adapter alone, in fp64; then the same with absolute values.

    The base's bias counts to its part. ``name`` "__base__" has no factors.
    """
    for change in (lambda tensor: tensor, torch.abs):
        weight = change(layer.base_weight(torch.float32).double())
        factors = [] if name == "__base__" else layer.factors(name)
        leaves = [change(leaf.detach().double()).requires_grad_() for leaf in (x, *factors)]
        base = nn.functional.linear(leaves[0], weight, change(layer.bias.detach().double()))
        y = base
        if name != "__base__":
            y = y + layer.adapters[name].scaling * leaves[0] @ leaves[1].T @ leaves[2].T
        yield y.detach(), base.detach(), *torch.autograd.grad(y, leaves, change(grad.double()))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_adapter_computes_and_trains_as_alone(model_type, config_type, dtype):
    """Of eight adapters that are trained in one pass, each must become what it would have become alone.

    Both products are within their bound, and in bf16 the base's is rounded before the sum is.
    """
    model = three(model_type, config_type, dtype)
    layer, x = model.model[0], batch(dtype)
    grad = torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    with lowbit.use_backend("reference"):
        y = model(x, adapter_names=ROWS)
        y.backward(grad)
    u = UNIT_ROUNDOFF[dtype]
    for name in {*ROWS}:
        of = [row for row, other in enumerate(ROWS) if other == name]
        exact, large = in_double(layer, x[of], grad[of], name)
        bounds = [product_tolerance(m, e, 72 + 40 + 24, dtype) for e, m in zip(exact, large, strict=True)]
        assert_within(y[of], exact[0], bounds[0] + u * exact[1].abs())
        # The gradients of x through the base and through the factors are rounded each, and then their sum.
        assert_within(x.grad[of], exact[2], bounds[2] + 2 * u * large[2])
        for parameter, e, m in zip(layer.factors(name) if name in RANKS else [], exact[3:], large[3:], strict=False):
            assert_within(parameter.grad, e, product_tolerance(m, e, 72 + 40 + 24, torch.float32))


@kinds
def test_what_is_not_finite_stays_in_its_adapter(model_type, config_type):
    """One adapter that diverges must not take those that are served or trained beside it with it."""
    model = three(model_type, config_type)
    x = batch()

    def results():
        y = model(x, adapter_names=ROWS)
        factors = [p for name in ("a", "c") for p in model.model[0].factors(name)]
        others = [row for row, name in enumerate(ROWS) if name != "b"]
        grad_x, *grads = torch.autograd.grad(y.square()[others].sum(), [x, *factors])
        return [y[others], grad_x[others], *grads]

    before = results()
    with torch.no_grad():
        for factor in model.model[0].factors("b"):
            factor.fill_(float("nan"))
    assert all(torch.equal(*pair) for pair in zip(before, results(), strict=True))


def test_the_order_of_rows_does_not_matter():
    """Rows that come sorted are not sorted again; both ways must agree, with any number of tokens a row."""
    model = three()
    for tokens in (1, 3):
        x = batch(tokens=tokens).detach()
        order = sorted(range(len(ROWS)), key=ROWS.__getitem__)
        expected = model(x, adapter_names=ROWS)[order]
        assert torch.equal(model(x[order], adapter_names=sorted(ROWS)), expected)
        alone = [model(x[row : row + 1], adapter_names=[ROWS[row]]) for row in order]
        torch.testing.assert_close(torch.cat(alone), expected)


def test_frozen_adapters_get_no_gradient():
    """Adapters that are only served beside one that trains."""
    model = three()
    for parameter in model.model[0].factors("a"):
        parameter.requires_grad_(False)
    model(batch(), adapter_names=ROWS).sum().backward()
    grads = {name: [factor.grad is not None for factor in model.model[0].factors(name)] for name in RANKS}
    assert grads == {"a": [False, False], "b": [True, True], "c": [True, True]}


def test_too_few_names_are_told():
    """Rows would be answered by adapters of other rows."""
    with pytest.raises(ValueError, match="expected one for each of the 6 rows of the batch, got 5"):
        three()(batch(), adapter_names=ROWS[:5])


@pytest.mark.interpreted
def test_triton_multiplies_all_rows_at_once():
    """On a GPU the same function takes another way: stacked factors, one kernel for each product."""
    generator = torch.Generator().manual_seed(0)
    counts, order = [1, 2, 1], torch.tensor([1, 0, 3, 2])
    groups = Groups(counts, torch.tensor(counts).cumsum(0, dtype=torch.int32), order, order.argsort())

    def leaves():
        made = [torch.randn(8, 64, generator=generator), *(torch.randn(4, 64, generator=generator) for _ in counts)]
        return [leaf.requires_grad_() for leaf in (*made, *(torch.randn(32, 4, generator=generator) for _ in counts))]

    x, *factors = leaves()
    base = torch.randn(8, 32, generator=generator, requires_grad=True)
    results = []
    for backend in ("reference", "triton"):
        with lowbit.use_backend(backend):
            y = add_lora_by_row(base, x, groups, factors[:3], factors[3:], [1.0, 2.0, 0.5])
            results.append([y, *torch.autograd.grad(y.square().sum(), [base, x, *factors])])
    magnitude = max(result.abs().max() for result in results[0])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(magnitude))
