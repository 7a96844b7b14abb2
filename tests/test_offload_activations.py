"""Checkpointing whose hidden states are on the host: they leave the GPU, come back in time, and change no gradient.

There is no GPU here: tests/conftest_transfer.py takes the CPU's memory for one's, and is strict about the order.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest_models import IDS, LABELS, bert, llama, mlp, randomize
from conftest_transfer import LateTransfer
from torch import nn

from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel, offload_activations
from lowbit_lora.offload_activations import checkpoint

LAYERS = 4


@pytest.fixture
def late_transfer(monkeypatch):
    """The transfer of the test, a LateTransfer, for tensors of any size."""
    monkeypatch.setattr(offload_activations, "_transfer", LateTransfer())
    monkeypatch.setattr(offload_activations, "_latest", None)
    monkeypatch.setattr(offload_activations, "SMALLEST", 0)
    return offload_activations._transfer


def deep_llama():
    """Like conftest_models.llama, with more layers and with dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, attention_dropout=0.3, **sizes))


def t5():
    """T5ForConditionalGeneration: blocks of the decoder share the encoder's output."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": LAYERS, "vocab_size": 50}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes))


def wrapped(make=deep_llama, checkpointing="offload", kind=LoraModel, config=LoraConfig, **options):
    """A model with LoRA that trains."""
    torch.manual_seed(1)
    base = make()
    for module in base.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # as checkpointing does: a cache changes strides, and on some CPUs bits
    model = kind(base, config(rank=4, gradient_checkpointing=checkpointing, lora_dropout=0.4, **options)).train()
    randomize(model)
    return model


def loss_of(model, labels=IDS, **options):
    torch.manual_seed(2)  # of dropout
    return model(input_ids=IDS, labels=labels, **options).loss


def gradients(model, **options):
    """Of one step, by name; and the loss."""
    loss = loss_of(model, **options)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(expected) > 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def inputs_of_blocks(model):
    """The hidden states that go into a Llama's blocks, as weak references, from the next forward on."""
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    return seen


def test_hidden_states_leave_the_gpu(late_transfer):
    """Hidden states would stay in the GPU's memory, which is what checkpointing alone does."""
    for checkpointing, count in ((True, LAYERS), ("offload", 0)):
        model = wrapped(checkpointing=checkpointing)
        seen = inputs_of_blocks(model)
        loss = loss_of(model)
        late_transfer.synchronize()
        gc.collect()
        assert len(seen) == LAYERS and sum(reference() is not None for reference in seen) == count
        loss.backward()
    assert late_transfer.log.count("to host") == late_transfer.log.count("to device") == LAYERS


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (deep_llama, {}),
        (deep_llama, {"attention_mask": torch.ones_like(IDS).tril(3)}),
        (bert, {"labels": LABELS, "attention_mask": torch.ones_like(IDS).tril(3)}),
        (t5, {"attention_mask": torch.ones_like(IDS).tril(3)}),
    ],
    ids=["Llama", "Llama with a mask", "BERT", "T5"],
)
@pytest.mark.parametrize(
    ("kind", "config"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)], ids=["LoRA", "QLoRA"]
)
def test_same_gradients(late_transfer, make, options, kind, config):
    """Dropout would be drawn anew, or a hidden state be read before it has come back: other gradients, no error."""
    expected = gradients(wrapped(make, False, kind, config), **options)
    model = wrapped(make, "offload", kind, config)
    for _ in range(2):
        assert_same(gradients(model, **options), expected)
        model.zero_grad()
    assert "to device" in late_transfer.log


def test_embeddings_that_need_no_gradient(late_transfer):
    """The first block would be left out of the training: nothing that goes into it requires a gradient."""
    found = []
    for checkpointing in (True, "offload"):
        model = wrapped(checkpointing=checkpointing)
        model.get_base_model().disable_input_require_grads()  # of "offload" it is off
        found.append(gradients(model))
    assert_same(found[1], found[0])
    assert any(".layers.0." in name for name in found[1])
    assert late_transfer.log.count("to host") == LAYERS


def test_inputs_that_a_user_lets_require_gradients(late_transfer):
    """A user who trains what goes into the first block would lose its gradients."""
    model, outputs = deep_llama(), []
    model.enable_input_require_grads()
    model = LoraModel(model, LoraConfig(gradient_checkpointing="offload")).train()
    model.get_input_embeddings().register_forward_hook(lambda *args: outputs.append(args[2]))
    loss_of(model).backward()
    assert outputs[0].requires_grad and outputs[0].grad is not None


def test_what_blocks_share_is_copied_at_most_once(late_transfer):
    """Each block would send the mask or the encoder's output to the host again, and free nothing by it."""
    gradients(wrapped(t5), attention_mask=torch.ones_like(IDS).tril(3))
    # A hidden state for each block. The first block of the encoder, and that of the decoder, also send what is shared.
    assert 2 * LAYERS <= late_transfer.log.count("to host") <= 2 * LAYERS + 6


def test_next_block_is_fetched_early(late_transfer):
    """The GPU would wait in each block for the hidden state that it recomputes from."""
    loss = loss_of(wrapped())
    late_transfer.log.clear()
    loss.backward()
    assert late_transfer.log == ["to device", "join"] * LAYERS
    events, layers = [], wrapped()
    for number, layer in enumerate(layers.get_base_model().model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: events.append(number))
    copy_late = late_transfer.copy

    def noted(to, source):
        events.append("copy")
        return copy_late(to, source)

    loss = loss_of(layers)
    late_transfer.copy, events[:] = noted, []
    loss.backward()
    assert events == ["copy", "copy", 3, "copy", 2, "copy", 1, 0]


def test_small_inputs_stay(late_transfer, monkeypatch):
    """Many small copies would cost more time than they free memory."""
    monkeypatch.setattr(offload_activations, "SMALLEST", IDS.numel() * 32 * 4 + 1)
    gradients(wrapped())
    assert late_transfer.log == []
    monkeypatch.setattr(offload_activations, "SMALLEST", IDS.numel() * 32 * 4)
    gradients(wrapped())
    assert late_transfer.log


def test_models_on_the_host_copy_nothing(monkeypatch):
    """A script that is tried on a machine without a GPU would fail, or copy for nothing."""
    monkeypatch.setattr(offload_activations, "SMALLEST", 0)
    assert_same(gradients(wrapped()), gradients(wrapped(checkpointing=False)))


def test_two_forwards_before_their_backwards(late_transfer):
    """A loss of two passes, as in contrastive training, would get the hidden states of the wrong one."""
    found = []
    for checkpointing in (False, "offload"):
        model = wrapped(checkpointing=checkpointing)
        first, second = loss_of(model), loss_of(model, attention_mask=torch.ones_like(IDS).tril(3))
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_a_pass_whose_backward_never_comes(late_transfer):
    """A validation loss in train mode would leave its hidden states on the GPU, or on the host."""
    model = wrapped()
    loss_of(model)
    late_transfer.synchronize()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is offload_activations._Away]
    assert_same(gradients(model), gradients(wrapped(checkpointing=False)))


def test_inputs_of_all_kinds(late_transfer):
    """Inputs that are parameters, views, integers or no tensors would come back as something else."""
    weight, layer = nn.Parameter(torch.randn(6, 5)), nn.Linear(6, 6)

    def block(x, weight, index, scale, *, shift):
        return layer(torch.tanh(x) + weight.t()[index] * scale) + shift

    found = []
    for call in (lambda function, *args, **kwargs: function(*args, **kwargs), checkpoint):
        torch.manual_seed(0)
        x = torch.randn(6, 3, requires_grad=True)
        out = call(block, (x * 2).t(), weight, torch.tensor([0, 4, 1]), 0.5, shift=torch.ones(6))
        found.append(dict(enumerate(torch.autograd.grad(out.square().sum(), [x, weight, *layer.parameters()]))))
    assert_same(found[1], found[0])
    assert late_transfer.log.count("to host") == 2  # x and the index


def test_evaluation_copies_nothing(late_transfer):
    """Generating would send each token's hidden states to the host."""
    model = wrapped()
    with torch.no_grad():
        loss_of(model)
    loss_of(model.eval())
    assert late_transfer.log == []


def test_copies_of_a_model(late_transfer):
    """A model that is sent to another process, or copied for an average of weights, would keep hidden states again."""
    model = wrapped()
    expected = gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        late_transfer.log.clear()
        assert_same(gradients(other), expected)
        assert late_transfer.log.count("to host") == LAYERS


def test_unloading_turns_it_off(late_transfer):
    """The base that is handed back would go on copying."""
    base = wrapped().unload().train()
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    loss_of(base).backward()
    assert late_transfer.log == []
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def test_models_that_cannot(monkeypatch):
    """A setting that would be silently ignored costs the user their memory budget."""
    with pytest.raises(ValueError, match="gradient_checkpointing.*Mlp"):
        LoraModel(mlp(), LoraConfig(gradient_checkpointing="offload"))
    model = llama()
    monkeypatch.setattr(type(model), "_set_gradient_checkpointing", lambda self, module, value=False: None)
    with pytest.raises(ValueError, match="gradient_checkpointing: expected True or False.*LlamaForCausalLM.*'offload'"):
        LoraModel(model, LoraConfig(gradient_checkpointing="offload"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch sees none")
def test_on_a_gpu():
    """The copies of a real GPU would be read before they have arrived, or its memory stay taken."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(1024, 1024), nn.Dropout(0.2), nn.GELU()) for _ in range(16)).cuda()
    found, memory = [], []
    for function in (torch.utils.checkpoint.checkpoint, checkpoint):
        options = {} if function is checkpoint else {"use_reentrant": False}
        for _ in range(3):
            blocks.zero_grad()
            torch.manual_seed(1)
            x = torch.randn(4096, 1024, device="cuda")
            before = torch.cuda.memory_allocated()
            for block in blocks:
                x = function(block, x, **options)
            torch.cuda.synchronize()
            offload_activations._transfer.synchronize()
            memory.append(torch.cuda.memory_allocated() - before)
            x.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in blocks.named_parameters()})
    assert_same(found[1], found[0])
    assert memory[-1] < memory[0] / 4
