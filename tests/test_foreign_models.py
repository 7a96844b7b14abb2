"""Models whose code does more with a layer than call it, with the faults that users of such libraries reported."""

import copy
import itertools
import warnings

import pytest
import torch
from conftest_models import IDS, assert_as_precise, randomize
from torch import nn

from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

KINDS = [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)]
kinds = pytest.mark.parametrize(("model_type", "config_type"), KINDS, ids=["lora", "qlora"])
ENCODER_LINEARS = ("linear1", "linear2")


def tiny(family: str, **settings):
    """A random model of a transformers family, in eval mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    if family == "T5":
        sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{family}Config")(**(sizes | settings))
    ending = {"T5": "EncoderModel"}.get(family, "ForCausalLM")
    return getattr(transformers, family + ending)(config).eval()


def first_output(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids)[0]


@kinds
@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba", "T5"])
def test_a_layer_whose_weight_is_read_past_its_forward(model_type, config_type, family):
    """Mamba multiplies by dt_proj.weight itself: each adapter must have an effect and a gradient."""
    extra = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if family == "Mamba2" else {}
    model = tiny(family, **extra)
    targets = "all-linear"
    if model_type is QLoRAModel and family != "T5":
        # Mamba's fused kernels, which run if mamba_ssm is installed, read these weights from memory.
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"mixer\.(dt|x|out)_proj.*target_modules=\['in_proj'\]"):
            model_type(model, config_type(target_modules=targets))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        targets = ["in_proj"]
    wrapped = randomize(model_type(model, config_type(target_modules=targets)))
    output = wrapped(input_ids=IDS)[0]
    gradients = torch.autograd.grad(output.square().sum(), wrapped.trainable_parameters(), allow_unused=True)
    idle = [n for n, g in zip(trained_names(wrapped), gradients, strict=True) if g is None or not g.any()]
    assert not idle
    assert_as_precise(output.detach(), wrapped.merge_and_unload(), first_output)


def trained_names(wrapped):
    return [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]


def test_one_layer_in_another_precision():
    """T5 in fp16 keeps wo in fp32, for its products exceed 65504; a 4-bit wo has to compute in fp32 too."""
    model = tiny("T5", feed_forward_proj="gated-gelu")
    gated = model.encoder.block[0].layer[1].DenseReluDense
    with torch.no_grad():
        for layer, std in ((gated.wi_0, 0.5), (gated.wi_1, 0.5), (gated.wo, 600.0)):
            layer.weight.normal_(std=std)
    model.half()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()  # as T5PreTrainedModel._keep_in_fp32_modules leaves it
    wrapped, outputs = QLoRAModel(model, QLoRAConfig()), []
    wo = wrapped.get_base_model().encoder.block[0].layer[1].DenseReluDense.wo
    handle = wo.register_forward_hook(lambda module, args, y: outputs.append(y))
    y = first_output(wrapped)
    handle.remove()
    assert outputs[0].dtype == torch.float32 and outputs[0].isfinite().all()
    assert outputs[0].abs().max() > torch.finfo(torch.float16).max  # or the test shows nothing
    merged = wrapped.merge_and_unload()
    assert merged.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert_as_precise(y, merged, first_output)


@kinds
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda model: model.to(torch.bfloat16)])
def test_casting_a_model_with_one_layer_in_another_precision(model_type, config_type, cast):
    """A cast of the wrapped model gives what merging after a cast gives; the layer put back to fp32 stays there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    wrapped = randomize(model_type(model, config_type(target_modules=["0", "1"])))
    cast(wrapped)
    model[1].float()
    dtypes = [model[i].weight.dtype for i in (0, 1)]
    assert dtypes[0] != dtypes[1] == torch.float32 and model[1].base_layer.weight.dtype == torch.float32
    x = torch.randn(3, 64)
    outputs = [layer(x.to(layer.weight.dtype)).detach() for layer in model[:2]]
    merged = wrapped.merge_and_unload()
    for layer, y, dtype in zip(merged[:2], outputs, dtypes, strict=True):
        assert layer.weight.dtype == y.dtype == dtype
        low = x.to(dtype)
        assert_as_precise(y, layer, lambda layer, x=low: layer(x.to(layer.weight.dtype)).detach())


@kinds
@pytest.mark.parametrize("targets", [c for n in (1, 2) for c in itertools.combinations(ENCODER_LINEARS, n)])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_layers_do_not_bypass_lora(model_type, config_type, targets, masked):
    """In eval mode they read the weights of linear1 and linear2 themselves: LoRA would be skipped unseen."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def run(model):
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(model.layers[0].norm1.weight.dtype)
        with torch.no_grad():
            y = model(x, src_key_padding_mask=padding if masked else None)
        return y.masked_fill(padding[..., None], 0) if masked else y

    # LoRA in the last layer alone, too: the stack decides by its first layer.
    for names in (list(targets), [f"layers.1.{name}" for name in targets]):
        wrapped = randomize(model_type(copy.deepcopy(model), config_type(target_modules=names)))
        evaluated, trained = run_both(wrapped, run)
        merged = wrapped.merge_and_unload()
        assert merged.use_nested_tensor == model.use_nested_tensor
        for output in (evaluated, trained):
            assert_as_precise(output, merged.train(), run)


def run_both(wrapped, run):
    model = wrapped.get_base_model()
    return run(model.eval()), run(model.train())


def test_multihead_attention_reads_its_projections():
    """The 4-bit base would be wrong, or LoRA on out_proj, whose forward never runs, would be accepted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), nn.Linear(32, 2)).eval()
    wrapped = randomize(QLoRAModel(model, QLoRAConfig()))
    attention = model[0].self_attn
    assert isinstance(attention.in_proj_weight, QuantizedTensor)
    assert isinstance(attention.out_proj.weight, QuantizedTensor)
    x = torch.randn(2, 5, 32)

    def run(model):
        with torch.no_grad():
            return model(x.to(model[1].weight.dtype))

    y = run(model)
    merged = wrapped.merge_and_unload()
    assert_as_precise(y, merged, run)
    with pytest.raises(TypeError, match="out_proj.*NonDynamicallyQuantizableLinear"):
        LoraModel(merged, LoraConfig(target_modules=["out_proj"]))


class ByKeyword(nn.Module):
    """Calls its layers by the name of nn.Linear's argument."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 2)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(input=self.down(input=self.up(input=x).relu()))


@kinds
@pytest.mark.parametrize("targets", [["up"], ["up", "down"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_called_by_keyword(model_type, config_type, targets, dtype, monkeypatch):
    """A replaced layer, LoRA's or a frozen 16-bit head, must not rename the argument of what it replaces."""
    from lowbit.ops import dense

    monkeypatch.setattr(dense, "_slow_in_16_bits", lambda: True)
    model, x = ByKeyword().to(dtype), torch.randn(40, 32).to(dtype)
    wrapped = model_type(model, config_type(target_modules=targets))
    assert wrapped(x).shape == (40, 2)
    wrapped(x).float().sum().backward()


def test_no_warning_of_decoding():
    """A wrapped model would train or predict through slow decoding, which warns."""
    from lowbit import aten

    aten._say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        wrapped = QLoRAModel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), QLoRAConfig(target_modules=["0"]))
        wrapped(torch.randn(3, 64)).sum().backward()
        wrapped.count_parameters()
        wrapped.memory_footprint()
        copy.deepcopy(wrapped).to(torch.bfloat16)
        wrapped.load_state_dict(wrapped.state_dict())
        wrapped.merge_and_unload()


@pytest.mark.parametrize(("wrapper", "config"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])
def test_accelerates_hooks_go_on(wrapper, config):
    """With a model on several devices they move a layer's input to its weight; skipped, the product fails."""
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Note(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append("before")
            return args, kwargs

        def post_forward(self, module, output):
            return 2 * output

    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
    x = torch.randn(3, 64)
    hooks.add_hook_to_module(base[0], Note())
    expected = base(x)
    seen.clear()
    wrapped = wrapper(base, config(target_modules=["0"]))
    torch.testing.assert_close(wrapped(x), expected, rtol=0.5, atol=0.5)
    assert seen == ["before"]
    merged = wrapped.merge_and_unload()
    merged(x)
    assert seen == ["before", "before"]


@pytest.mark.parametrize(("wrapper", "config"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])
def test_weights_that_are_elsewhere_are_refused(wrapper, config):
    """accelerate's offloading keeps a weight on meta until the layer is called: LoRA would be on nothing."""
    hooks = pytest.importorskip("accelerate.hooks")
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    hooks.add_hook_to_module(base[0], hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ValueError, match="'0' elsewhere"):
        wrapper(base, config(target_modules=["0"]))


def test_attributes_of_a_replaced_module_go_along():
    """Code that asks a layer for its sizes, or for what it has put there, would fail."""
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.Linear(4, 4))
    base[0].note, base[1].note = "conv", "linear"
    model = LoraModel(base, LoraConfig(target_modules=["0"], modules_to_save=["1"])).get_base_model()
    assert model[0].note == "conv" and model[0].stride == (2, 2) and model[0].kernel_size == (3, 3)
    assert model[1].note == "linear" and model[1].in_features == 4
    assert not hasattr(model[0], "another")
