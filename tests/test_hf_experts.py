"""transformers' mixtures on quantized experts: the implementation "lowbit" for each class of its registry."""

import contextlib
import copy
import importlib
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
from cases import KERNELS, assert_within, kernels, product_tolerance, weight_error, weight_error_backward
from conftest_models import assert_as_precise
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.hf import experts

transformers = pytest.importorskip("transformers", minversion="5")
moe = importlib.import_module("transformers.integrations.moe")

EXPERTS = 6
IDS = torch.arange(14).reshape(2, 7)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def registered_classes() -> dict[str, str]:
    """class -> its module, of every mixture whose experts transformers calls through its registry."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(encoding="utf-8"), re.M):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


CLASSES = registered_classes()


def tiny_config(**options) -> types.SimpleNamespace:
    """All that a class of experts reads of its config, in the spelling of each."""
    config = dict.fromkeys(("hidden_size", "moe_hidden_size"), 64)
    config |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 32)
    config |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
    config |= dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu")
    config |= {"moe_latent_size": None, "post_norm_eps": 1e-5, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    config |= {"mlp_gate_softcap": 3.0, "mlp_up_softcap": 5.0, "_experts_implementation_internal": None}
    return TinyConfig(**config | options)


class TinyConfig(types.SimpleNamespace):
    """A config without anything else of transformers."""

    @property
    def _experts_implementation(self):
        return self._experts_implementation_internal


def quantized(kind: type[nn.Module], **options) -> nn.Module:
    """Random experts, stored in 4 bits."""
    torch.manual_seed(0)
    module = kind(tiny_config(**options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return lowbit.quantize_(module)


def decoded(module: nn.Module, way: str) -> nn.Module:
    """A copy with dense experts, computed in a way of transformers' own."""
    dense = lowbit.dequantize_(copy.deepcopy(module))
    return with_way(dense, way)


def with_way(module: nn.Module, way: str) -> nn.Module:
    module.config._experts_implementation_internal = way
    return module


@contextlib.contextmanager
def no_decoding(monkeypatch):
    """Context in which a stack of experts must not be decoded."""
    own = QuantizedTensor.dequantize
    with monkeypatch.context() as patched:
        patched.setattr(QuantizedTensor, "dequantize", lambda q, *a, **k: own(q, *a, **k) if q.dim() < 3 else 1 / 0)
        yield


def routing(tokens: int = 9, k: int = 3, experts: int = EXPERTS - 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts for each token, none of them the last one, and weights of these."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(tokens, experts, generator=generator).topk(k).indices
    return ids, torch.rand(tokens, k, generator=generator)


def results(module: nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The output and both gradients in one row, so that they are compared together, each in its own size."""
    dtype = next(p.dtype for p in module.parameters())
    x, weights = x.detach().to(dtype).requires_grad_(), weights.detach().to(dtype).requires_grad_()
    y = module(x, ids, weights)
    assert y.dtype == dtype and y.shape == x.shape
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = (y.detach(), *torch.autograd.grad(y, (x, weights), grad))
    return torch.cat([each.flatten() for each in found])


@pytest.mark.oldest
def test_every_class_of_the_registry_is_found():
    """A mixture that the search below overlooks would go untested."""
    wanted = {"MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "OlmoeExperts", "GptOssExperts"}
    assert wanted <= CLASSES.keys() and len(CLASSES) >= 32


@pytest.mark.parametrize("name", CLASSES)
def test_every_mixture(name, monkeypatch):
    """A layout, gate or norm of one class that is taken for another's gives a model that talks nonsense."""
    kind = getattr(importlib.import_module(CLASSES[name]), name)
    module = quantized(kind)
    stacks = [weight for weight in module.parameters() if isinstance(weight, QuantizedTensor)]
    assert len(stacks) == 2 and module.config._experts_implementation == "lowbit"
    x, (ids, weights) = torch.randn(9, 64), routing()
    with no_decoding(monkeypatch):
        ours = results(module, x, ids, weights)
    # The truth is "batched_mm" in fp64, since "eager" of one class computes in fp32 whatever it is given.
    exact = results(decoded(module, "batched_mm").double(), x, ids, weights)
    own = (results(decoded(module, "eager"), x, ids, weights) - exact).abs().max()
    assert own < 1e-5 * exact.abs().max()
    assert (ours - exact).abs().max() <= 4 * own


def toy_experts(**options) -> type[nn.Module]:
    """A class of experts, two products with nothing between them but ``seen``, where the hidden values are noted."""

    class NaiveMoe(nn.Module):  # as transformers 5.5 calls some: nothing in its name says experts
        def __init__(self, config):
            super().__init__()
            self.transposed = options.get("is_transposed", False)
            for name, sizes in (("up_proj", (32, 64)), ("down_proj", (64, 32))):
                sizes = sizes[::-1] if self.transposed else sizes
                self.register_parameter(name, nn.Parameter(torch.empty(EXPERTS, *sizes)))
            self.up_proj_bias = nn.Parameter(torch.empty(EXPERTS, 32))
            self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, 64))
            self.seen = []

        def act_fn(self, hidden):
            if hidden.requires_grad:
                hidden.retain_grad()
            self.seen.append(hidden)
            return hidden

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("not called")

    return moe.use_experts_implementation(NaiveMoe, has_gate=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_both_products(name, is_transposed, has_bias, dtype):
    """Tokens that meet another expert's matrix or bias, or products that are rounded twice, show in no whole model."""
    module = quantized(toy_experts(is_transposed=is_transposed, has_bias=has_bias)).to(dtype)
    ids, weights = torch.tensor([[4], [0], [2], [2], [0], [2], [5]]), torch.ones(7, 1, dtype=dtype)
    x = torch.randn(7, 64).to(dtype).requires_grad_()
    with kernels(name):
        y = module(x, ids, weights)
        grad = torch.randn(y.shape).to(dtype)
        y.backward(grad)
    (hidden,) = module.seen
    order = ids[:, 0].argsort(stable=True)  # the hidden values are sorted by expert

    def check(found, x, weight, transposed, bias=None):
        weight = weight.dequantize(torch.float32).double()[ids[order, 0]]
        weight = weight if transposed else weight.mT
        x = x.detach().double()
        exact, size = (torch.einsum("tk,tkn->tn", *each) for each in ((x, weight), (x.abs(), weight.abs())))
        if bias is not None:
            bias = bias.detach().double()[ids[order, 0]]
            exact, size = exact + bias, size + bias.abs()
        k = x.shape[1]
        of_weights = max(f(name, "nf4", dtype, m, k) for f in (weight_error, weight_error_backward) for m in (1, 7))
        tolerance = product_tolerance(size, exact, k, dtype, of_weights)
        if bias is not None and is_transposed:  # the product is rounded before the bias is added
            tolerance = tolerance + product_tolerance(size, exact - bias, k, dtype, of_weights)
        assert_within(found.detach(), exact, tolerance)

    bias = {"bias": module.up_proj_bias} if has_bias else {}
    check(hidden, x[order], module.up_proj, is_transposed, **bias)
    check(y[order], hidden, module.down_proj, is_transposed, **({"bias": module.down_proj_bias} if has_bias else {}))
    check(hidden.grad, grad[order], module.down_proj, not is_transposed)
    check(x.grad[order], hidden.grad, module.up_proj, not is_transposed)
    if has_bias:
        expected = torch.zeros(EXPERTS, 64, dtype=torch.float64).index_add(0, ids[:, 0], grad.double())
        torch.testing.assert_close(module.down_proj_bias.grad.double(), expected, rtol=2**-6, atol=1e-2)
        assert torch.equal(module.down_proj_bias.grad[1], torch.zeros(64, dtype=dtype))


ROUTES = {
    "no tokens": torch.zeros(0, 2, dtype=torch.long),
    "one token": torch.tensor([[5, 1]]),
    "all to one": torch.full((8, 1), 3),
    "twice to one": torch.tensor([[2, 2], [0, 2]]),
    "k is all": torch.arange(EXPERTS).repeat(4, 1),
    "int32": torch.tensor([[1, 0], [5, 4], [1, 4]], dtype=torch.int32),
    "strided": torch.tensor([[1, 0, 3], [5, 4, 2]]).T,
    "expert of another process": torch.tensor([[1, EXPERTS], [EXPERTS, EXPERTS], [5, 0]]),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_routes(name, route):
    """Batches in which experts have no tokens, or one has all, are common; their tokens would be another's, or lost."""
    module = quantized(getattr(importlib.import_module(CLASSES[name]), name))
    ids = ROUTES[route]
    weights, x = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)), torch.randn(len(ids), 64)
    ours = results(module, x, ids, weights)
    own = ids.long().clamp(max=EXPERTS - 1)
    of_none = decoded(module, "batched_mm").double()
    exact = results(of_none, x, own, weights.masked_fill(ids >= EXPERTS, 0))
    if ids.numel() and ids.max() >= EXPERTS:  # the weight of what adds nothing has no gradient
        exact[2 * x.numel() :].masked_fill_((ids >= EXPERTS).flatten(), 0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_nothing_is_read_from_the_device():
    """Each mixture of a model would wait for the GPU; on the meta device there is nothing to read."""
    module = quantized(toy_experts(is_transposed=True, has_bias=True)).to("meta")
    ids, weights = (each.to("meta") for each in routing())
    x = torch.empty(9, 64, device="meta", requires_grad=True)
    module(x, ids, weights).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_compile(name):
    """A compiled model would stop, or compute with the experts of the first batch."""
    module = quantized(getattr(importlib.import_module(CLASSES[name]), name))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for tokens in (9, 5):
        ids, weights = routing(tokens)
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(
            results(compiled, x, ids, weights), results(module, x, ids, weights), rtol=1e-5, atol=1e-5
        )


# ---- whole models

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"vocab_size": 50, "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
SIZES |= {"num_experts": 8, "num_local_experts": 8, "pad_token_id": 0, "eos_token_id": None}
DEEPSEEK = {"n_routed_experts": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MODELS = {
    "Mixtral": {},
    "Qwen2Moe": {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": {},
    "DeepseekV3": DEEPSEEK,
    "Olmoe": {},
    "GraniteMoe": {},
    "GptOss": {},
}


def causal_lm(name: str = "Mixtral") -> nn.Module:
    """A tiny model of transformers, random and dense, in eval mode."""
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                parameter.normal_(std=0.1)  # as they begin, the experts add too little to see
    return model


def logits_and_gradient(model: nn.Module) -> torch.Tensor:
    """The logits, and the gradient that reaches the first layer through all experts, scaled to be as large."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), embedded)
    return torch.cat([logits.detach().flatten(), gradient.flatten() * 100])


@pytest.mark.oldest
@pytest.mark.parametrize("name", MODELS)
def test_models(name, monkeypatch):
    """The model that is fine-tuned would not be the one that was quantized."""
    model = lowbit.quantize_(causal_lm(name))
    is_fused = any(kind.startswith(name) for kind in CLASSES)  # GraniteMoe is not in transformers 5.5
    assert model.config._experts_implementation == ("lowbit" if is_fused else "eager")
    with no_decoding(monkeypatch):
        ours = logits_and_gradient(model)
        generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    dense = lowbit.dequantize_(copy.deepcopy(model))
    assert_as_precise(ours, with_way(dense, "eager"), logits_and_gradient)
    assert torch.equal(generated, dense.generate(IDS, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_the_implementations_of_transformers_are_right_too(name, way):
    """What a user chose is kept: it must be slower at most."""
    model = lowbit.quantize_(causal_lm(name))
    model.set_experts_implementation(way)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that "batched_mm" decodes
        ours = logits_and_gradient(model)
    assert_as_precise(ours, with_way(lowbit.dequantize_(copy.deepcopy(model)), "eager"), logits_and_gradient)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_bf16_and_autocast(name):
    """A product that leaves the 16 bits of the model, or of autocast, costs memory, or fails in the next layer."""
    model = lowbit.quantize_(causal_lm(name).bfloat16())
    dense = with_way(lowbit.dequantize_(copy.deepcopy(model)), "eager")
    assert model(IDS).logits.dtype == torch.bfloat16
    assert_as_precise(logits_and_gradient(model), dense, logits_and_gradient)
    mixture, dense = (each.float().model.layers[0].mlp.experts for each in (model, dense))
    ids, weights = routing(experts=8)
    x, inputs = torch.randn(9, 64), []
    mixture.down_proj_hook = mixture._apply_gate
    mixture._apply_gate = lambda hidden: inputs.append(hidden) or mixture.down_proj_hook(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixture(x, ids, weights)
    assert inputs[0].dtype == torch.bfloat16 and y.dtype == torch.float32
    exact = dense.double()(x.double(), ids, weights.double())
    assert (y - exact).norm() < 3 * 2**-8 * exact.norm()


def test_checkpointing():
    """What is recomputed in the backward would differ from the forward: the order of rows, or the implementation."""
    found = []
    for checkpointing in (False, True):
        options = {"target_modules": ["q_proj"], "target_parameters": STACKS}
        model = QLoRAModel(causal_lm(), QLoRAConfig(rank=4, gradient_checkpointing=checkpointing, **options))
        model.train()
        torch.manual_seed(1)
        for parameter in model.trainable_parameters():
            nn.init.normal_(parameter, std=0.1)
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.trainable_parameters()])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed) and plain.abs().max() > 0


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_adapters_of_peft(name):
    """PEFT puts the dense sum of an expert and its adapter in the place of the stack, which we do not multiply by."""
    peft = pytest.importorskip("peft")
    model = lowbit.quantize_(causal_lm(name))
    dense = lowbit.dequantize_(copy.deepcopy(model))
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=STACKS, init_lora_weights=False)
    adapted = []
    for base in (model, dense):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(base, config).eval())
    ours, theirs = (each(IDS).logits for each in adapted)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    pairs = zip(*(each.named_parameters() for each in adapted), strict=True)
    trained = [(key, mine.grad, other.grad) for (key, mine), (_, other) in pairs if mine.requires_grad]
    assert len(trained) == 8
    for key, mine, other in trained:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6, msg=key)


# ---- the choice


@pytest.mark.oldest
def test_the_choice(monkeypatch):
    """A quantized mixture would go on in a way that decodes it for each token, or a user's own choice be overruled."""
    model = causal_lm()
    assert model.config._experts_implementation == "grouped_mm"
    assert LoraModel(model, LoraConfig(rank=2)).config._experts_implementation == "grouped_mm"
    model = QLoRAModel(causal_lm(), QLoRAConfig(rank=2))
    assert model.config._experts_implementation == "lowbit"
    again = type(model.get_base_model())(copy.deepcopy(causal_lm().config))
    assert experts.use(again).config._experts_implementation == "grouped_mm"
    assert model.merge_and_unload().config._experts_implementation == "grouped_mm"
    for way in ("eager", "batched_mm"):
        chosen = causal_lm()
        chosen.set_experts_implementation(way)
        assert lowbit.quantize_(chosen).config._experts_implementation == way
        assert lowbit.dequantize_(chosen).config._experts_implementation == way
    chosen = causal_lm()
    chosen.config._experts_implementation_internal = "deepgemm"
    with pytest.warns(UserWarning, match="experts_implementation: 'deepgemm' reads dense weights from memory"):
        lowbit.quantize_(chosen)
    assert chosen.config._experts_implementation == "lowbit" and chosen(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_some_experts_stay_dense(name):
    """The config chooses for all layers: those whose experts are left out of quantization would fail."""
    model = lowbit.quantize_(causal_lm(), skip=["layers.0.mlp.experts"])
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert type(first.down_proj) is nn.Parameter and isinstance(second.down_proj, QuantizedTensor)
    assert model.config._experts_implementation == "lowbit"
    setattr(second, name, nn.Parameter(getattr(second, name).dequantize()))  # and where only one of two is quantized
    dense = with_way(lowbit.dequantize_(copy.deepcopy(model)), "eager")
    assert_as_precise(logits_and_gradient(model), dense, logits_and_gradient)


def test_configs_inside_of_others():
    """A model of images and text has its mixture in a part, whose config is its own."""
    kind = transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextExperts
    outer = nn.Module()
    outer.config, outer.language = tiny_config(), kind(tiny_config())
    other = nn.Module()
    other.config, outer.vision = outer.config, other
    with torch.no_grad():
        for parameter in outer.parameters():
            parameter.normal_()
    lowbit.quantize_(outer)
    assert (outer.config._experts_implementation, outer.language.config._experts_implementation) == (None, "lowbit")
