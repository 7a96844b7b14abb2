"""Folders of bitsandbytes in transformers: those that it wrote, on our kernels, and ours, loaded by it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import GPT2, IDS, MIXTRAL, SIZES, assert_same, assert_same_tensor, load, save_dense, stored
from safetensors.torch import load_file

from lowbit_lora import LowbitConfig, QLoRAConfig, QLoRAModel
from lowbit_lora.hf import bitsandbytes

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

#: bitsandbytes' products on the CPU fail where a row is not whole blocks.
LLAMA = SIZES | {"intermediate_size": 128}
#: (format, double_quant, dtype in which the codes are stored)
KINDS = [
    ("nf4", True, torch.uint8),
    ("nf4", False, torch.bfloat16),
    ("fp4", True, torch.float16),
    ("fp4", False, torch.float32),
    ("nf4", True, torch.float32),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_dense(tmp_path_factory.mktemp("llama"), **LLAMA)


@pytest.fixture
def on_our_kernels():
    bitsandbytes.register()
    yield
    bitsandbytes.unregister()


def theirs(format: str = "nf4", double_quant: bool = True, storage: torch.dtype = torch.uint8, **options):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **options,
    )


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def assert_same_files(ours: Path, other: Path) -> None:
    """The same keys, dtypes, shapes and bytes; codes may be stored in another dtype."""
    one, two = tensors_in(ours), tensors_in(other)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        twin = two[key]
        if tensor.dtype != twin.dtype:
            assert key + ".absmax" in one, key
            twin = twin.view(torch.uint8).view(-1, 1)
        assert tensor.shape == twin.shape and torch.equal(tensor.view(torch.uint8), twin.view(torch.uint8)), key


@pytest.mark.oldest
@pytest.mark.parametrize(("format", "double_quant", "storage"), KINDS)
def test_read(llama, tmp_path, on_our_kernels, format, double_quant, storage):
    """The thousands of 4-bit models on the hub could not be used, or would compute something else."""
    model = load(llama, quantization_config=theirs(format, double_quant, storage), device_map="cpu")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ours = load(tmp_path / "theirs")
    own = load(llama, quantization_config=LowbitConfig(format, 64, double_quant))
    assert_same(ours, own)
    ours.save_pretrained(tmp_path / "again", format="bitsandbytes")
    assert_same_files(tmp_path / "again", tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), ours)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("format", "double_quant"), [(format, dq) for format in ("nf4", "fp4") for dq in (True, False)]
)
def test_write(llama, tmp_path, format, double_quant):
    """A folder for bitsandbytes would not load there, or as another model."""
    model = load(llama, quantization_config=LowbitConfig(format, 64, double_quant))
    model.save_pretrained(tmp_path / "ours", format="bitsandbytes", max_shard_size="30KB")
    assert model.config.quantization_config.quant_method == "lowbit"
    quantized = load(llama, quantization_config=theirs(format, double_quant), device_map="cpu")
    quantized.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    loaded = load(tmp_path / "ours")
    assert loaded.is_loaded_in_4bit and type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, quantized(IDS).logits)
        torch.testing.assert_close(model(IDS).logits, loaded(IDS).logits, rtol=0.05, atol=0.02)


def test_written_choices(tmp_path):
    """bitsandbytes would take dense layers for quantized ones, or the reverse: names begin and end like others."""
    folder = save_dense(tmp_path / "dense", **LLAMA | {"num_hidden_layers": 11})
    config = LowbitConfig(modules_to_not_convert=["model.layers.1"], quantize_head=True)
    model = load(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "ours", format="bitsandbytes")
    loaded = load(tmp_path / "ours")
    linear = {name for name, module in loaded.named_modules() if type(module).__name__ == "Linear4bit"}
    assert {f"{name}.weight" for name in linear} == stored(model).keys()
    assert all(loaded.get_submodule(name).weight.quant_state is not None for name in linear)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, loaded(IDS).logits, rtol=0.05, atol=0.02)


@pytest.mark.oldest
def test_conv1d(tmp_path, on_our_kernels):
    """GPT-2's weights lie the other way round in the folder than in the model."""
    folder = save_dense(tmp_path / "dense", "GPT2LMHeadModel", **GPT2)
    model = load(folder, quantization_config=theirs(), device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert len(stored(ours)) == 8
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=0.05, atol=0.02)
    ours.save_pretrained(tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), ours)
    own = load(folder, quantization_config=LowbitConfig(conv1d_transposed=True))
    assert_same(own, ours)
    own.save_pretrained(tmp_path / "again", format="bitsandbytes")
    assert_same_files(tmp_path / "again", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("MixtralForCausalLM", MIXTRAL, {}, "got .*mlp.experts.gate_up_proj of a MixtralExperts"),
        ("LlamaForCausalLM", SIZES, {"quantize_embeddings": True}, "got model.embed_tokens.weight of a Embedding"),
        ("GPT2LMHeadModel", GPT2, {}, "c_attn.weight of a Conv1D .* quantize it by LowbitConfig.conv1d_transposed"),
        ("LlamaForCausalLM", SIZES, {"format": "int8"}, "expected weights in nf4 or fp4 .* in int8"),
    ],
)
def test_what_it_has_no_place_for(tmp_path, name, sizes, options, message):
    """bitsandbytes would load these weights as noise."""
    model = load(save_dense(tmp_path, name, **sizes), quantization_config=LowbitConfig(**options))
    with pytest.raises(ValueError, match=f"format: {message}|{message}"):
        model.save_pretrained(tmp_path / "saved", format="bitsandbytes")
    assert not (tmp_path / "saved").exists()


def test_training_on_a_folder(llama, tmp_path, on_our_kernels):
    """A user of bitsandbytes would have to quantize the model again."""
    load(llama, quantization_config=theirs(), device_map="cpu").save_pretrained(tmp_path)
    base = load(tmp_path)
    before = {name: weight.packed.clone() for name, weight in stored(base).items()}
    model = QLoRAModel(base, QLoRAConfig(rank=4, target_modules=["q_proj", "down_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    base = model.unload()
    assert all(torch.equal(base.get_parameter(name).packed, packed) for name, packed in before.items())


def test_theirs_by_default(llama, tmp_path):
    """Where bitsandbytes is installed, a script that uses it would get other classes."""
    load(llama, quantization_config=theirs(), device_map="cpu").save_pretrained(tmp_path)
    assert type(load(tmp_path).model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


ABSENT = """
import importlib.abc, importlib.metadata, importlib.util, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def find_spec(name, package=None, find=importlib.util.find_spec):
    return None if name.partition(".")[0] == "bitsandbytes" else find(name, package)

def version(name, find=importlib.metadata.version):
    if name == "bitsandbytes":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

sys.meta_path.insert(0, Blocked())
importlib.util.find_spec, importlib.metadata.version = find_spec, version
import lowbit_lora
assert "transformers" not in sys.modules, "importing lowbit_lora takes seconds more"
import torch
from transformers import AutoModelForCausalLM

with torch.no_grad():
    for folder in sys.argv[1:]:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        torch.save(model.state_dict(), folder + "/state.pt")
assert "bitsandbytes" not in sys.modules
"""


def test_read_without_bitsandbytes(llama, tmp_path):
    """The folders could be loaded only where bitsandbytes is installed, which has no kernels for some machines."""
    folders = []
    for number, kind in enumerate(KINDS):
        folders.append(tmp_path / str(number))
        load(llama, quantization_config=theirs(*kind), device_map="cpu").save_pretrained(folders[-1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ABSENT, *map(str, folders)], env=environment, check=True, timeout=300)
    for folder, (format, double_quant, _) in zip(folders, KINDS, strict=True):
        expected = load(llama, quantization_config=LowbitConfig(format, 64, double_quant)).state_dict()
        state = torch.load(folder / "state.pt")
        assert state.keys() == expected.keys()
        for key, tensor in state.items():
            assert_same_tensor(tensor, expected[key], key)
