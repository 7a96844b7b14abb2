"""transformers' models, torch's attention layers, PEFT and Trainer on quantized weights, against the decoded ones."""

import copy
import warnings

import pytest
import torch
from cases import UNIT_ROUNDOFF
from hf_models import IDS, SIZES
from torch import nn

import lowbit
from lowbit import QuantizedTensor, aten

transformers = pytest.importorskip("transformers")

#: The most terms that a product in these models has.
TERMS = 96


def build(name: str, /, **config) -> nn.Module:
    """The model class of that name, with random weights."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config)).eval()


def t5() -> nn.Module:
    """T5 in fp16 with the layers that transformers keeps in fp32."""
    model = build(
        "T5ForConditionalGeneration", vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    ).half()
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    return model


def clip() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "vocab_size")}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    text = sizes | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    return build("CLIPModel", text_config=text, vision_config=vision, projection_dim=64)


def whisper() -> nn.Module:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {f"{side}_{key}": v for side in ("encoder", "decoder") for key, v in (("layers", 1), ("ffn_dim", 96))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    lengths = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20}
    return build("WhisperForConditionalGeneration", vocab_size=64, d_model=64, **sizes, **heads, **lengths, **ends)


class Attention(nn.Module):
    """nn.MultiheadAttention on keys of another length than the queries, or on the queries."""

    def __init__(self, crossed: bool, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.crossed = nn.MultiheadAttention(64, 4, batch_first=True, **options), crossed

    def forward(self, x, other):
        other = other if self.crossed else x
        return self.attention(x, other, other)[0]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2).eval()


X = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MEL = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(2))
PADDED = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
MOE = {"num_experts_per_tok": 2}
#: name -> (the model, its inputs, how many weights it has to quantize)
MODELS = {
    "llama": (lambda: build("LlamaForCausalLM", **SIZES), {"input_ids": IDS}, 14),
    "bert": (lambda: build("BertModel", **SIZES), {"input_ids": IDS}, 13),
    "gpt2": (
        lambda: build("GPT2LMHeadModel", vocab_size=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
        {"input_ids": IDS},
        8,
    ),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, 32),
    "mamba": (
        lambda: build(
            "MambaForCausalLM", vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=64
        ),
        {"input_ids": IDS},
        8,
    ),
    "mixtral": (lambda: build("MixtralForCausalLM", **SIZES, **MOE, num_local_experts=4), {"input_ids": IDS}, 12),
    "qwen3 moe": (
        lambda: build("Qwen3MoeForCausalLM", **SIZES, **MOE, num_experts=4, moe_intermediate_size=64),
        {"input_ids": IDS},
        12,
    ),
    "gpt-oss": (
        lambda: build("GptOssForCausalLM", **SIZES, **MOE, head_dim=16, num_local_experts=4),
        {"input_ids": IDS},
        12,
    ),
    "vit": (lambda: build("ViTModel", **SIZES, image_size=16, patch_size=8), {"pixel_values": PIXELS}, 13),
    "whisper": (whisper, {"input_features": MEL, "decoder_input_ids": IDS}, 16),
    "clip": (clip, {"input_ids": IDS, "pixel_values": PIXELS}, 26),
    "encoder": (encoder, {"src": X}, 8),
    "encoder, causal": (encoder, {"src": X, "mask": torch.triu(torch.full((7, 7), -torch.inf), 1)}, 8),
    "encoder, padded": (encoder, {"src": X, "src_key_padding_mask": PADDED}, 8),
    "attention": (lambda: Attention(False).eval(), {"x": X, "other": X}, 2),
    "attention, crossed": (lambda: Attention(True).eval(), {"x": X, "other": X[:, :5]}, 2),
    "attention, sizes": (
        lambda: Attention(True, kdim=32, vdim=32).eval(),
        {"x": X, "other": X[:, :5, :32]},
        4,
    ),
}


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    """Every floating-point output, flattened into one tensor of float64."""
    with torch.no_grad():
        out = model(**inputs)
    if "src_key_padding_mask" in inputs:
        # The dense model's fast path writes zeros at the padding, its other path anything. Nobody reads the padding.
        out = out[~inputs["src_key_padding_mask"]]
    tensors = out.to_tuple() if hasattr(out, "to_tuple") else (out,)
    return torch.cat([t.flatten().double() for t in tensors if isinstance(t, torch.Tensor)])


def as_float64(model: nn.Module, inputs: dict) -> torch.Tensor:
    """The decoded model in float64, whose roundings do not count."""
    floating = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped_mm has no float64
    return outputs(model, floating)


def assert_same_model(quantized: nn.Module, dense: nn.Module, inputs: dict) -> None:
    """Assert that two models differ by no more than roundings.

    The effect of roundings is measured: it is the dense model's error against float64. A product errs by at most
    (terms + 8) roundings of fp32 and one of its dtype (``cases.product_tolerance``); the dense model's errs by at least
    one of each. The difference of the two models is at most the sum of their errors.
    """
    ours, theirs, exact = outputs(quantized, inputs), outputs(dense, inputs), as_float64(dense, inputs)
    dtype = next(p.dtype for p in quantized.parameters())
    worst = 2 + (TERMS + 8) * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[dtype]
    assert ours.isfinite().all()
    assert (ours - theirs).norm() <= worst * (theirs - exact).norm()


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """A model of this kind would write nonsense, fail, or decode its weights at every step."""
    make, inputs, count = MODELS[name]
    quantized = lowbit.quantize_(make())
    assert sum(isinstance(p, QuantizedTensor) for p in quantized.parameters()) == count
    dense = lowbit.dequantize_(copy.deepcopy(quantized))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decodes a quantized weight")
        aten._say_once.cache_clear()
        assert_same_model(quantized, dense, inputs)


def test_wo_of_t5_stays_in_fp32():
    """T5 in fp16 would overflow: this layer's product has to be in fp32, by the weight's dtype."""
    model = t5()
    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo
    with torch.no_grad():
        wo.weight.mul_(1e6)
    lowbit.quantize_(model)
    products = []
    wo.register_forward_hook(lambda module, arguments, y: products.append(y))
    states = model.encoder(IDS).last_hidden_state
    assert isinstance(wo.weight, QuantizedTensor) and wo.weight.dtype == torch.float32
    assert products[0].abs().max() > torch.finfo(torch.float16).max
    assert products[0].isfinite().all() and states.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache):
    """Generation would choose other tokens than the dense model."""
    quantized = lowbit.quantize_(MODELS["llama"][0]())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected = lowbit.dequantize_(copy.deepcopy(quantized)).generate(input_ids=IDS, **options)
    assert torch.equal(quantized.generate(input_ids=IDS, **options), expected)


def adapted() -> nn.Module:
    """PEFT's own LoRA on a quantized model."""
    peft = pytest.importorskip("peft")
    model = lowbit.quantize_(MODELS["llama"][0]())
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_peft(tmp_path):
    """PEFT would refuse the base, train nothing, or not load what it saved."""
    peft = pytest.importorskip("peft")
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer.weight, QuantizedTensor)
    base = layer.base_layer.weight.packed.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert torch.equal(layer.base_layer.weight.packed, base)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(lowbit.quantize_(MODELS["llama"][0]()), tmp_path)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, expected)
        with pytest.raises(RuntimeError, match=r"written in place.*lowbit.dequantize_"):
            copy.deepcopy(loaded).merge_and_unload()
        merged = lowbit.dequantize_(loaded).merge_and_unload()
        exact = copy.deepcopy(merged).double()(input_ids=IDS).logits
        error = (merged(input_ids=IDS).logits - exact).norm()
        assert (expected - exact).norm() <= (TERMS + 8) * error  # as in assert_same_model


class Sequences(torch.utils.data.Dataset):
    """A data set of eight sequences that count."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.arange(i, i + 8)
        return {"input_ids": ids, "labels": ids}


def test_trainer(tmp_path):
    """Trainer with bf16 and checkpointing would fail, save the base, or go on from another state than it saved."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        bf16=True,
        disable_tqdm=True,
    )

    def train(**options) -> dict:
        model = adapted()
        transformers.Trainer(model=model, args=arguments, train_dataset=Sequences()).train(**options)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    trained = train()
    assert any(value.any() for name, value in trained.items() if "lora_B" in name)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)


def test_save_pretrained(tmp_path):
    """transformers would write a quantized model as if it were dense."""
    with pytest.raises(RuntimeError, match=r"torch.save.*lowbit.files"):
        lowbit.quantize_(MODELS["llama"][0]()).save_pretrained(tmp_path)
