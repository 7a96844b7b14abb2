"""lowbit_lora/config.py: ranges of the settings, and PEFT's dictionary."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import WeightSpec
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QuantizationType


@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        ({"rank": 0}, ValueError, ("rank", "0")),
        ({"rank": -3}, ValueError, ("rank", "-3")),
        ({"rank": 2.5}, TypeError, ("rank", "2.5")),
        ({"rank": True}, TypeError, ("rank", "True")),
        ({"lora_dropout": 1.0}, ValueError, ("lora_dropout", "[0, 1)", "1.0")),
        ({"lora_dropout": -0.1}, ValueError, ("lora_dropout", "-0.1")),
        ({"lora_dropout": math.nan}, ValueError, ("lora_dropout", "nan")),
        ({"lora_dropout": "much"}, TypeError, ("lora_dropout", "much")),
        ({"lora_alpha": math.inf}, ValueError, ("lora_alpha", "inf")),
        ({"bias": "some"}, ValueError, ("bias", "lora_only", "some")),
        ({"target_modules": []}, ValueError, ("target_modules",)),
        ({"target_modules": [3]}, TypeError, ("target_modules", "3")),
        ({"modules_to_save": "classifier"}, TypeError, ("modules_to_save", "list", "classifier")),
        ({"block_size": 48}, ValueError, ("block_size", "power of two", "48")),
        ({"block_size": 16}, ValueError, ("block_size", "32", "16")),
        ({"block_size": 8192}, ValueError, ("block_size", "4096", "8192")),
        ({"quantization": "nf3"}, ValueError, ("quantization", "NF4", "nf3")),
        ({"quantization": 4}, ValueError, ("quantization", "NF4", "4")),
        ({"double_quant": 1}, TypeError, ("double_quant", "1")),
        ({"scale": "best"}, ValueError, ("scale", "absmax", "search", "best")),
        ({"scale": "search", "quantization": "int8"}, ValueError, ("scale", "absmax", "int8")),
    ],
)
def test_a_wrong_setting_names_itself(settings, error, names):
    """A typo in a config surfaces when it is made, with what was expected, not hours into a run."""
    with pytest.raises(error) as raised:
        QLoRAConfig(**settings)
    for name in names:
        assert name in str(raised.value)


@given(st.integers(1, 512), st.integers(1, 512))
def test_scaling_is_that_of_the_papers(rank, alpha):
    """A wrong factor would train another model than the same settings give elsewhere."""
    assert LoraConfig(rank=rank, lora_alpha=alpha).scaling == alpha / rank
    assert LoraConfig(rank=rank, lora_alpha=alpha, use_rslora=True).scaling == alpha / math.sqrt(rank)


@pytest.mark.parametrize("member", QuantizationType)
def test_quantization_may_be_named(member):
    """Settings that come from a command line are strings."""
    for name in (member, member.name, member.value):
        assert QLoRAConfig(quantization=name).quantization is member


def test_int8_ignores_what_only_4_bits_have():
    """A script that changes nothing but the format must run."""
    assert QLoRAConfig(quantization="int8", block_size=48).spec == WeightSpec("int8")


@given(
    rank=st.integers(1, 64),
    target_modules=st.sampled_from(["all-linear", r".*\.query", ["query", "self.value"]]),
    lora_alpha=st.integers(1, 64),
    lora_dropout=st.sampled_from([0.0, 0.05]),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    use_rslora=st.booleans(),
    modules_to_save=st.sampled_from([None, ["classifier"]]),
    task_type=st.sampled_from([None, "SEQ_CLS"]),
)
def test_peft_dictionary_round_trip(**settings):
    """What is saved is what is loaded."""
    config = LoraConfig(**settings)
    assert LoraConfig.from_peft(config.to_peft()) == config


@pytest.mark.parametrize(
    "setting",
    [
        {"layer_replication": [[0, 2]]},
        {"a_feature_of_next_year": "on"},
        {"init_lora_weights": "corda"},
        {"peft_type": "LOHA"},
    ],
)
def test_a_peft_feature_that_is_not_supported_is_refused(setting):
    """An adapter that computes something else would otherwise load and predict wrongly without a word."""
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        LoraConfig.from_peft(LoraConfig().to_peft() | setting)


def test_peft_features_that_are_off_do_not_matter():
    """PEFT writes every setting it knows; adapters in plain LoRA have to load."""
    off = {
        "use_dora": False,
        "rank_pattern": {},
        "layers_to_transform": None,
        "peft_version": "0.21.2",
        "new": None,
    }
    assert LoraConfig.from_peft(LoraConfig().to_peft() | off) == LoraConfig()


def test_pefts_spelling_is_told():
    """A user of PEFT would read of an unexpected keyword, and look for the right one."""
    with pytest.raises(TypeError, match="LoraConfig: expected rank=8, got 'r'"):
        LoraConfig(r=8)
    with pytest.raises(TypeError, match="QLoRAConfig: expected one of rank, target_modules, .* got 'lora_rank'"):
        QLoRAConfig(lora_rank=8)


def test_a_config_is_frozen():
    """A setting that is changed after its check would be used unchecked, or not at all."""
    config = LoraConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4
    assert dataclasses.replace(config, rank=4).rank == 4
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_pefts_object_is_taken():
    """Scripts hold PEFT's config, not its dictionary."""
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q", "v"], use_dora=True, task_type="CAUSAL_LM")
    ours = LoraConfig.from_peft(theirs)
    assert (ours.rank, ours.lora_alpha, sorted(ours.target_modules)) == (4, 32, ["q", "v"])
    assert ours.use_dora and ours.task_type == "CAUSAL_LM"
    with pytest.raises(TypeError, match=r"write LoraConfig.from_peft\(config\)"):
        LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), theirs)
    with pytest.raises(ValueError, match="LOHA"):
        LoraConfig.from_peft(peft.LoHaConfig())


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(QLoRAConfig) if f.type is bool])
def test_a_switch_is_true_or_false(field):
    """The string "false" from a command line would turn it on."""
    with pytest.raises(TypeError, match=f"{field}: expected True or False, got 'false'"):
        QLoRAConfig(**{field: "false"})


def test_a_switch_with_a_third_position():
    """The string "false" from a command line would turn it on, and a typing error keep hidden states on the GPU."""
    for value in (True, False, "offload"):
        assert LoraConfig(gradient_checkpointing=value).gradient_checkpointing is value
    for value in ("false", "Offload", 1, None):
        with pytest.raises(ValueError, match=f"checkpointing: expected True, False or 'offload', got {value!r}"):
            LoraConfig(gradient_checkpointing=value)
