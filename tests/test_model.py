"""lowbit_lora/model.py, conversion.py and targets.py: wrapping, what trains, and failures."""

import copy
import gc
import math
import pickle

import pytest
import torch
from conftest_models import (
    IDS,
    LABELS,
    assert_as_precise,
    assert_untouched,
    bert,
    decoded,
    llama,
    logits,
    mlp,
    snapshot,
    train,
)
from torch import nn

import lowbit
from lowbit import QuantizedTensor, WeightSpec
from lowbit_lora import LoraConfig, LoRALinear, LoraModel, QLoRAConfig, QLoRAModel, QuantizationType

KINDS = [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)]
kinds = pytest.mark.parametrize(("model_type", "config_type"), KINDS, ids=["lora", "qlora"])


def layers_of(model, kind):
    return {name for name, module in model.named_modules() if type(module) is kind}


def quantized_weights(model):
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, QuantizedTensor)}


@pytest.mark.parametrize("make", [bert, llama])
def test_starts_exactly_as_the_quantized_base(make):
    """B = 0: the first step starts from the base, bit for bit."""
    wrapped = QLoRAModel(make(), QLoRAConfig())
    heads = [name for name in ("classifier", "lm_head") if hasattr(make(), name)]
    assert torch.equal(logits(wrapped), logits(lowbit.quantize_(make(), skip=heads)))


def test_lora_starts_exactly_as_the_dense_base():
    """Without quantization, too, B = 0: the first step starts from the base, bit for bit."""
    assert torch.equal(logits(LoraModel(bert(), LoraConfig())), logits(bert()))


def test_stores_all_but_the_head_in_4_bits():
    """The memory is saved on every linear layer, not only on those with LoRA; heads stay precise."""
    dense = sum(tensor.nbytes for tensor in [*llama().parameters(), *llama().buffers()])
    wrapped = QLoRAModel(llama(), QLoRAConfig(target_modules=["q_proj"]))
    model = wrapped.get_base_model()
    assert layers_of(model, LoRALinear) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    stored = quantized_weights(model)
    assert len(stored) == 2 * 7 and not any("lm_head" in name for name in stored)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    # Half a byte a weight, a byte for each 64, and fp32 for each 256 of those and for the offset.
    expected = sum(q.numel() // 2 + q.numel() // 64 + 4 * -(-q.numel() // 64 // 256) + 4 for q in stored.values())
    assert sum(q.nbytes for q in stored.values()) == expected
    assert wrapped.memory_footprint() == dense - sum(4 * q.numel() for q in stored.values()) + expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}),
        (["attention.output.dense"], {f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)}),
        (["bert.pooler.dense"], {"bert.pooler.dense"}),
        (
            r".*layer\.1\..*(query|value)",
            {f"bert.encoder.layer.1.attention.self.{n}" for n in ("query", "value")},
        ),
    ],
)
def test_targets_by_name_suffix_and_regex(targets, expected):
    """LoRA goes where the config says, as PEFT reads it, and nowhere else."""
    model = LoraModel(bert(), LoraConfig(target_modules=targets)).get_base_model()
    assert layers_of(model, LoRALinear) == expected


def test_all_linear_leaves_out_the_heads():
    """A head that is trained whole, or tied to the embedding, is no place for LoRA."""
    assert "classifier" not in layers_of(LoraModel(bert(), LoraConfig()).get_base_model(), LoRALinear)
    found = layers_of(LoraModel(llama(), LoraConfig()).get_base_model(), LoRALinear)
    assert len(found) == 14
    assert "lm_head" not in found


@kinds
@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        (
            {"target_modules": ["nothing"]},
            ValueError,
            ("target_modules", "nothing", "bert.pooler.dense", "query"),
        ),
        ({"target_modules": ["query", "quarry"]}, ValueError, ("quarry",)),
        ({"target_modules": ["uery"]}, ValueError, ("uery",)),
        ({"target_modules": r"query"}, ValueError, ("query",)),
        ({"target_modules": r"(.*"}, ValueError, ("regular expression", "(.*")),
        (
            {"target_modules": ["LayerNorm"]},
            TypeError,
            ("LayerNorm", "torch.nn.Linear"),
        ),
        ({"target_modules": ["classifier"]}, ValueError, ("classifier",)),
        ({"modules_to_save": ["poler"]}, ValueError, ("modules_to_save", "poler", "classifier")),
    ],
)
def test_what_matches_nothing_is_an_error_that_changes_nothing(model_type, config_type, settings, error, names):
    """A typo must not train less than was asked for; the message lists what there is."""
    model = bert()
    before = snapshot(model)
    with pytest.raises(error) as raised:
        model_type(model, config_type(**settings))
    for name in names:
        assert name in str(raised.value)
    assert_untouched(model, before)


def test_nan_names_its_module_and_changes_nothing():
    """The last layer fails after all others were quantized: the model must still be whole."""
    model = bert()
    name = "bert.encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 3] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=name):
        QLoRAModel(model, QLoRAConfig())
    assert_untouched(model, before)


def test_checkpointing_that_is_not_supported_changes_nothing():
    """A setting that would be silently ignored costs the user their memory budget."""
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match="gradient_checkpointing.*Mlp"):
        QLoRAModel(model, QLoRAConfig(gradient_checkpointing=True))
    assert_untouched(model, before)


@kinds
def test_wrapping_twice_is_an_error(model_type, config_type):
    """Adapters on adapters would train something that no file can hold."""
    wrapped = model_type(bert(), config_type())
    for model in (wrapped, wrapped.get_base_model(), nn.Sequential(wrapped.get_base_model())):
        with pytest.raises(ValueError, match="merge_and_unload"):
            model_type(model, config_type())


def test_wrong_argument_types():
    """A LoraConfig says nothing of quantization."""
    with pytest.raises(TypeError, match="QLoRAConfig.*LoraConfig"):
        QLoRAModel(bert(), LoraConfig())
    with pytest.raises(TypeError, match="Module"):
        LoraModel("bert", LoraConfig())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_trains(bias):
    """Training too much breaks the adapter file; training too little, the result."""
    wrapped = QLoRAModel(bert(), QLoRAConfig(target_modules=["query"], bias=bias))
    model = wrapped.get_base_model()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    expected = {f"{name}.{part}.default.weight" for name in lora for part in ("lora_A", "lora_B")}
    expected |= {f"classifier.modules_to_save.default.{key}" for key in ("weight", "bias")}
    if bias == "all":
        biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
        expected |= biases - {"classifier.original_module.bias"}
    if bias == "lora_only":
        expected |= {f"{name}.base_layer.bias" for name in lora}
    assert trains == expected
    before = copy.deepcopy(model).state_dict()
    train(wrapped)
    after = model.state_dict()
    changed = {n for n in before if not torch.equal(*(decoded(state[n]) for state in (before, after)))}
    # The gradient of the key's bias is zero in exact arithmetic, so it need not move.
    assert changed <= expected
    assert {name for name in expected if "key.bias" not in name} <= changed


@kinds
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_lower_the_loss(model_type, config_type, make, checkpointing):
    """Training would not lower the loss."""
    config = config_type(rank=4, gradient_checkpointing=checkpointing)
    losses = train(model_type(make(), config).train())
    assert losses[2] < losses[1] < losses[0]


def test_checkpointing_gives_the_same_training():
    """Checkpointing trades time for memory, never the result."""
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        wrapped = QLoRAModel(llama(), QLoRAConfig(gradient_checkpointing=checkpointing)).train()
        runs.append((train(wrapped), wrapped))
    assert any(getattr(m, "gradient_checkpointing", False) for m in runs[1][1].modules())
    assert runs[0][0] == runs[1][0]


def test_one_seed_gives_one_result():
    """Two runs with a seed are bit-identical, dropout included; else nothing can be reproduced."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        wrapped = QLoRAModel(bert(), QLoRAConfig(lora_dropout=0.2)).train()
        results.append((train(wrapped), [p.detach().clone() for p in wrapped.trainable_parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_counts_are_of_weights_not_of_bytes(capsys):
    """ "All params" must not halve because two weights share a byte."""
    dense = sum(p.numel() for p in bert().parameters())
    wrapped = QLoRAModel(bert(), QLoRAConfig(rank=4, target_modules=["query"]))
    lora = 2 * 4 * (32 + 32)
    head = 2 * 32 + 2
    assert wrapped.count_parameters() == (lora + head, dense + lora + head)  # the head's copy trains
    wrapped.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {lora + head:,} || all params: {dense + lora + head:,} || trainable%: " in printed
    assert sum(p.numel() for p in wrapped.trainable_parameters()) == lora + head


def test_calls_and_attributes_go_through():
    """Existing code (generate, config, device) has to work on the wrapper."""
    wrapped = QLoRAModel(llama(), QLoRAConfig())
    assert wrapped.config.vocab_size == 50
    assert wrapped.device.type == "cpu"
    assert wrapped.generate(IDS[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (3, 5)
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapped.no_such_thing  # noqa: B018
    assert not hasattr(LoraModel(mlp(), LoraConfig()), "config")


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_wrapper(model_type, config_type, copied):
    """A copy predicts the same and trains apart."""
    wrapped = model_type(bert(), config_type())
    train(wrapped)
    twin, expected = copied(wrapped), logits(wrapped)
    assert torch.equal(logits(twin), expected)
    train(twin)
    assert torch.equal(logits(wrapped), expected)
    assert not torch.equal(logits(twin), expected)


def test_casting_the_wrapper_keeps_the_stored_weights():
    """model.to(torch.bfloat16) on the whole wrapper is common; the 4-bit weights must survive it."""
    wrapped = QLoRAModel(llama(), QLoRAConfig())
    layer = wrapped.get_base_model().model.layers[0].mlp.up_proj
    before = layer.base_weight(torch.float32)
    wrapped.to(torch.bfloat16)
    assert torch.equal(layer.base_weight(torch.float32), before)
    assert logits(wrapped).dtype == torch.bfloat16


def test_training_mode_is_kept():
    """A model in eval mode would otherwise start to drop."""
    wrapped = QLoRAModel(bert(), QLoRAConfig(lora_dropout=0.5))
    assert not any(module.training for module in wrapped.modules())
    assert torch.equal(logits(wrapped), logits(wrapped))


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_storage_settings_reach_the_layers(scale):
    """A config would be read but not obeyed."""
    config = QLoRAConfig(quantization="fp4", double_quant=False, block_size=128, scale=scale)
    weight = QLoRAModel(mlp(), config).get_base_model().first.base_layer.weight
    assert weight.spec == WeightSpec("fp4", 128, False)
    expected = lowbit.quantize(mlp().first.weight, format="fp4", block_size=128, double_quant=False, scale=scale)
    assert torch.equal(weight.dequantize(), expected.dequantize())


def test_int8_from_config_to_merge(tmp_path):
    """QuantizationType.INT8 goes every way NF4 goes: train, save, load with its settings, merge."""
    wrapped = QLoRAModel(bert(), QLoRAConfig(quantization="INT8")).train()
    query = wrapped.get_base_model().bert.encoder.layer[0].attention.self.query
    assert query.base_layer.weight.spec == WeightSpec("int8")
    losses = train(wrapped)
    assert losses[2] < losses[1] < losses[0]
    wrapped.save_pretrained(tmp_path)
    again = QLoRAModel.from_pretrained(bert(), tmp_path)
    assert again.lora_config.quantization is QuantizationType.INT8
    wrapped.eval()
    assert torch.equal(logits(again), logits(wrapped))
    assert wrapped.count_parameters() == QLoRAModel(bert(), QLoRAConfig()).count_parameters()
    assert_as_precise(logits(wrapped), wrapped.merge_and_unload(), logits)


def test_plain_head_in_modules_to_save():
    """Models that are not Hugging Face's name their head themselves."""
    wrapped = QLoRAModel(mlp(), QLoRAConfig(modules_to_save=["head"]))
    head = wrapped.get_base_model().head
    assert type(head.current()) is nn.Linear
    assert head.weight.requires_grad and not head.original_module.weight.requires_grad
    assert not wrapped.get_base_model().norm.weight.requires_grad


def test_a_quantized_head_cannot_be_trained_whole():
    """Only its LoRA could learn; the user is told to leave it dense before anything has changed."""
    model = lowbit.quantize_(bert())
    before = snapshot(model)
    with pytest.raises(ValueError, match="classifier.*skip="):
        LoraModel(model, LoraConfig())
    assert_untouched(model, before)


@pytest.mark.parametrize("inside", [False, True])
def test_ddp_never_sends_the_base(tmp_path, monkeypatch, inside):
    """DistributedDataParallel broadcasts parameters on wrapping: a 65B base would take minutes and twice the memory."""
    wrapped, sent = QLoRAModel(bert(), QLoRAConfig(target_modules=["query"])), []
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    real = distributed._broadcast_coalesced

    def broadcast(group, tensors, *arguments):
        sent.extend(tensors)
        real(group, tensors, *arguments)

    monkeypatch.setattr(distributed, "_broadcast_coalesced", broadcast)
    try:  # the wrapper, or the model inside of it
        parallel = nn.parallel.DistributedDataParallel(wrapped.get_base_model() if inside else wrapped)
        parallel(input_ids=IDS, labels=LABELS).loss.backward()
        del parallel
        gc.collect()  # before the group goes: freed after it, DDP waits for a thread that waits for Python's lock
    finally:
        distributed.destroy_process_group()
    assert quantized_weights(wrapped)
    dense = [p for p in wrapped.parameters() if not isinstance(p, QuantizedTensor)]
    assert sum(t.numel() for t in sent) >= sum(p.numel() for p in dense)
    assert not any(isinstance(t, QuantizedTensor) or t.dtype == torch.uint8 for t in sent)
    assert all(p.grad is not None for p in wrapped.trainable_parameters())


@kinds
def test_hooks_go_on_firing(model_type, config_type):
    """Probes and placement tools hang on a layer before it is wrapped; their handles still remove them afterwards."""
    model, seen = mlp(), []
    handles = [
        model.second.register_forward_pre_hook(lambda module, args: seen.append("before")),
        model.second.register_forward_hook(lambda module, args, y: seen.append("after") or 2 * y),
        model.second.register_full_backward_hook(lambda module, before, after: seen.append("backward")),
    ]
    x = torch.randn(2, 40, requires_grad=True)
    wrapped = model_type(model, config_type(target_modules=["second"]))
    wrapped(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    wrapped.merge_and_unload()(x).sum().backward()
    assert seen == 2 * ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == 6
