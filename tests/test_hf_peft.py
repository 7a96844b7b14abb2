"""PEFT's own models on quantized weights: with our product registered, and all of its methods as they are.

Each is compared with the same model on the decoded weights. ``LORA`` lists settings of LoRA, ``METHODS`` what else PEFT
0.21.2 offers.
"""

import copy
import ctypes

import pytest
import torch
from cases import UNIT_ROUNDOFF, CalledOps
from conftest_models import assert_untouched, llama, snapshot
from torch import nn

import lowbit
import lowbit_lora
from lowbit import QuantizedTensor

peft = pytest.importorskip("peft")

from peft.tuners.lora import config as options  # noqa: E402

from lowbit_lora.hf.peft import QuantizedLinear, register  # noqa: E402

IDS = torch.arange(3, 17).reshape(2, 7)
TARGETS = ["q_proj", "down_proj"]
#: The most terms that a product in these models has: in_features, and the ranks of two adapters.
TERMS = 128 + 16


def base(dense: bool = False, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """A tiny Llama whose linear weights are quantized; ``dense``: the same, decoded."""
    model = lowbit.quantize_(llama(hidden_size=64, intermediate_size=128, **config).to(dtype))
    return lowbit.dequantize_(model) if dense else model


def gpt2(dense: bool = False) -> nn.Module:
    """A tiny GPT-2, whose linear layers are Conv1D, as :func:`base`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1)
    model = lowbit.quantize_(transformers.GPT2LMHeadModel(config).eval())
    return lowbit.dequantize_(model) if dense else model


def wrap(model: nn.Module, config, **kwargs) -> nn.Module:
    """PEFT's model, with the same random numbers each time."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, config, **kwargs)


def lora(*, registered: bool = True, **settings):
    """A LoraConfig of PEFT's."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)
    return register(config) if registered else config


def stir(model: nn.Module) -> nn.Module:
    """``model`` with random values in all that trains and in all adapters, so that nothing is zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data.add_(0.05 * noise.to(parameter.dtype))
    return model


def pair(model=base, **settings) -> tuple[nn.Module, nn.Module]:
    """LoRA on a quantized model by our layer, and on the decoded one by PEFT's, with the same factors."""
    return tuple(stir(wrap(model(dense), lora(registered=not dense, **settings))).eval() for dense in (False, True))


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    return model(**{"input_ids": IDS} | inputs).logits


def gradients(model: nn.Module) -> torch.Tensor:
    """Those of the adapters, as one vector."""
    model.zero_grad()
    logits(model).double().square().mean().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_same(ours: nn.Module, theirs: nn.Module, *runs) -> None:
    """Assert that what two models give (their logits) differs by no more than roundings, measured against float64.

    A product errs by at most (terms + 8) roundings of fp32 and one of its dtype (``cases.product_tolerance``); the
    dense model's errs by at least one of each. So the difference is at most the sum of these errors.
    """
    exact = copy.deepcopy(theirs).double()
    dtype = next(p.dtype for p in theirs.parameters())
    worst = 2 + (TERMS + 8) * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[dtype]
    for run in runs or (logits,):
        a, b = run(ours), run(theirs)
        assert a.isfinite().all() and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= worst * (b.double() - run(exact)).norm()


def layer_of(model: nn.Module) -> QuantizedLinear:
    return model.base_model.model.model.layers[0].self_attn.q_proj


# ---- the layer

LORA = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 32},
    "patterns": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 4}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [5, 6]},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": options.VeloraConfig()},
    "bdlora": {
        "use_bdlora": options.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    },
    "monteclora": {"monteclora_config": options.MontecloraConfig()},
}


@pytest.mark.parametrize("name", LORA)
def test_lora(name):
    """A setting of LoRA would compute or train something else on a quantized model than on the decoded one."""
    ours, theirs = pair(**LORA[name])
    assert [type(m) for m in ours.modules() if isinstance(m, peft.tuners.lora.Linear)] == [QuantizedLinear] * 4
    assert_same(ours, theirs, logits, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_b(dtype):
    """The trained bias of B would be left out, not scaled, or be merged in another dtype than the base's."""

    def make(dense):
        return base(dense, dtype, attention_bias=True)

    ours, theirs = pair(make, target_modules=["q_proj"], lora_bias=True)
    assert_same(ours, theirs, logits, gradients)
    for safe in (False, True):
        ours.merge_adapter(safe_merge=safe)
        theirs.merge_adapter(safe_merge=safe)
        assert layer_of(ours).base_layer.bias.dtype == dtype
        assert_same(ours, theirs)
        ours.unmerge_adapter()
        theirs.unmerge_adapter()


def test_conv1d():
    """GPT-2's layers, whose weights are [in, out], would be transposed, or be left to more steps."""
    ours, theirs = pair(gpt2, target_modules=["c_attn", "c_proj"])
    assert any(isinstance(m, QuantizedLinear) for m in ours.modules())
    assert_same(ours, theirs, logits, gradients)
    assert_same(ours.merge_and_unload(), theirs.merge_and_unload())


def test_dropout_in_training():
    """Dropout would be left out in training, or be another one than PEFT's, or stay on in eval."""
    ours, theirs = (model.train() for model in pair(lora_dropout=0.5))

    def seeded(model):
        torch.manual_seed(5)
        return logits(model)

    assert_same(ours, theirs, seeded)
    assert not torch.equal(logits(ours), logits(ours))
    assert torch.equal(logits(ours.eval()), logits(ours))


def test_adapters_are_one_product():
    """Each active adapter would take products of its own, which is what registering is to save."""

    def products(model, *active) -> int:
        model.base_model.set_adapter(list(active))
        with CalledOps() as called, torch.no_grad():
            layer_of(model)(torch.randn(3, 64))
        return sum("linear" in name or "mm" in name for name in called.names)

    ours, theirs = two(False), two(True)
    assert products(ours, "default") == products(ours, "default", "other") == 2  # with A, and with W and B
    assert products(theirs, "default", "other") > 2


def two(dense: bool) -> nn.Module:
    model = wrap(base(dense), lora(registered=not dense))
    model.add_adapter("other", lora(r=6, lora_alpha=3, registered=False))
    return stir(model).eval()


def test_several_adapters():
    """Active adapters would not add up, or scaling or switching them off would not reach our product."""
    ours, theirs = two(False), two(True)
    plain = logits(base())
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert_same(ours, theirs)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(0.5)
                module.set_scale("other", 3.0)
    assert_same(ours, theirs)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.unscale_layer()
    assert_same(ours, theirs)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), plain)
    assert not torch.equal(logits(ours), plain)


def test_mixed_batch():
    """Rows of a batch would get another row's adapter."""
    ours, theirs = two(False), two(True)
    names = ["other", "__base__", "default", "other"]
    inputs = {"input_ids": torch.cat([IDS, IDS.flip(0)]), "adapter_names": names}
    with torch.inference_mode():
        logits(ours, **inputs)
    assert_same(ours, theirs, lambda model: logits(model, **inputs))
    with pytest.raises(ValueError, match="adapter_names"):
        logits(ours, adapter_names=["other"])


def test_hooks_run():
    """A hook on the base layer, such as accelerate's, would be passed over."""
    model, seen = stir(wrap(base(), lora())), []
    expected = logits(model)
    layer_of(model).base_layer.register_forward_hook(lambda *arguments: seen.append(1))
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm() and seen


def test_compile():
    """torch.compile would break the graph at each layer."""
    model = stir(wrap(base(), lora()))
    layer, x = layer_of(model), torch.randn(3, 64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_variants_on_experts():
    """A stack of quantized experts in target_parameters would fail: there PEFT adds to the decoded weights."""
    transformers = pytest.importorskip("transformers")

    def mixtral(dense):
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
        model = lowbit.quantize_(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval())
        model.set_experts_implementation("eager")
        return lowbit.dequantize_(model) if dense else model

    ours, theirs = pair(mixtral, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    assert_same(ours, theirs, logits, gradients)


# ---- files


def test_adapters_of_dense_models_load(tmp_path):
    """An adapter that PEFT trained on a dense model would not load, or compute something else, and the reverse."""
    theirs = stir(wrap(base(dense=True), lora(registered=False)))
    theirs.save_pretrained(tmp_path)
    config = register(peft.LoraConfig.from_pretrained(tmp_path))
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        ours = peft.PeftModel.from_pretrained(base(), tmp_path, config=copy.deepcopy(config), **kwargs)
        assert isinstance(layer_of(ours), QuantizedLinear)
        assert_same(ours, theirs.eval())
    ours.save_pretrained(tmp_path / "again")
    back = peft.PeftModel.from_pretrained(base(dense=True), tmp_path / "again")
    assert torch.equal(logits(back), logits(theirs))


def test_adapters_of_bitsandbytes_models_load(tmp_path):
    """An adapter trained by bitsandbytes and PEFT would compute something else on our weights."""
    bnb = pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64, intermediate_size=128)
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, compute_dtype=torch.float32, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=new)
                setattr(parent, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    theirs = stir(wrap(model, lora()))  # registered: ours leaves bitsandbytes' layers to PEFT
    assert not any(isinstance(m, QuantizedLinear) for m in theirs.modules())
    theirs.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(base(), tmp_path, config=register(peft.LoraConfig.from_pretrained(tmp_path)))
    dense = peft.PeftModel.from_pretrained(base(dense=True), tmp_path)
    assert_same(ours, dense)
    exact = logits(copy.deepcopy(dense).double())
    error = (logits(dense).double() - exact).norm()
    y = logits(theirs.train())  # in eval mode bitsandbytes rounds activations and weights to bf16 on the CPU
    assert (y.double() - logits(ours).double()).norm() <= 2 * (2 + TERMS + 8) * error


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_ours(dtype, tmp_path):
    """PEFT's merge_and_unload would round otherwise than lowbit_lora's into='dense', or keep a weight in 4 bits."""
    stir(wrap(base(dtype=dtype), lora())).save_pretrained(tmp_path)
    config = register(peft.LoraConfig.from_pretrained(tmp_path))
    theirs = peft.PeftModel.from_pretrained(base(dtype=dtype), tmp_path, config=config).merge_and_unload()
    ours = lowbit_lora.LoraModel.from_pretrained(base(dtype=dtype), tmp_path).merge_and_unload()
    for one, other in zip(theirs.model.layers, ours.model.layers, strict=True):
        for a, b in ((one.self_attn.q_proj, other.self_attn.q_proj), (one.mlp.down_proj, other.mlp.down_proj)):
            assert type(a) is nn.Linear and not isinstance(a.weight, QuantizedTensor)
            assert a.weight.dtype == dtype and torch.equal(a.weight, b.weight)
    assert isinstance(theirs.model.layers[0].self_attn.k_proj.weight, QuantizedTensor)  # has no adapter


@pytest.mark.parametrize("registered", [True, False])
def test_modules_to_save_train_dense_copies(registered, tmp_path):
    """PEFT would stop at a quantized module that is to train, with adapters already on the model."""
    model = wrap(base(), lora(registered=registered, modules_to_save=["up_proj"]))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert_same(model, base(dense=True))
    assert gradients(stir(model)).isfinite().all()
    wrapper = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(wrapper.original_module.weight, QuantizedTensor)
    assert wrapper.modules_to_save["default"].weight.grad.any()
    model.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path, config=register(config) if registered else config)
    assert torch.equal(logits(again), logits(model))
    if registered:
        merged = model.merge_and_unload()
        dense = [n for n, p in merged.model.layers[0].named_parameters() if not isinstance(p, QuantizedTensor)]
        assert {"self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"} <= {*dense}
        lowbit.dequantize_(merged)
        assert not any(isinstance(p, QuantizedTensor) for p in merged.parameters())


def test_unmerging_puts_the_very_tensor_back():
    """Merging and unmerging would wear the base out, as adding and subtracting does."""
    model = two(False)
    weight = layer_of(model).base_layer.weight
    expected = logits(model)
    model.merge_adapter(adapter_names=["default"])
    assert not isinstance(layer_of(model).base_layer.weight, QuantizedTensor)
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()
    model.merge_adapter(adapter_names=["other"])  # on top
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model), logits(base()))
    model.unmerge_adapter()
    assert layer_of(model).base_layer.weight is weight
    assert torch.equal(logits(model), expected)


def test_variants_merge():
    """DoRA, whose change depends on the base's weight, would be merged into one that holds another adapter."""
    model = wrap(base(), lora())
    model.add_adapter("dora", lora(use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    expected = logits(stir(model))
    weight = layer_of(model).base_layer.weight
    model.merge_adapter()
    assert (logits(model) - expected).norm() <= 1e-4 * expected.norm()
    model.unmerge_adapter()
    assert layer_of(model).base_layer.weight is weight


def test_safe_merge_leaves_the_base():
    """A merge that is refused, for NaN or for what overflows in fp16, would leave half of it in the base."""
    model = stir(wrap(base(dtype=torch.float16), lora()))
    layer = layer_of(model)
    weight = layer.base_layer.weight
    for value in (torch.nan, 1e4):
        layer.lora_B["default"].weight.data.fill_(value)
        layer.lora_A["default"].weight.data.fill_(1e4)
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert layer.base_layer.weight is weight and not layer.merged


def test_merging_without_registering_says_what_to_call():
    """PEFT's own layer would write into the packed bytes, or fail without saying what to do."""
    expected = logits(model := stir(wrap(base(), lora(registered=False))))
    with pytest.raises(RuntimeError, match=r"written in place.*lowbit.dequantize_\(model\)"):
        copy.deepcopy(model).merge_and_unload()
    merged = lowbit.dequantize_(model).merge_and_unload()
    assert (logits(merged) - expected).norm() <= 1e-5 * expected.norm()


def test_tied_weights_in_four_bits_merge():
    """PEFT would compare the memory of a quantized head and its embedding, and fail when all else is merged."""
    model = base(tied=True)
    weight = nn.Parameter(lowbit.quantize(model.lm_head.weight.detach()), requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight = weight
    merged = wrap(model, lora()).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and logits(merged).isfinite().all()


# ---- what is refused


@pytest.mark.parametrize(
    "settings",
    [{"init_lora_weights": name} for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")]
    + [{"kasa_config": options.KasaConfig()}],
    ids=lambda settings: next(str(v) if isinstance(v, str) else "kasa" for v in settings.values()),
)
def test_starts_that_change_the_base_are_refused(settings):
    """A start that puts another weight into the base would decode it, or fail halfway."""
    config = lora(registered=False)
    for name, value in settings.items():
        setattr(config, name, value)  # PEFT's constructor wants scipy for LoftQ
    with pytest.raises(ValueError, match=r"leaves the base as it is.*QLoRAModel.*dequantize_"):
        register(config)
    model = wrap(base(), lora())
    with pytest.raises(ValueError, match="leaves the base as it is|KaSA cannot be combined"):
        model.add_adapter("other", config)
    assert logits(model).isfinite().all() and list(model.peft_config) == ["default"]


def test_other_configs_are_refused():
    """A config that does not know our layer would be taken, and do nothing."""
    for config in (peft.AdaLoraConfig(total_step=5), peft.IA3Config(), {"r": 8}):
        with pytest.raises(TypeError, match=r"peft.LoraConfig, got (AdaLoraConfig|IA3Config|dict)"):
            register(config)


WRAPPERS = {
    "lora": lambda model: peft.get_peft_model(model, lora(target_modules="all-linear")),
    "registered by name": lambda model: peft.get_peft_model(model, lora(target_modules=["embed_tokens", "q_proj"])),
    "ia3": lambda model: peft.get_peft_model(
        model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    ),
    "prompt tuning": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    ),
    "adaption prompt": lambda model: peft.get_peft_model(
        model, peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    ),
    "mixed": lambda model: peft.get_peft_model(model, lora(), mixed=True),
    "injected": lambda model: peft.inject_adapter_in_model(lora(), model),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("inner", [False, True], ids=["wrapper", "inner"])
def test_peft_on_our_model_is_refused(name, inner):
    """PEFT would wrap our layers' insides, where its adapters are never called, or stop in the middle."""
    dense = llama(hidden_size=64, intermediate_size=128)
    ours = lowbit_lora.QLoRAModel(dense, lowbit_lora.QLoRAConfig(rank=4, target_modules=TARGETS))
    model = ours.get_base_model() if inner else ours
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"PEFT's \w+ expects a model without adapters.*unload\(\).*register"):
        WRAPPERS[name](model)
    assert_untouched(model, before)
    wrap(lowbit.quantize_(ours.merge_and_unload()), lora())  # the way out


def test_our_model_on_peft_is_refused():
    """Our wrapper would put adapters onto PEFT's layers."""
    model = wrap(base(), lora())
    for target in (model, model.get_base_model()):
        before = snapshot(target)
        with pytest.raises(ValueError, match="got a PEFT model; merge or unload it first"):
            lowbit_lora.LoraModel(target, lowbit_lora.LoraConfig(rank=4, target_modules=TARGETS))
        assert_untouched(target, before)


def test_preparing_for_training_does_no_harm():
    """prepare_model_for_kbit_training would decode the base or change its bytes, or the model would not train then."""
    model = base(dtype=torch.bfloat16)
    packed = {name: p.packed.clone() for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    model = peft.prepare_model_for_kbit_training(model)
    parameters = dict(model.named_parameters())
    assert len(packed) == 14 and all(torch.equal(parameters[name].packed, value) for name, value in packed.items())
    assert not any(p.requires_grad for p in parameters.values())
    assert not hasattr(model, "is_loaded_in_4bit")  # PEFT and accelerate would import bitsandbytes
    model = stir(wrap(model, lora()))
    dense = lowbit.dequantize_(base(dtype=torch.bfloat16).float())
    assert_same(model, stir(wrap(dense, lora(registered=False))), logits, gradients)


# ---- everything else that PEFT has

LINEAR = {"target_modules": TARGETS}
ONE = {"target_modules": ["q_proj"]}
#: Method -> its settings.
METHODS = {
    "ADALORA": LINEAR | {"total_step": 10},
    "ADAMSS": ONE,
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": ONE,
    "BOFT": LINEAR | {"boft_block_size": 4},
    "C3A": ONE | {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [0, 1, 2, 3], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 2, 4]},
    "DEFT": LINEAR,
    "DELORA": LINEAR,
    "FOURIERFT": LINEAR | {"n_frequency": 10},
    "FROD": ONE,
    "GLORA": LINEAR,
    "GRALORA": ONE | {"r": 8},
    "HIRA": LINEAR,
    "HRA": LINEAR,
    "IA3": LINEAR | {"feedforward_modules": ["down_proj"]},
    "LILY": ONE,
    "LN_TUNING": {},
    "LOHA": LINEAR,
    "LOKR": LINEAR,
    "MISS": LINEAR,
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": LINEAR | {"r": 0, "oft_block_size": 4},
    "OSF": ONE,
    "PEANUT": ONE,
    "POLY": ONE | {"n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": ONE | {"r": 8},
    "PVERA": ONE,
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": ONE | {"r": 8},
    "ROAD": ONE | {"group_size": 32},
    "SHADOW": {},
    "SHIRA": ONE | {"r": 2},
    "SUPERTUNING": LINEAR,
    "TINYLORA": ONE,
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "UNILORA": ONE,
    "VBLORA": ONE | {"vector_length": 16, "num_vectors": 16, "topk": 2},
    "VERA": ONE,
    "WAVEFT": ONE | {"n_frequency": 10},
}
#: Those that lowbit refuses, in a forward: they add to the weight in place.
REFUSED = {"SHIRA"}


def test_every_method_is_here():
    """A new method of PEFT's would go untested."""
    assert {kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING} == METHODS.keys() | {"LORA", "XLORA"}


@pytest.mark.parametrize("name", METHODS)
def test_method(name, tmp_path):
    """A method of PEFT's would fail on a quantized model, train nothing, change the base, or not load again."""
    if name == "ADAMSS":
        pytest.importorskip("sklearn")
    inputs = {"task_ids": torch.tensor([0, 1])} if name in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    kind = peft.PeftType(name)

    def make(dense):
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **METHODS[name])
        return wrap(base(dense), config).eval()

    def run(model):
        return logits(model, **inputs)

    model = make(False)
    packed = {n: p.packed.clone() for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert packed
    if name in REFUSED:
        with pytest.raises(RuntimeError, match=r"written in place.*lowbit.dequantize_"):
            run(model)
        return
    stir(model)
    y = run(model)
    y.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        # The same arithmetic, but for products: norms, inverses and decompositions in between magnify their roundings.
        expected = run(stir(make(True)))
        assert (y - expected).norm() <= 1e-4 * expected.norm()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(run(loaded), y, rtol=1e-5, atol=1e-6)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n].packed, value) for n, value in packed.items())


def test_xlora(tmp_path):
    """X-LoRA, which weighs saved adapters, would fail on a quantized model or not come back from its file."""
    for name in "01":
        stir(wrap(base(), lora())).save_pretrained(tmp_path / name)
    settings = {"hidden_size": 64, "xlora_depth": 2, "task_type": "CAUSAL_LM"}
    config = peft.XLoraConfig(adapters={name: str(tmp_path / name) for name in "01"}, **settings)
    quantized, again = base(use_cache=False), base(use_cache=False)
    model = wrap(quantized, config)
    logits(model).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    # PEFT puts the whole base beside each adapter.
    with pytest.raises((RuntimeError, ctypes.ArgumentError), match="no memory of its own"):
        model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "both", selected_adapters=["default"])
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "both").eval()
    # Not equal: PEFT 0.21.2 takes the classifier's "layers.0" for a part of adapter "0", and leaves it out of the file.
    assert logits(loaded).isfinite().all()


def test_eva():
    """EVA, which looks at activations, would not find our layers."""
    model = wrap(
        base(), lora(target_modules=["q_proj"], init_lora_weights="eva", eva_config=options.EvaConfig(rho=1.0))
    )
    before = layer_of(model).lora_A["default"].weight.clone()
    data = [{"input_ids": torch.randint(50, (4, 16)), "attention_mask": torch.ones(4, 16).long()} for _ in range(2)]
    peft.initialize_lora_eva_weights(model, dataloader=data * 20, show_progress_bar=False)
    after = layer_of(model).lora_A["default"].weight
    assert not torch.equal(before, after) and logits(model).isfinite().all()


def test_arrow(tmp_path):
    """Arrow, which routes between saved adapters, would compute something else on a quantized model."""
    for name in "ab":
        stir(wrap(base(), lora())).save_pretrained(tmp_path / name)
    paths, config = [str(tmp_path / name) for name in "ab"], peft.ArrowConfig(top_k=1)
    ours, theirs = (
        peft.create_arrow_model(base_model=base(dense), task_specific_adapter_paths=paths, arrow_config=config).eval()
        for dense in (False, True)
    )
    assert_same(ours, theirs)
