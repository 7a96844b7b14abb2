"""LowbitConfig in transformers: loading, saving and loading again, and what is refused."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from hf_models import GPT2, IDS, MIXTRAL, SIZES, assert_same, assert_same_tensor, load, save_dense, stored
from safetensors.torch import load_file, save_file
from small_disk import small_disk
from torch import nn

import lowbit
from lowbit import WeightSpec
from lowbit_lora import LowbitConfig, QLoRAConfig, QLoRAModel

transformers = pytest.importorskip("transformers")
SPECS = [{}, {"format": "fp4", "double_quant": False, "block_size": 32}, {"format": "int8"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_dense(tmp_path_factory.mktemp("llama"), shards="60KB")


@pytest.fixture(scope="module")
def quantized(llama, tmp_path_factory) -> Path:
    """The same model, quantized, in several files."""
    folder = tmp_path_factory.mktemp("quantized")
    load(llama, quantization_config=LowbitConfig()).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


# ---- the config


@pytest.mark.parametrize("options", [*SPECS, {"scale": "search", "modules_to_not_convert": ["lm_head"]}])
def test_config_round_trip(options):
    """A folder would be read by another config than it was written with."""
    config = LowbitConfig(**options, quantize_head=True)
    assert LowbitConfig.from_dict(json.loads(config.to_json_string())) == config
    assert config.to_dict()["format_version"] == 1 and config.quant_method == "lowbit"
    assert config != LowbitConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "nf5"}, ValueError, "format: expected one of nf4, fp4, int8, got 'nf5'"),
        ({"block_size": 48}, ValueError, "block_size: expected a power of two"),
        ({"scale": "best"}, ValueError, "scale: expected 'absmax' or 'search'"),
        ({"format": "int8", "scale": "search"}, ValueError, "scale: expected 'absmax'"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "modules_to_not_convert: expected"),
        ({"quantize_head": 1}, TypeError, "quantize_head: expected True or False"),
        ({"quant_method": "bitsandbytes"}, ValueError, "quant_method: expected 'lowbit', got 'bitsandbytes'"),
        ({"format_version": 2}, ValueError, "format_version: expected at most 1, got 2.*update lowbit"),
        ({"blocksize": 64}, ValueError, "expected keys among .*block_size.*, got blocksize"),
    ],
)
def test_config_is_checked(options, error, message):
    """A mistake would be found once a large model has been loaded, or never."""
    with pytest.raises(error, match=message):
        LowbitConfig.from_dict({"quant_method": "lowbit"} | options)


# ---- loading


@pytest.mark.oldest
@pytest.mark.parametrize("options", [*SPECS, {"scale": "search"}])
def test_loaded_as_quantized(llama, options):
    """Weights would be others than those that quantize_ makes, or norms and heads would be quantized too."""
    model = load(llama, quantization_config=LowbitConfig(**options), dtype=torch.bfloat16)
    dense = load(llama, dtype=torch.bfloat16)
    spec = WeightSpec(**{key: value for key, value in options.items() if key != "scale"})
    assert_same(model, lowbit.quantize_(dense, spec, scale=options.get("scale", "absmax")))
    assert len(stored(model)) == 14 and not any(p.requires_grad for p in stored(model).values())
    assert model.model.norm.weight.requires_grad
    assert not getattr(model, "is_loaded_in_4bit", False)  # transformers and accelerate would import bitsandbytes
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("options", "tied", "quantized"),
    [
        ({"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}, False, 13),
        ({"modules_to_not_convert": ["o_proj", "model.layers.1"]}, False, 6),
        ({"modules_to_not_convert": [r".*layers\.\d+\.mlp\..*_proj"]}, False, 8),
        ({"quantize_head": True}, False, 15),
        ({"quantize_embeddings": True}, False, 15),
        ({"quantize_head": True}, True, 14),
        ({"quantize_head": True, "quantize_embeddings": True}, True, 15),
    ],
)
def test_what_is_quantized(tmp_path, options, tied, quantized):
    """A choice of modules would be passed over, or mean others than it does for other methods."""
    folder = save_dense(tmp_path, **SIZES, tie_word_embeddings=tied)
    model = load(folder, quantization_config=LowbitConfig(**options))
    assert len(stored(model)) == quantized
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def test_a_name_that_matches_nothing_is_told(llama):
    """A misspelt module would be quantized without a word."""
    with pytest.warns(UserWarning, match="modules_to_not_convert: 'up_prj' matches no module"):
        load(llama, quantization_config=LowbitConfig(modules_to_not_convert=["up_prj"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(llama, quantized, dtype):
    """The model would compute in another dtype than it was asked to."""
    for model in (load(llama, quantization_config=LowbitConfig(), dtype=dtype), load(quantized, dtype=dtype)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(IDS).logits.dtype == dtype


@pytest.mark.oldest
def test_modules_in_fp32_stay(tmp_path):
    """T5's outputs would overflow: it keeps these layers in fp32 where the others are in fp16."""
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    folder = save_dense(tmp_path, "T5ForConditionalGeneration", torch.float16, **sizes)
    model = load(folder, "AutoModelForSeq2SeqLM", quantization_config=LowbitConfig(), dtype=torch.float16)
    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo.weight
    assert type(wo) is nn.Parameter and wo.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved", "AutoModelForSeq2SeqLM"), model)


@pytest.mark.oldest
@pytest.mark.parametrize("options", SPECS)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_stacks_of_experts(tmp_path, name, options):
    """The experts, which are most of such a model, would stay dense, or be merged after they are quantized."""
    sizes = MIXTRAL if name == "Mixtral" else SIZES | {"num_experts": 4, "moe_intermediate_size": 96}
    folder = save_dense(tmp_path, f"{name}ForCausalLM", **sizes)
    keys = load_file(folder / "model.safetensors")
    assert any(".experts.3." in key for key in keys), "the checkpoint should have each expert by itself"
    model, dense = load(folder, quantization_config=LowbitConfig(**options)), load(folder)
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    merged = dense.model.layers[1].mlp.experts.gate_up_proj
    expected = lowbit.quantize(merged, **options)
    assert_same_tensor(stack.detach(), expected, "gate_up_proj")
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


@pytest.mark.oldest
@pytest.mark.parametrize("options", SPECS)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_saved_and_loaded(llama, tmp_path, options, shards):
    """A folder that was saved would load as another model, or with keys left over."""
    model = load(llama, quantization_config=LowbitConfig(**options))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards == "20KB")
    again = load(tmp_path)
    assert_same(again, model)
    assert again.config.quantization_config == model.config.quantization_config
    again.save_pretrained(tmp_path)  # over the files that it was loaded from
    assert_same(load(tmp_path), model)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not list(tmp_path.glob("*index*"))


@pytest.mark.oldest
def test_bases_of_models_with_heads(llama, quantized, tmp_path):
    """A base model could not be loaded from a quantized model with a head, whose names begin otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModel.from_pretrained(quantized)
    assert_same(base, load(quantized).model)
    base.save_pretrained(tmp_path)
    assert_same(load(tmp_path, "AutoModel"), base)


@pytest.mark.oldest
def test_conv1d(tmp_path):
    """GPT-2's layers hold their weights the other way round."""
    folder = save_dense(tmp_path, "GPT2LMHeadModel", **GPT2)
    model = load(folder, quantization_config=LowbitConfig())
    assert len(stored(model)) == 8
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def test_peak_memory(llama, tmp_path):
    """A model would be dense in memory before it is quantized: one that just fits in 4 bits could not be loaded.

    File pages do not count: the kernel takes them back when it needs them.
    """
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    # In fp32, so that each weight is copied when it is read; one in the model's own dtype is a view of the file.
    folder = save_dense(tmp_path, dtype=torch.float32, shards="20MB", **sizes)
    assert len(list(folder.glob("*.safetensors"))) > 5
    largest = 512 * 1536 * 2
    program = Path(__file__).with_name("loading_peak.py")
    printed = subprocess.run(
        [sys.executable, program, folder, llama], check=True, capture_output=True, text=True
    ).stdout
    measured = json.loads(printed)
    (above, needed), (above_dense, dense) = measured["4 bits"], measured["dense"]
    assert needed < 0.3 * dense and above_dense >= dense
    # The largest weight, its copy in bf16 and its codes; 4 MB for what is not weights.
    assert needed <= above < needed + 3 * largest + 2**22


def test_plans_of_devices(llama):
    """device_map="auto" would plan with dense sizes, and leave devices empty."""
    pytest.importorskip("accelerate")
    model = load(llama, quantization_config=LowbitConfig(), device_map="auto", max_memory={"cpu": "1GB"})
    assert model.device.type == "cpu" and len(stored(model)) == 14
    weight = model.model.layers[0].mlp.up_proj.weight
    name = "model.layers.0.mlp.up_proj.weight"
    dense = torch.empty(weight.shape, dtype=torch.bfloat16)
    assert model.hf_quantizer.param_element_size(model, name, dense) == weight.nbytes / weight.numel()
    assert model.hf_quantizer.param_element_size(model, "model.norm.weight", dense) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_several_devices(tmp_path, tied):
    """accelerate spreads a model over devices while it is loaded, and asks each weight for its pointer."""
    accelerate = pytest.importorskip("accelerate")
    folder = save_dense(tmp_path, **SIZES, tie_word_embeddings=tied)
    config = LowbitConfig(quantize_head=tied, quantize_embeddings=tied)
    model, plain = load(folder, quantization_config=config), load(folder, quantization_config=config)
    devices = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert_same(model, plain)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_accelerate_offloads_afterwards(quantized):
    """A model that was offloaded by hand would lose its weights, or decode them each time they come back."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = load(quantized), load(quantized)
    accelerate.cpu_offload(model, "cpu")
    assert all(weight.is_meta for weight in stored(model).values()) and len(stored(model)) == 14
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("devices", [{"": "disk"}, {"model": 0, "lm_head": "cpu"}])
def test_offloading_is_refused(llama, devices):
    """accelerate would fail in the middle of loading, without a word on why."""
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="device_map: expected every weight .* lowbit does not offload"):
        load(llama, quantization_config=LowbitConfig(), device_map=devices)


# ---- afterwards


@pytest.mark.oldest
def test_dequantize(quantized, tmp_path):
    """The model would keep claiming to be quantized, and its folder could not be loaded."""
    model = load(quantized)
    decoded = {name: weight.dequantize() for name, weight in stored(model).items()}
    model.dequantize()
    assert not stored(model) and not model.is_quantized
    for name, weight in decoded.items():
        assert torch.equal(model.get_parameter(name), weight)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(load(tmp_path), model)
    assert load(quantized).dequantize(dtype=torch.float32).model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_copies(quantized, tmp_path):
    """A copy would save the original's weights; a deleted model would stay in memory."""
    model = load(quantized)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.model.norm.weight.fill_(3)
        other.save_pretrained(tmp_path)
        assert load(tmp_path).model.norm.weight.eq(3).all()
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_generate(quantized):
    """Generation asks the quantizer whether the model compiles."""
    assert load(quantized).generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 10)


def test_trainer_takes_it(quantized, tmp_path):
    """Trainer refuses quantized models that neither PEFT has wrapped nor say that they can train."""
    pytest.importorskip("accelerate")
    options = transformers.TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True)
    for model in (load(quantized), QLoRAModel(load(quantized), QLoRAConfig(rank=4, target_modules=["q_proj"]))):
        transformers.Trainer(model=model, args=options)


@pytest.mark.oldest
def test_qlora_on_top(llama, tmp_path):
    """The base would be quantized again, also where it was to stay dense, or a merged model would claim to be so."""
    base = load(llama, quantization_config=LowbitConfig("fp4", modules_to_not_convert=["down_proj"]))
    before = {name: weight.packed.clone() for name, weight in stored(base).items()}
    model = QLoRAModel(base, QLoRAConfig(rank=4, target_modules="all-linear", lora_dropout=0.0))
    assert len(stored(model)) == len(before) == 12
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.sub_(0.1 * p.grad)
    model.save_pretrained(tmp_path / "adapter")
    other = load(llama, quantization_config=LowbitConfig("fp4", modules_to_not_convert=["down_proj"]))
    again = QLoRAModel.from_pretrained(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    for name, packed in before.items():
        assert torch.equal(base.get_parameter(name.replace("_proj.", "_proj.base_layer.")).packed, packed)
    merged = model.merge_and_unload()
    assert not merged.is_quantized
    merged.save_pretrained(tmp_path / "merged")
    assert_same(load(tmp_path / "merged"), merged)


def test_unloaded_base_saves(llama, quantized, tmp_path):
    """A base that was adapted could not be saved in 4 bits again."""
    model = QLoRAModel(load(quantized), QLoRAConfig(rank=4, target_modules=["q_proj"]))
    model.unload().save_pretrained(tmp_path)
    assert_same(load(tmp_path), load(quantized))


def test_decomposing_needs_dense_weights(quantized):
    """PiSSA would take factors out of weights that have lost them."""
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa' changes dense weights"):
        QLoRAModel(load(quantized), QLoRAConfig(rank=4, target_modules=["q_proj"], init_lora_weights="pissa"))


def test_unloaded_bases_are_refused(quantized):
    """LoRA would be on weights that are not there."""
    partly = load(quantized)
    partly.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' is on the meta device"):
        QLoRAModel(partly, QLoRAConfig(target_modules=["q_proj"]))
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is on the meta device"):
        QLoRAModel(empty, QLoRAConfig(target_modules=["q_proj"]))
    with torch.device("meta"):
        assert QLoRAModel(empty, QLoRAConfig(target_modules=["q_proj"])).count_parameters()[0] > 0


def test_foreign_quantized_bases_are_refused(llama):
    """Another library's weights would be taken for dense ones."""
    model = load(llama)
    model.is_quantized, model.quantization_method = True, "gptq"
    with pytest.raises(ValueError, match="lowbit's own, got a model that gptq has quantized already"):
        QLoRAModel(model, QLoRAConfig(target_modules=["q_proj"]))


# ---- bad input


@pytest.fixture
def damaged(quantized, tmp_path) -> Path:
    """A copy of the quantized folder, to be damaged."""
    for path in quantized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_config(folder: Path, **entries) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= entries
    path.write_text(json.dumps(config))


def test_a_truncated_file_is_named(damaged):
    """A download that broke off would be decoded to noise, or fail without the name of the file."""
    path = sorted(damaged.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(OSError, match=rf"{path.name}: expected a whole file, but it is truncated or corrupt"):
        load(damaged)


@pytest.mark.oldest
def test_a_missing_file_is_named(damaged):
    """A file that was not copied would leave random weights."""
    path = sorted(damaged.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        load(damaged)


@pytest.mark.oldest
def test_a_damaged_weight_is_named(damaged):
    """A weight without its scales would be initialised anew, with a warning."""
    files = ((path, load_file(path)) for path in damaged.glob("*.safetensors"))
    path, tensors, key = next((p, t, key) for p, t in files for key in t if key.endswith(".quant_map"))
    save_file(tensors | {key: torch.zeros(16)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key.removesuffix('.quant_map')}: .*expected the standard table"):
        load(damaged)


def test_a_newer_folder_is_refused(damaged):
    """Its weights would be read by rules that they were not written by."""
    change_config(damaged, format_version=2, better=True)
    with pytest.raises(ValueError, match="format_version: expected at most 1, got 2.*update lowbit"):
        load(damaged)


def test_an_unknown_method_is_refused():
    """The folder would be loaded as a dense one."""
    with pytest.raises(ValueError, match="lowbitt"):
        transformers.quantizers.AutoQuantizationConfig.from_dict({"quant_method": "lowbitt"})


@pytest.mark.oldest
def test_quantizing_twice(damaged, quantized):
    """A weight would be quantized a second time, and lose more."""
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(damaged, quantization_config=LowbitConfig("int8"))
    assert_same(model, load(quantized))
    with pytest.raises(ValueError, match="quantized with LowbitConfig but you are passing a"):
        load(damaged, quantization_config=transformers.AqlmConfig())
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a dense model, but 'model.layers.*weight' is quantized in"):
        load(damaged, quantization_config=LowbitConfig())


def test_a_dense_folder_that_claims_to_be_quantized(llama, tmp_path):
    """Every weight would be dense, and the model four times as large as planned."""
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": LowbitConfig().to_dict()}))
    with pytest.raises(ValueError, match="expected safetensors files with quantized weights"):
        load(tmp_path)


def test_nothing_to_quantize(llama):
    """The user would believe that the model is small."""
    with pytest.raises(ValueError, match=r"expected linear layers to quantize, got none in LlamaForCausalLM outside"):
        load(llama, quantization_config=LowbitConfig(modules_to_not_convert=["model"]))


def test_nan_is_named(tmp_path):
    """A broken weight would give NaN somewhere later."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: weight: expected finite values"):
        load(tmp_path, quantization_config=LowbitConfig())


def test_what_peft_merged_is_saved_as_it_is(quantized, tmp_path):
    """Merged layers, which are dense, would be lost beside those that stay in 4 bits."""
    peft = pytest.importorskip("peft")
    from lowbit_lora.hf.peft import register

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(load(quantized), register(settings)).merge_and_unload()
    assert len(stored(merged)) == 12
    merged.save_pretrained(tmp_path)
    assert_same(load(tmp_path), merged)


def test_a_full_disk_leaves_the_old_folder(quantized, tmp_path):
    """The only copy of a model would be lost to its own new version."""
    model = load(quantized)
    size = sum(path.stat().st_size for path in quantized.iterdir())
    with small_disk(tmp_path / "disk", f"{size * 3 // 2 // 1024}k") as disk:
        folder = disk / "model"
        model.save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with torch.no_grad():
            model.model.norm.weight.fill_(3)
        with pytest.raises(OSError, match=f"{folder}: could not be written, and its files are as they were"):
            model.save_pretrained(folder, max_shard_size="30KB")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        del model


def test_an_unknown_format_to_save_in(quantized, tmp_path):
    """The folder would be in another format than was asked for."""
    with pytest.raises(ValueError, match="format: expected"):
        load(quantized).save_pretrained(tmp_path / "saved", format="gguf")
    assert not (tmp_path / "saved").exists()
