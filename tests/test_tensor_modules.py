"""``quantize_`` and ``dequantize_``: what they store, what they leave alone, and what an error leaves behind."""

import copy

import pytest
import torch
from cases import assert_within, product_tolerance
from torch import nn

import lowbit
from lowbit import QuantizedTensor, WeightSpec


class Model(nn.Module):
    """Linear layers, one of them shared; attention; a stack of experts; what must stay dense; a tied head."""

    class ToyExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 32, 64))
            self.bias = nn.Parameter(torch.zeros(2, 32))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 64)
        self.first = nn.Linear(64, 64)
        self.block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 0))
        self.again = self.first
        self.attention = nn.MultiheadAttention(64, 4)
        self.experts = self.ToyExperts()
        self.convolution = nn.Conv1d(64, 8, 3)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.output = nn.Linear(64, 5)

    def get_output_embeddings(self):
        return self.output


STORED = ["first.weight", "block.0.weight", "attention.in_proj_weight", "attention.out_proj.weight", "experts.up"]


def stored(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]


def state(model: nn.Module) -> dict:
    """The state that a failed call has to leave alone."""
    return {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state(model)
    assert {n: v[:2] for n, v in after.items()} == {n: v[:2] for n, v in before.items()}
    assert all(torch.equal(after[n][2].nan_to_num(7.0), before[n][2].nan_to_num(7.0)) for n in before)


@pytest.mark.parametrize("spec", [WeightSpec(), WeightSpec("fp4", 32, False), WeightSpec("int8")], ids=str)
def test_what_is_stored(spec):
    """A model would not shrink; or an embedding, a tied head, a norm or a convolution would be quantized."""
    model = Model()
    dense = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    assert lowbit.quantize_(model, spec) is model
    assert stored(model) == STORED
    assert [type(module) for module in model.modules()] == classes
    assert model.again.weight is model.first.weight and model.head.weight is model.embedding.weight
    kinds = {"fp4:32": ("fp4", 32, False), "int8": ("int8", 64, False)}.get(str(spec), ("nf4", 64, True))
    options = dict(zip(("format", "block_size", "double_quant"), kinds, strict=True))
    for name, parameter in model.named_parameters():
        before = dense.get_parameter(name)
        if name not in STORED:
            assert torch.equal(parameter, before) and parameter.requires_grad
            continue
        assert parameter.spec == spec and not parameter.requires_grad and isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter.dequantize(), lowbit.quantize(before.detach(), **options).dequantize())


def test_scale_search():
    """``scale="search"`` would have no effect on a model, or be refused after half of it was converted."""
    model, searched = lowbit.quantize_(Model()), lowbit.quantize_(Model(), scale="search")
    dense = Model()
    for name in STORED:
        errors = [(m.get_parameter(name).dequantize() - dense.get_parameter(name)).norm() for m in (searched, model)]
        assert errors[0] < errors[1], name


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["first"], ["first.weight"]),
        (["0"], ["block.0.weight"]),
        (["attention"], ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (["attention.out_proj", "experts"], ["attention.out_proj.weight", "experts.up"]),
        (["again"], ["first.weight"]),
    ],
)
def test_skip(skip, kept):
    """A layer that has to stay exact, under either of its names, would be quantized."""
    assert stored(lowbit.quantize_(Model(), skip=skip)) == [name for name in STORED if name not in kept]


def test_twice():
    """A second call would quantize what is quantized, or decode it for another spec."""
    model = lowbit.quantize_(Model(), skip=["first"])
    packed = model.block[0].weight.packed
    lowbit.quantize_(model, WeightSpec("int8"))
    assert model.block[0].weight.packed is packed and str(model.first.weight.spec) == "int8"


def test_a_shared_weight_is_skipped_everywhere():
    """A weight that stays dense in one layer would be quantized in another, and no longer be shared."""
    model = Model()
    model.block[0].weight = model.embedding.weight = nn.Parameter(torch.randn(64, 64))
    lowbit.quantize_(model)
    assert model.block[0].weight is model.embedding.weight and not isinstance(model.embedding.weight, QuantizedTensor)


def _with_nan(model):
    with torch.no_grad():
        model.experts.up[1, 2, 3] = torch.nan


def _in_float64(model):
    model.experts.double()


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (_with_nan, {}, ValueError, "experts.up: weight: expected finite values"),
        (_in_float64, {}, TypeError, "experts.up: weight: expected float32, float16 or bfloat16, got torch.float64"),
        (None, {"skip": ["no_such_layer"]}, ValueError, "skip: expected names of modules, got 'no_such_layer'"),
        (None, {"skip": "first"}, TypeError, "skip: expected a list of names, got the string 'first'"),
        (None, {"spec": "nf4"}, TypeError, "spec: expected a lowbit.WeightSpec, got str"),
        (None, {"scale": "best"}, ValueError, "scale: expected 'absmax' or 'search', got 'best'"),
        (None, {"scale": "search", "spec": WeightSpec("int8")}, ValueError, "whose scales are not searched"),
    ],
)
def test_an_error_leaves_the_model(spoil, options, error, message):
    """A model would be half quantized after an error."""
    model = Model()
    if spoil:
        spoil(model)
    before = state(model)
    with pytest.raises(error, match=message):
        lowbit.quantize_(model, **options)
    assert_unchanged(model, before)


def test_not_a_model():
    """A list of layers would seem to have been converted."""
    for function in (lowbit.quantize_, lowbit.dequantize_):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got list"):
            function([nn.Linear(2, 2)])


def test_dequantize():
    """``dequantize_`` would leave quantized weights behind, untie shared ones, or change what the model computes."""
    model = lowbit.quantize_(Model())
    x = torch.randn(3, 64)
    expected, values = model.first(x), {name: model.get_parameter(name).dequantize() for name in STORED}
    assert lowbit.dequantize_(model) is model
    assert stored(model) == [] and model.again.weight is model.first.weight
    for name, value in values.items():
        parameter = model.get_parameter(name)
        assert type(parameter) is nn.Parameter and not parameter.requires_grad and torch.equal(parameter, value)
    weight, bias = model.first.weight.double(), model.first.bias.double()
    exact, magnitude = (f(x.double()) @ f(weight).T + f(bias) for f in (torch.clone, torch.abs))
    for y in (model.first(x), expected):
        assert_within(y.detach(), exact.detach(), product_tolerance(magnitude, exact, 64, torch.float32).detach())


def test_dequantize_that_fails(monkeypatch):
    """Out of memory half way, a model would be half dense."""
    model = lowbit.quantize_(Model())
    before, calls, dequantize = dict(model.named_parameters()), [], QuantizedTensor.dequantize

    def fails_at_the_third(q, *arguments):
        calls.append(q)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return dequantize(q, *arguments)

    monkeypatch.setattr(QuantizedTensor, "dequantize", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        lowbit.dequantize_(model)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_the_factors_of_lora_stay_dense():
    """4-bit factors would end the training of an adapter that is on the model already."""
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].lora_A = nn.ModuleDict({"default": nn.Linear(64, 4, bias=False)})
    lowbit.quantize_(model)
    assert isinstance(model[0].weight, lowbit.QuantizedTensor)
    assert type(model[0].lora_A["default"].weight) is nn.Parameter
