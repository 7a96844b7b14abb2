"""A quantized weight is copied, saved, loaded and moved like any parameter."""

import copy
import ctypes
import io
import pickle

import pytest
import torch
from cases import DTYPES
from torch import nn

import lowbit
from lowbit import QuantizedTensor, WeightSpec

SPECS = (WeightSpec(), WeightSpec("fp4", 32, False), WeightSpec("int8"))


class Tied(nn.Module):
    """Two layers, of which one is used twice, and a LoRA."""

    def __init__(self, spec=WeightSpec()):  # noqa: B008 (frozen)
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(96, 40)
        self.second = nn.Linear(40, 96)  # 40: rows cut blocks
        self.again = nn.Linear(96, 40)
        self.again.weight = self.first.weight
        self.lora_a = nn.Parameter(torch.randn(2, 96))
        lowbit.quantize_(self, spec)

    def forward(self, x):
        return self.again(self.second(torch.tanh(self.first(x)))) + (x @ self.lora_a.T).sum(-1, keepdim=True)


X = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Assert equal outputs, and a weight that is still quantized and shared, in memory of its own."""
    assert torch.equal(ours(X), theirs(X))
    assert isinstance(ours.first.weight, QuantizedTensor) and isinstance(ours.first.weight, nn.Parameter)
    assert ours.again.weight is ours.first.weight
    assert not ours.first.weight.requires_grad
    assert ours.first.weight.packed.data_ptr() != theirs.first.weight.packed.data_ptr()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_deepcopy(spec):
    """A copied model would share bytes with the first, or untie its weights."""
    model = Tied(spec)
    assert_same_model(copy.deepcopy(model), model)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pickle(spec):
    """A quantized model could not be sent to a worker of a data loader or a pool."""
    model = Tied(spec)
    model(X)  # what a call leaves behind must not be pickled
    assert_same_model(pickle.loads(pickle.dumps(model)), model)


def _outputs(model: nn.Module, queue) -> None:
    queue.put(model(X).tolist())


def test_pickle_to_a_spawned_process():
    """A process that imports lowbit only to read the pickle would fail on it."""
    model = Tied()
    with torch.no_grad():
        expected = lowbit.lora_linear(X, model.first.weight, model.lora_a, torch.zeros(40, 2), 1.0)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_outputs, args=(model, queue))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert queue.get() == model(X).tolist()
    assert expected.isfinite().all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_save_and_load(spec):
    """``torch.load`` with weights_only=True, its default, would refuse the file, or untie the weights."""
    model, file = Tied(spec), io.BytesIO()
    torch.save(model.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert state["first.weight"].packed.data_ptr() == state["again.weight"].packed.data_ptr()
    loaded = Tied(spec)
    with torch.no_grad():
        for parameter in loaded.parameters():
            part = parameter.packed if isinstance(parameter, QuantizedTensor) else parameter
            part.zero_()
    assert not torch.equal(loaded(X), model(X))
    loaded.load_state_dict(state)
    assert_same_model(loaded, model)


def test_file_is_as_small_as_the_weight():
    """A file would hold decoded weights, or those shared twice."""
    file = io.BytesIO()
    weight = lowbit.quantize(torch.randn(512, 512))
    torch.save({"a": weight, "b": weight}, file)
    assert weight.nbytes < len(file.getvalue()) < 1.1 * weight.nbytes


def test_assign():
    """``load_state_dict(assign=True)``, which takes the state's tensors, would copy or unfreeze them."""
    model, loaded = Tied(), Tied().to("meta")
    state = model.state_dict()
    loaded.load_state_dict(state, assign=True)
    assert torch.equal(loaded(X), model(X))
    assert loaded.first.weight.packed.data_ptr() == state["first.weight"].packed.data_ptr()
    assert isinstance(loaded.first.weight, QuantizedTensor) and not loaded.first.weight.requires_grad


def test_dense_state_into_a_quantized_model():
    """A dense checkpoint would overwrite codes with noise or be taken for loaded; or decoded weights not come back."""
    model = Tied()
    before = model(X)
    state = lowbit.dequantize_(copy.deepcopy(model)).state_dict()
    model.load_state_dict(state)  # as accelerate's load_state does under FSDP2
    assert torch.equal(model(X), before)
    state["first.weight"][0, 0] += 1
    with pytest.raises(RuntimeError, match=r"(?s)first.weight.*Load a dense state dict before.*lowbit.quantize_"):
        model.load_state_dict(state)
    assert torch.equal(model(X), before)


def test_quantized_state_into_a_dense_model():
    """A dense model would not load the decoded weights."""
    model = Tied()
    dense = lowbit.dequantize_(Tied())
    with torch.no_grad():
        dense.first.weight.zero_()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense.first.weight, model.first.weight.dequantize())


def test_state_of_another_spec():
    """Codes of one format would be decoded by another's codebook."""
    model = Tied(WeightSpec("int8"))
    with pytest.raises(RuntimeError, match=r"(?s)first.weight.*'int8'.*'nf4:64:double_quant'.*WeightSpec.parse"):
        model.load_state_dict(Tied().state_dict())


def test_strict_state_dict():
    """A missing or unknown weight would go unnoticed."""
    model = Tied()
    state = model.state_dict()
    assert list(state) == list(lowbit.dequantize_(Tied()).state_dict())
    del state["second.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*second.weight"):
        model.load_state_dict(state)


def test_damaged_file():
    """A file whose bytes do not fit together would be decoded past the end of its memory."""
    q = lowbit.quantize(torch.randn(8, 64))
    rebuild, arguments = q.__reduce_ex__(2)
    with pytest.raises(ValueError, match="packed: expected 256 elements"):
        rebuild(arguments[0][:4], *arguments[1:])
    with pytest.raises(ValueError, match="absmax: expected 8 elements"):
        rebuild(arguments[0], arguments[1][:4], *arguments[2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dtype(dtype):
    """``model.to(dtype)`` would round the scales, or leave the weight in a dtype that activations are not in."""
    model = Tied()
    before = model.first.weight.parts()
    model.to(dtype)
    weight = model.first.weight
    assert weight.dtype == dtype and model(X.to(dtype)).dtype == dtype
    assert torch.equal(weight.dequantize(), lowbit.dequantize(Tied().first.weight, dtype))
    for ours, part in zip(weight.parts(), before, strict=True):
        assert ours.dtype == part.dtype and torch.equal(ours, part)


def test_to_float64():
    """``model.double()`` would make a weight of two minds, of dense memory and quantized parts."""
    model = Tied()
    with pytest.raises(RuntimeError, match=r"float64.*lowbit.dequantize_"):
        model.double()
    assert torch.equal(Tied()(X), model(X))
    assert model.first.weight.double().dtype == torch.float64


def test_meta_and_back():
    """A model that is built on meta and materialised by to_empty, or by FSDP, would have other weights."""
    model = Tied()
    empty = copy.deepcopy(model).to("meta")
    assert {part.device.type for part in empty.first.weight.parts()} == {"meta"}
    assert empty(X.to("meta")).shape == (3, 40)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(X), model(X))
    assert empty.again.weight is empty.first.weight


def test_to_same_device_is_the_same_tensor():
    """Every .to() in a training loop would copy the base."""
    q = Tied().first.weight
    assert q.to("cpu") is q and q.float() is q and q.contiguous() is q


def test_parameters():
    """Optimizers, DDP and parameter counts would not find the weight in named_parameters, or would train it."""
    model = Tied()
    names = dict(model.named_parameters())
    assert list(names) == ["lora_a", "first.weight", "first.bias", "second.weight", "second.bias", "again.bias"]
    assert names["first.weight"].numel() == 40 * 96
    assert not names["first.weight"].requires_grad and names["first.weight"].is_leaf


def test_requires_grad():
    """A weight that seems trainable would be handed to an optimizer, and never change."""
    model = Tied().requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"frozen.*LoRA.*lowbit.dequantize_"):
        model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        model.first.weight.requires_grad = True
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        nn.Parameter(lowbit.quantize(torch.ones(2, 64)))


def test_data():
    """``p.data = other``, which old training code writes, would change shape and dtype but not the bytes."""
    q = lowbit.quantize(torch.randn(4, 64))
    other = lowbit.quantize(torch.randn(6, 32), format="int8").half()
    q.data = other
    assert q.shape == (6, 32) and q.dtype == torch.float16
    assert torch.equal(q.dequantize(), other.dequantize())


def test_safetensors(tmp_path):
    """safetensors would write memory that is not there as the weight."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, file = Tied(), tmp_path / "model.safetensors"
    for save in (lambda: safetensors.save_file(model.state_dict(), file), lambda: safetensors.save_model(model, file)):
        with pytest.raises((RuntimeError, ctypes.ArgumentError), match=r"torch.save.*lowbit.files"):
            save()
    assert not file.exists()


def test_shared_memory():
    """``model.share_memory()``, for processes that serve one model, would copy or lose the bytes."""
    model = Tied()
    expected = model(X)
    model.share_memory()
    assert all(part.is_shared() for part in model.first.weight.parts())
    assert model.first.weight.is_shared()
    assert torch.equal(model(X), expected)
