"""LoRA for each expert of a stack, in each of transformers' ways: against merged weights, and against PEFT's files."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import QuantizedTensor, WeightSpec
from lowbit.adapted import ProductWeight
from lowbit.quantizers.quantize import quantize_to
from lowbit_lora import LoraConfig, LoRAExperts, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.hf import experts as hf_experts
from lowbit_lora.layers import Adapter

IDS = torch.arange(14).reshape(2, 7)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = ("eager", "batched_mm", "grouped_mm", "lowbit")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"vocab_size": 50, "intermediate_size": 64, "num_experts_per_tok": 2, "pad_token_id": 0}


def moe(name: str = "Mixtral", way: str = "eager", experts: int = 4):
    """A tiny model of transformers with random weights, in eval mode."""
    transformers = pytest.importorskip("transformers", minversion="5")
    options = {"num_experts": experts, "num_local_experts": experts, "moe_intermediate_size": 64, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".experts." in parameter_name:
                parameter.normal_(std=0.1)  # as they begin, the experts add too little to see
    hf_experts.register()
    model.set_experts_implementation(way)
    return model


def randomized(wrapped: nn.Module, seed: int = 1) -> nn.Module:
    """Random factors: a zero hides an adapter that computes nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return wrapped


def wrapped_moe(quantized: bool, name: str = "Mixtral", way: str = "eager", stacks=STACKS, **options) -> LoraModel:
    kind, config = (QLoRAModel, QLoRAConfig) if quantized else (LoraModel, LoraConfig)
    options = {"rank": 4, "target_modules": [], "target_parameters": stacks} | options
    model = randomized(kind(moe(name), config(**options)))
    model.set_experts_implementation(way)  # now: quantized experts are given ours
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_each_way_of_transformers_computes_the_merged_model(name, quantized, monkeypatch):
    """What is trained in one way of multiplying would be another model in the next, or decode a whole stack in each."""
    model = wrapped_moe(quantized, name)
    with monkeypatch.context() as patched:
        patched.setattr(ProductWeight, "merged", None)
        decode = QuantizedTensor.dequantize
        patched.setattr(QuantizedTensor, "dequantize", lambda q, *a, **k: decode(q, *a, **k) if q.dim() < 3 else 1 / 0)
        found = {}
        for way in WAYS:
            model.set_experts_implementation(way)
            found[way] = logits(model)
    assert (found["eager"] - logits(moe(name))).abs().max() > 0.01
    merged = logits(model.merge_and_unload())
    for way in WAYS:
        torch.testing.assert_close(found[way], merged, rtol=1e-4, atol=1e-5)


def dense_gradients(wrapper: LoraModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a model's factors through dense sums W + scaling * B_e A_e of plain parameters."""
    plain = copy.deepcopy(wrapper)
    leaves = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    weights = {}
    for part_name, part in plain._parts().items():
        lora_a, lora_b = part.factors("default")
        experts, rank = part._experts, part.adapters["default"].rank
        a, b = lora_a.view(experts, rank, -1), lora_b.view(-1, rank, experts)
        delta = 2 * torch.stack([b[..., expert] @ a[expert] for expert in range(experts)])
        delta = delta.mT if getattr(part.base, "is_transposed", False) else delta
        dense = part.base_weight() + delta
        weights[f"{part_name.replace('.base_layer', '')}.{part.weight_name}"] = dense
    base = lowbit.dequantize_(plain.unload())
    with torch.enable_grad():
        torch.func.functional_call(base, weights, (x,)).logits.square().mean().backward()
    return {name: p.grad for name, p in leaves.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_gradients_of_each_expert(name, quantized, way):
    """An expert whose factors get another's gradient, or none, would not learn."""
    model = wrapped_moe(quantized, name, way, lora_alpha=8)
    model(IDS).logits.square().mean().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    expected = dense_gradients(model, IDS)
    assert found.keys() == expected.keys() and len(found) == 8
    for key, gradient in found.items():
        scale = expected[key].abs().max()
        torch.testing.assert_close(gradient / scale, expected[key] / scale, rtol=1e-3, atol=1e-5, msg=key)
    by_expert = next(g for key, g in found.items() if "lora_A" in key).view(4, 4, -1)
    assert (by_expert.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantized", [False, True])
def test_experts_without_tokens(quantized, way):
    """A batch that leaves experts out is common; under DDP each factor has to get a gradient all the same."""
    model = wrapped_moe(quantized, way=way)
    for layer in model.model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # then two experts get every token
    y = model(IDS[:, :2]).logits
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if "lora_A" in key else parameter.grad.view(-1, 4, 4).permute(2, 0, 1)
            assert (gradient.reshape(4, -1).abs().amax(1) > 0).sum() == 2, key
    torch.testing.assert_close(y.detach(), logits(model.merge_and_unload(), IDS[:, :2]), rtol=1e-4, atol=1e-5)


PEFT_CASES = [
    ("Mixtral", [*STACKS, "mlp.gate.weight"], {}),
    ("Qwen3Moe", ["gate_up_proj", "down_proj"], {"use_rslora": True, "target_modules": ["q_proj"]}),
    ("GptOss", STACKS[::-1], {"rank_pattern": {"experts.down_proj": 6}, "alpha_pattern": {r".*\.gate_up_proj": 3}}),
    ("GptOss", ["mlp.experts.down_proj"], {"bias": "all"}),
]


@pytest.mark.parametrize("name, stacks, options", PEFT_CASES)
def test_files_go_both_ways_with_peft(tmp_path, name, stacks, options):
    """An adapter of one library would be another function in the other: the keys name parameters by their nesting, and
    the experts lie differently in A and in B.
    """
    peft = pytest.importorskip("peft")
    ours = wrapped_moe(False, name, stacks=stacks, **options)
    if options.get("bias"):
        with torch.no_grad():
            for parameter in ours.trainable_parameters():
                parameter.normal_(std=0.1)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(moe(name), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = LoraModel.from_pretrained(moe(name, "grouped_mm"), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-5)
    assert (logits(again) - logits(ours)).abs().max() > 0.01


def test_an_adapter_by_peft_on_a_quantized_base(tmp_path):
    """Adapters are trained on dense bases and served on quantized ones."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=STACKS, init_lora_weights=False)
    theirs = randomized(peft.get_peft_model(moe(), config))
    theirs.save_pretrained(tmp_path)
    ours = QLoRAModel.from_pretrained(moe(), tmp_path)
    base = lowbit.dequantize_(QLoRAModel.from_pretrained(moe(), tmp_path).unload())
    on_decoded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(ours), logits(on_decoded), rtol=0, atol=1e-5)


def test_a_beginning_adds_nothing():
    """Training would start from another model; each expert begins with values of its own."""
    for method in ("default", "gaussian", "orthogonal"):
        config = LoraConfig(rank=4, target_modules=[], target_parameters=STACKS, init_lora_weights=method)
        model = LoraModel(moe(), config)
        torch.testing.assert_close(logits(model), logits(moe()), rtol=0, atol=1e-6)
        layer = next(iter(model._parts().values()))
        experts = layer.factors()[0].view(4, 4, -1)
        assert all(not torch.equal(one, other) for one, other in itertools.combinations(experts, 2))
        assert 0.01 < experts.std() < 1


@pytest.mark.parametrize("quantized", [False, True])
def test_several_adapters(quantized):
    """Adapters of other ranks that are active together would lose one of them, or switching would leave one behind."""
    model = wrapped_moe(quantized)
    base = logits(moe()) if not quantized else None
    alone = logits(model)
    model.add_adapter("other", LoraConfig(rank=2, target_modules=["q_proj"], target_parameters=STACKS, lora_alpha=4))
    randomized(model, 2)
    first = logits(model)
    model.set_adapter(["default", "other"])
    both = logits(model)
    for way in WAYS:
        model.set_experts_implementation(way)
        torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert (both - first).abs().max() > 0.01
    assert (first - alone).abs().max() > 0.01  # randomized anew
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-5)
    model.rename_adapter("other", "second")
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        off = logits(model)
    assert (off - first).abs().max() > 0.01
    if base is not None:
        assert torch.equal(off, base)
    plain = model.unload()
    assert type(plain.model.layers[0].mlp.experts).__name__ == "MixtralExperts" and torch.equal(logits(plain), off)


def test_hot_swapping(tmp_path):
    """A server that puts another adapter into the memory of one would serve a mixture, or scale it wrongly."""
    other = wrapped_moe(False, lora_alpha=3, rank_pattern={"experts.down_proj": 2}, alpha_pattern={"down_proj": 5})
    other.save_pretrained(tmp_path / "other")
    model = wrapped_moe(False, rank_pattern={"experts.down_proj": 2})
    model.load_adapter(tmp_path / "other", "default")
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)
    wrapped_moe(False, rank=2).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="rank of adapter 'default', 4"):
        model.load_adapter(tmp_path / "smaller", "default")


@pytest.mark.parametrize("way", WAYS)
def test_bf16(way):
    """Rounding of LoRA's part to bf16 before the sum would show: a model in 16 bits is what is trained."""
    model = wrapped_moe(True, way=way).bfloat16()
    for parameter in model.trainable_parameters():
        parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).float()
    y = model(IDS).logits
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.trainable_parameters())
    error = (y.float() - logits(exact)).norm() / logits(exact).norm()
    base_error = (logits(moe().bfloat16()).float() - logits(moe())).norm() / logits(moe()).norm()
    assert error < 2 * base_error + 0.005


def test_training_with_checkpointing_and_autocast():
    """Activations are recomputed in the backward, when the module runs again outside of the model's forward."""
    found = []
    for checkpointing in (False, True):
        model = wrapped_moe(True, way="grouped_mm", gradient_checkpointing=checkpointing).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append([p.grad for p in model.trainable_parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found, strict=True))


class Batched(nn.Module):
    """Experts that all have as many tokens, as Llama 4's; they multiply in three ways."""

    def __init__(self, transposed: bool = False, features: int = 48):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, features, 40) / 6)
        self.transposed = transposed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[3, tokens, 40] -> [3, tokens, features], three times; transposed the other way round."""
        y = torch.bmm(x, self.weight if self.transposed else self.weight.transpose(1, 2))
        einsum = torch.einsum("etd,edf->etf" if self.transposed else "etf,edf->etd", x, self.weight)
        return y, einsum, torch.matmul(self.weight if not self.transposed else self.weight.mT, x.mT).mT


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", [None, WeightSpec(), WeightSpec("int8"), WeightSpec("fp4", 128, False)])
def test_other_products_and_functions(spec, transposed):
    """A model whose experts multiply in another way would be trained and used without LoRA, silently."""
    torch.manual_seed(0)
    module = Batched(transposed)
    if spec is not None:
        module.weight = nn.Parameter(quantize_to(module.weight.detach(), spec, "absmax"), requires_grad=False)
    layer = randomized(LoRAExperts(module, ["weight"], rank=3))
    weight = layer.merged_weight().detach()
    x = torch.randn(3, 5, 48 if transposed else 40)
    expected = x @ (weight if transposed else weight.mT)
    lora_a, lora_b = layer.factors()
    first = None
    for y in layer(x):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(y.square().sum(), (lora_a, lora_b), retain_graph=True)
        first = gradients if first is None else first
        for gradient, other in zip(gradients, first, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)
    assert torch.equal(layer.weight + 0, weight) and layer.weight.shape == weight.shape


def test_a_matrix_that_begins_inside_a_block():
    """Experts of odd sizes share blocks of scales; their products would read another's."""
    torch.manual_seed(0)
    module = Batched(features=3)
    module.weight = nn.Parameter(lowbit.quantize(module.weight.detach()), requires_grad=False)
    layer = randomized(LoRAExperts(module, ["weight"], rank=2))
    x = torch.randn(5, 40)
    for expert in range(3):
        expected = F.linear(x, layer.merged_weight()[expert])
        torch.testing.assert_close(F.linear(x, layer.weight[expert]), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x @ layer.weight[expert].T, expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_reads_memory_is_an_error():
    """It would compute, and train, without LoRA."""
    layer = LoRAExperts(Batched(), ["weight"])
    with pytest.raises(RuntimeError, match="target_parameters"):
        layer.weight.data_ptr()
    with pytest.raises(RuntimeError, match="set_experts_implementation"), torch._C.DisableTorchFunctionSubclass():
        layer.weight * 2  # as code in C++ does
    model = wrapped_moe(False)
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(ValueError, match="got 'deepgemm'"):
        model(IDS)


def test_the_module_is_the_same_outside_of_its_forward():
    """Code around the experts reads their attributes; a forward that fails must not leave its weight behind."""
    model = wrapped_moe(False)
    layer = model.model.model.layers[0].mlp.experts
    experts = layer.base
    assert layer.num_experts == 4 and layer.act_fn is experts.act_fn and layer.gate_up_proj.shape == (4, 128, 32)
    assert isinstance(layer.gate_up_proj, ProductWeight) and isinstance(layer.down_proj, ProductWeight)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    with pytest.raises(TypeError):
        layer("no tensor", None, None)
    assert type(experts.gate_up_proj) is nn.Parameter and type(experts.down_proj) is nn.Parameter
    assert model.base_state_dict().keys() == moe().state_dict().keys()
    again = copy.deepcopy(model)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    logits(model)
    assert len(seen) == 1


def test_threads_and_replaced_forwards():
    """A server runs one model in several threads, and accelerate puts a function in the place of a module's forward."""
    model = wrapped_moe(False)
    with torch.no_grad():
        expected = [model(IDS[:, :length]).logits for length in range(1, 8)]
        experts = model.model.model.layers[0].mlp.experts.base
        own = experts.forward
        experts.forward = lambda *args: own(*args)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda length: logits(model, IDS[:, :length]), [*range(1, 8)] * 4)
        for y, wanted in zip(found, expected * 4, strict=True):
            torch.testing.assert_close(y, wanted)


def test_torch_compile():
    """A graph would hold the weight without LoRA, or the dense sum: the experts stay outside of it."""
    model = wrapped_moe(False, way="grouped_mm")
    compiled = torch.compile(model.model.model.layers[0].mlp, backend="eager")
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(compiled(x), model.model.model.layers[0].mlp(x), rtol=1e-4, atol=1e-5)


def test_merging_into_quantized_weights():
    """Where memory is short merged stacks are stored again; the report of what is left would lack the experts."""
    model = wrapped_moe(True)
    parts = list(model._parts())
    before = logits(model)
    merged = model.merge_and_unload(into="quantized")
    assert [survival.name for survival in model.merge_report.layers] == parts
    assert isinstance(merged.model.layers[0].mlp.experts.down_proj, QuantizedTensor)
    assert (logits(merged) - before).norm() < 0.3 * before.norm()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_parameters": ["experts.nothing"]}, "'experts.nothing' matches nothing; .*experts.gate_up_proj"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"expected weights \[out, in\] or"),
        ({"lora_dropout": 0.1}, "lora_dropout: expected none with target_parameters"),
        ({"use_dora": True}, "use_dora: expected none with target_parameters"),
        ({"lora_bias": True}, "lora_bias: expected none with target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: .*target_parameters"),
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern: 'nothing'"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters: expected a list"),
    ],
)
def test_errors_name_the_setting(options, message):
    """A setting that is not meant would otherwise be passed over; the model must be as it was."""
    model = moe()
    with pytest.raises((TypeError, ValueError), match=message):
        LoraModel(model, LoraConfig(**{"rank": 4, "target_modules": [], "target_parameters": STACKS} | options))
    assert torch.equal(logits(model), logits(moe())) and not any("lora" in name for name, _ in model.named_parameters())


def test_errors_of_wrapped_models(tmp_path):
    """Rows with several adapters, other parameters and combinations: silence would be another model."""
    model = wrapped_moe(False)
    with pytest.raises(ValueError, match="adapter_names: .*gate_up_proj|adapter_names: .*down_proj"):
        model(IDS, adapter_names=["default", "__base__"])
    torch.testing.assert_close(model(IDS, adapter_names=["__base__"] * 2).logits, moe()(IDS).logits)
    with pytest.raises(ValueError, match="that another adapter has, gate_up_proj, down_proj, got down_proj"):
        model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=["down_proj"]))
    with pytest.raises(ValueError, match="without target_parameters to combine"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.configs) == ["default"]
    with pytest.raises(TypeError, match="MixtralExperts.nothing"):
        LoRAExperts(moe().model.layers[0].mlp.experts, ["nothing"])
    with pytest.raises(ValueError, match="use_dora"):
        next(iter(model._parts().values())).add_adapter("dora", Adapter(use_dora=True))


def test_entries_of_a_file_may_match_nothing(tmp_path):
    """PEFT's files list names of many models; an adapter would not load for one that this model has not."""
    model = wrapped_moe(False)
    model.configs["default"] = LoraConfig(rank=4, target_modules=[], target_parameters=[*STACKS, "block_sparse_moe.w1"])
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(moe(), tmp_path)
    assert torch.equal(logits(again), logits(model))
