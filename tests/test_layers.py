"""lowbit_lora/layers.py: what a single layer computes, how it moves, is copied, saved and merged."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit_lora import LoRALinear, QLoRALinear, QuantizationType, QuantizedLinear

STORED = [{}, {"double_quant": False}, {"quantization": "int8"}]


def random_lora(layer, seed=1):
    """B is zero at first, which would hide a LoRA that computes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return layer


def make(in_features=72, out_features=40, *, kind=QLoRALinear, dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    return random_lora(kind(linear, **options) if kind is LoRALinear else kind.from_linear(linear, **options))


def dense_result(layer, x):
    """The layer's definition in plain fp32 torch."""
    weight = layer.base_weight(torch.float32)
    bias = None if layer.bias is None else layer.bias.float()
    return (
        F.linear(x.float(), weight, bias)
        + layer.scaling * (x.float() @ layer.lora_A.float().T) @ layer.lora_B.float().T
    )


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([LoRALinear, QLoRALinear]),
    in_features=st.integers(1, 130),
    out_features=st.integers(1, 70),
    rank=st.integers(1, 9),
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    bias=st.booleans(),
    use_rslora=st.booleans(),
    quantization=st.sampled_from(QuantizationType),
)
def test_forward_is_the_definition(kind, in_features, out_features, rank, rows, bias, use_rslora, quantization):
    """x W^T + scaling x A^T B^T + b, at any shape: the whole point of the layer."""
    stored = {"quantization": quantization} if kind is QLoRALinear else {}
    layer = make(in_features, out_features, kind=kind, bias=bias, rank=rank, use_rslora=use_rslora, **stored)
    assert layer.scaling == (16 / math.sqrt(rank) if use_rslora else 16 / rank)
    x = torch.randn(*rows, in_features)
    torch.testing.assert_close(layer(x), dense_result(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "stored"), [(LoRALinear, {}), (QLoRALinear, {}), (QLoRALinear, {"quantization": "int8"})]
)
def test_gradients_are_the_dense_layers(kind, stored):
    """Wrong gradients train, only worse; so each is compared with autograd through plain torch."""
    layer = make(kind=kind, **stored)
    x = torch.randn(6, 72, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    weight = torch.randn(6, 40)
    ours = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    theirs = torch.autograd.grad((dense_result(layer, x) * weight).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()
    assert layer.bias.grad is None  # the base is frozen


def test_a_fresh_layer_is_its_base():
    """Training has to start from the pretrained model, not from noise around it."""
    linear = nn.Linear(72, 40)
    layer = QLoRALinear.from_linear(linear)
    x = torch.randn(5, 72)
    assert torch.equal(layer(x), QuantizedLinear.from_linear(linear)(x))
    assert layer.lora_A.abs().max() > 0  # else A and B both stay zero for ever
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(72) + 1e-6
    assert layer.lora_A.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_sixteen_bit_layer_keeps_lora_in_fp32(kind, dtype):
    """LoRA updates of 1e-4 vanish in bf16: the adapter trains in fp32 and the output is still x's dtype."""
    layer = make(kind=kind, dtype=dtype)
    x = torch.randn(5, 72, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), dense_result(layer, x), rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "stored"), [(LoRALinear, {}), (QLoRALinear, {}), (QLoRALinear, {"quantization": "int8"})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_same_layer(kind, stored, dtype):
    """The merged layer is what gets deployed: it has to predict what was trained."""
    layer = make(kind=kind, dtype=dtype, **stored)
    merged = layer.merge()
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == dtype
    expected = layer.base_weight(torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
    assert torch.equal(merged.weight, expected.detach().to(dtype))
    assert torch.equal(merged.bias, layer.bias)


def test_dropout_is_for_training_only():
    """Predictions must not be random; training with dropout must be."""
    layer = make(lora_dropout=0.5)
    x = torch.randn(5, 72)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), dense_result(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", STORED)
def test_casts_leave_the_stored_weight_alone(stored):
    """model.half() would round the scales, and with them every weight, for good."""
    layer = make(**stored)
    before = [None if part is None else part.clone() for part in layer.quantized_weight.parts()]
    for cast in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.float(),
    ):
        cast(layer)
        for old, new in zip(before, layer.quantized_weight.parts(), strict=True):
            assert old is None or (old.dtype == new.dtype and torch.equal(old, new))
    assert layer.half().lora_A.dtype == torch.float16  # the rest does follow
    assert layer.to("meta").weight_absmax.device.type == "meta"


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole_and_apart(copied, stored):
    """Checkpoint libraries deepcopy and pickle; a copy must compute the same and share nothing."""
    layer = make(**stored)
    x = torch.randn(5, 72)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    before = layer(x)
    with torch.no_grad():
        twin.lora_B.zero_()
        twin.weight_packed.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("stored", STORED)
def test_the_weight_object_is_kept_but_never_stale(stored):
    """It is made once, for speed; whatever puts other tensors in the buffers must be seen by the next call."""
    layer, other = make(**stored), QuantizedLinear.from_linear(nn.Linear(72, 40), **stored)
    assert layer.quantized_weight is layer.quantized_weight

    x = torch.randn(5, 72)
    before = layer(x)
    buffers = dict(other.named_buffers())
    swapped = torch.func.functional_call(layer, buffers, x)
    assert not torch.equal(swapped, before)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight_absmax.copy_(other.weight_absmax)  # in place
    assert torch.equal(layer.base_weight(), layer.quantized_weight.dequantize())
    for name, buffer in buffers.items():
        setattr(layer, name, buffer)
    assert torch.equal(layer(x), swapped)
    assert torch.equal(layer.base_weight(), other.base_weight())
    layer.load_state_dict(make(**stored).state_dict())
    assert torch.equal(layer(x), before)
    layer.to("meta")
    assert layer.quantized_weight.device.type == "meta"
    layer.to_empty(device="cpu").load_state_dict(make(**stored).state_dict())
    assert torch.equal(layer(x), before)

    used, unused = make(**stored), make(**stored)
    used(x)
    assert len(pickle.dumps(used)) == len(pickle.dumps(unused))


def test_state_dict_has_bitsandbytes_names_and_loads_strictly():
    """Other tools find the 4-bit weight by these names; a round trip restores every bit."""
    layer = make()
    state = layer.state_dict()
    assert {
        "weight",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "bias",
        "lora_A",
        "lora_B",
    } <= set(state)
    other = QLoRALinear(72, 40)
    other.load_state_dict(state)
    x = torch.randn(5, 72)
    assert torch.equal(other(x), layer(x))
    state["weight"].zero_()  # the layer must not share the state dict's memory
    assert torch.equal(other(x), make()(x))


def test_int8_state_dict_is_that_of_linear8bitlt():
    """Files of bitsandbytes' 8-bit layer load, whatever format the layer had; its own come back bit for bit."""
    layer = make(quantization="int8", dtype=torch.bfloat16)
    state = layer.state_dict()
    assert set(state) == {"weight", "SCB", "weight_format", "bias", "lora_A", "lora_B"}
    assert state["weight"].dtype == torch.int8 and state["weight"].shape == (40, 72)
    other = QLoRALinear(72, 40, dtype=torch.bfloat16)
    other.load_state_dict(state)
    x = torch.randn(5, 72)
    assert torch.equal(other(x), layer(x))
    assert other.weight_dtype == torch.bfloat16  # its own: the file does not say
    state["weight"].zero_()  # the layer must not share the state dict's memory
    state["SCB"].zero_()
    assert torch.equal(other(x), make(quantization="int8", dtype=torch.bfloat16)(x))
    with pytest.raises(RuntimeError, match="missing key 'SCB'"):
        other.load_state_dict({key: value for key, value in state.items() if key != "SCB"})


def test_loads_what_linear8bitlt_saved():
    """An 8-bit checkpoint must hold the same weights here."""
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear8bitLt(72, 40, has_fp16_weights=False).to("cpu")
    layer = QuantizedLinear.from_linear(nn.Linear(72, 40), quantization="int8")
    layer.load_state_dict(theirs.state_dict())
    decoded = bnb.functional.int8_vectorwise_dequant(theirs.weight.data, theirs.weight.SCB)
    assert torch.equal(layer.base_weight(), decoded)
    assert torch.equal(layer.bias, theirs.bias)


def test_a_wrong_state_dict_is_refused():
    """Loading the wrong file must fail by name, not compute nonsense."""
    layer, state = make(), make().state_dict()
    with pytest.raises(RuntimeError, match="weight.*expected shape"):
        layer.load_state_dict(make(40, 72).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        layer.load_state_dict({key: value for key, value in state.items() if not key.startswith("weight")})
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        layer.load_state_dict(state | {"extra": torch.zeros(1)})


@pytest.mark.parametrize("stored", STORED)
def test_compiles_without_a_graph_break(stored):
    """torch.compile(fullgraph=True) forward and backward gives the eager results."""
    layer = make(**stored)
    x = torch.randn(6, 72, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    eager = layer(x)
    eager_gradients = torch.autograd.grad(eager.square().sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled.square().sum(), inputs), eager_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_changes_nothing():
    """Recomputing the forward, dropout mask included, must give the gradients of storing it."""
    layer = make(lora_dropout=0.3)
    x = torch.randn(6, 72)
    gradients = []
    for run in (layer, lambda value: checkpoint(layer, value, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(run(x).square().sum(), (layer.lora_A, layer.lora_B)))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_autocast(kind):
    """Mixed-precision training: bf16 out, fp32 gradients for LoRA."""
    layer = make(kind=kind)
    x = torch.randn(6, 72)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense_result(layer, x), rtol=0.03, atol=0.03)
    y.float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
    assert layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("stored", STORED)
def test_on_the_meta_device(stored):
    """Shapes without memory: how large models are planned, and loaded piece by piece."""
    layer = QLoRALinear(72, 40, device="meta", **stored)
    x = torch.empty(2, 5, 72, device="meta", requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 5, 40) and y.device.type == "meta"
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert QuantizedLinear(layer.quantized_weight)(x).shape == (2, 5, 40)
    dtypes = {key: value.dtype for key, value in make(**stored).state_dict().items()}
    assert {key: value.dtype for key, value in layer.state_dict().items()} == dtypes


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: QLoRALinear(8, 8, rank=0), ValueError, ("rank", "0")),
        (lambda: QLoRALinear(8, 8, lora_dropout=1.0), ValueError, ("lora_dropout", "1.0")),
        (lambda: QLoRALinear(0, 8), ValueError, ("in_features", "0")),
        (lambda: QLoRALinear(8, 8, block_size=100), ValueError, ("block_size", "100")),
        (lambda: QLoRALinear(8, 8, quantization="nf5"), ValueError, ("quantization", "nf5")),
        (lambda: QLoRALinear(8, 8, dtype=torch.float64), TypeError, ("float64",)),
        (lambda: QLoRALinear.from_linear(nn.Conv1d(2, 2, 1)), TypeError, ("linear", "Conv1d")),
        (lambda: QuantizedLinear.from_linear(nn.Embedding(2, 2)), TypeError, ("linear", "Embedding")),
        (lambda: LoRALinear(nn.Linear(2, 2), rank=-1), ValueError, ("rank", "-1")),
        (lambda: make()(torch.zeros(2, 71)), ValueError, ("72", "71")),
        (lambda: make(kind=LoRALinear)(torch.zeros(2, 71)), ValueError, ("in_features", "72", "71")),
        (lambda: make()(torch.zeros(2, 72, dtype=torch.int64)), TypeError, ("int64",)),
    ],
)
def test_bad_input_is_named(call, error, names):
    """Each of these would otherwise fail deep inside, or compute something else."""
    with pytest.raises(error) as raised:
        call()
    for name in names:
        assert name in str(raised.value)


def test_nan_in_a_weight():
    """A NaN would poison the scale of its whole block."""
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="finite"):
        QLoRALinear.from_linear(linear)


def test_hugging_face_may_ask_for_the_weights_dtype():
    """T5 and others look at layer.weight.dtype in their forward."""
    layer = make(dtype=torch.bfloat16)
    assert isinstance(layer.weight, lowbit.QuantizedTensor)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device == torch.device("cpu")
