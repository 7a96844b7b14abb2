"""What a training step keeps in memory from its forward to its backward."""

import pytest
import torch
from conftest_models import IDS, llama
from torch import nn

from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.layers import LoRALinear

kinds = pytest.mark.parametrize(
    ("model_type", "config_type"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)], ids=["LoRA", "QLoRA"]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RANK = 4


class Block(nn.Module):
    """Linear layers as a transformer's: three that share their input, one more, and two with an activation between."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.o(self.q(x) + self.k(x) + self.v(x))
        return self.down(torch.relu(self.up(x)))


def storages(tensors) -> dict[int, torch.UntypedStorage]:
    """The memory of tensors, each piece once, by its address."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage for storage in found}


def saved_by(model: nn.Module, step) -> list[torch.Tensor]:
    """What ``step`` saves for its backward, without the model's own weights."""
    own = storages(p for p in model.parameters() if not isinstance(p, QuantizedTensor))
    own |= storages(part for p in model.parameters() if isinstance(p, QuantizedTensor) for part in p.parts())
    own |= storages(model.buffers())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        step()
    return [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]


def bytes_of(tensors) -> int:
    """Bytes of memory that the tensors hold, shared memory once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


def watched(model: nn.Module, step) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """The inputs and the outputs of all LoRALinear in one more ``step``, and the bytes of all their t."""
    inputs, outputs, of_t = [], [], 0

    def note(layer, arguments, output):
        nonlocal of_t
        inputs.append(arguments[0])
        outputs.append(output)
        of_t += 4 * layer.adapter.rank * (output.numel() // output.shape[-1])  # t is fp32 on a CPU

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, LoRALinear)]
    step()
    for hook in hooks:
        hook.remove()
    return inputs, outputs, of_t


def block(model_type, config_type, dtype, **options):
    torch.manual_seed(0)
    return model_type(Block().to(dtype), config_type(rank=RANK, **options)).train()


@kinds
@dtypes
def test_a_step_saves_no_more_than_x_t_and_the_output_of_each_layer(model_type, config_type, dtype):
    """What is kept from layer to layer decides which batch fits: a copy of x in each layer would halve it."""
    model = block(model_type, config_type, dtype)
    x = torch.randn(2, 16, 64, dtype=dtype)

    def step():
        model(x).float().square().mean()

    inputs, outputs, of_t = watched(model, step)
    assert len(inputs) == 6
    saved = bytes_of(saved_by(model, step))
    # x is the input of three layers, and counts once. The last output is widened for the loss.
    assert saved <= bytes_of(inputs) + of_t + bytes_of(outputs) + 4 * outputs[-1].numel()


@kinds
@dtypes
def test_layers_that_share_x_save_it_once(model_type, config_type, dtype):
    """q, k and v of every attention read the same x."""
    model = block(model_type, config_type, dtype)
    x = torch.randn(2, 16, 64, dtype=dtype, requires_grad=True)
    layers = model.model
    saved = saved_by(model, lambda: layers.q(x) + layers.k(x) + layers.v(x))
    assert bytes_of(saved) == x.nbytes + 3 * 4 * 32 * RANK
    assert {tensor.dtype for tensor in saved if tensor.numel() == x.numel()} == {dtype}


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_fp32_copy_of_x_is_saved(model_type, config_type, dropout):
    """With fp32 adapters on a 16-bit model such a copy would take twice the memory of x, in every layer."""
    model = block(model_type, config_type, torch.bfloat16, lora_dropout=dropout)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    saved = saved_by(model, lambda: model(x))
    assert any(tensor.dtype == torch.bfloat16 for tensor in saved)
    wide = [tuple(tensor.shape) for tensor in saved if tensor.dtype == torch.float32 and tensor.shape[-1] != RANK]
    assert not wide


@kinds
@dtypes
def test_a_step_of_a_llama_adds_only_x_and_t_to_what_its_base_saves(model_type, config_type, dtype):
    """Of a whole model too: attention, norms and the loss save what they save without adapters."""

    def step():
        embedded = model.get_input_embeddings()(IDS).requires_grad_()
        model(inputs_embeds=embedded, labels=IDS)

    model = llama().to(dtype).train().requires_grad_(False)
    of_base = bytes_of(saved_by(model, step))
    model = model_type(model, config_type(rank=RANK))
    inputs, _, of_t = watched(model, step)
    assert len(inputs) == 14
    assert of_base < bytes_of(saved_by(model, step)) <= of_base + bytes_of(inputs) + of_t


@kinds
@dtypes
def test_rows_of_several_adapters_save_x_once(model_type, config_type, dtype):
    """Sorting rows by adapter makes a copy of x in each layer, which must not be what is kept."""
    model = block(model_type, config_type, dtype)
    model.add_adapter("other", LoraConfig(rank=RANK))
    model.set_adapter(["default", "other"])
    layers, x = model.model, torch.randn(4, 16, 64, dtype=dtype, requires_grad=True)

    def step():
        with model.adapters_by_row(["other", "default"] * 2):
            return layers.q(x) + layers.k(x) + layers.v(x)

    assert bytes_of(saved_by(model, step)) == x.nbytes + 3 * 4 * 64 * RANK
