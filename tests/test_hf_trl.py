"""TRL's trainers on models with adapters on 4-bit weights: ours, PEFT's, and as their own reference."""

import contextlib
import gc
import os

import pytest
import torch
from conftest_models import llama
from hf_models import load, save_dense

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LowbitConfig, QLoRAConfig, QLoRAModel

for _name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")  # before they are imported
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")


@pytest.fixture(autouse=True, scope="module")
def collect_garbage_quickly():
    """Each train() collects garbage, and looks through every object of these libraries for it, which takes 0.3 s."""
    gc.freeze()
    yield
    gc.unfreeze()


WORDS = ["<pad>", "<eos>", "user", "assistant", ":", *(f"w{i}" for i in range(45))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} "
    "<eos> {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer():
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def chats(count: int = 8):
    rows = []
    for i in range(count):
        question = {"role": "user", "content": f"w{i} w{i + 1}"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"w{i + 2} w{i + 3} w{i + 4}"}]})
    return datasets.Dataset.from_list(rows)


def pairs(count: int = 8):
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w{i + 2}", "rejected": f" w{i + 3}"} for i in range(count)]
    return datasets.Dataset.from_list(rows)


def qlora(**options) -> QLoRAModel:
    base = llama().train()
    torch.manual_seed(1)
    return QLoRAModel(base, QLoRAConfig(**{"rank": 4, "lora_dropout": 0.1} | options))


def settings(folder, **options) -> dict:
    """Arguments of each trainer's config; TRL turns checkpointing on by itself, and so does this not."""
    common = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    common |= {"output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return common | options


def sft(model, folder, **options) -> "trl.SFTTrainer":
    given = {name: options.pop(name) for name in ("peft_config", "quantization_config") if name in options}
    arguments = trl.SFTConfig(**settings(folder, **options))
    data = {"train_dataset": chats(), "eval_dataset": chats(4), "processing_class": tokenizer()}
    return trl.SFTTrainer(model, arguments, **data, **given)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_adapter_only(folder) -> None:
    names = set(os.listdir(folder))
    assert "adapter_model.safetensors" in names and not names & {"model.safetensors", "pytorch_model.bin"}


SFT = {
    "defaults": {},
    "packing": {"packing": True, "max_length": 16},
    "assistant only": {"assistant_only_loss": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("kind", SFT)
def test_sft_trains_and_resumes_bit_for_bit(tmp_path, kind):
    """Supervised fine-tuning would not start, save the base, or go on from another state than it saved."""
    trainer = sft(qlora(), tmp_path, **SFT[kind])
    before = trained(trainer.model)
    trainer.train()
    after = trained(trainer.model)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert trainer.evaluate()["eval_loss"] > 0
    assert_adapter_only(tmp_path / "checkpoint-1")
    again = sft(qlora(), tmp_path, **SFT[kind])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = trained(again.model)
    assert [name for name in after if not torch.equal(after[name], resumed[name])] == []


@pytest.mark.parametrize("loaded", ["by TRL", "before", "never"])
def test_sft_with_pefts_config_on_a_quantized_base(tmp_path, loaded):
    """A script that leaves the wrapping to TRL would fail at 4-bit weights, decode them, or train nothing."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"peft_config": config}
    if loaded == "never":
        base = lowbit.quantize_(llama().train())
    else:
        base = str(save_dense(tmp_path / "base"))
        if loaded == "before":
            base = load(base, quantization_config=LowbitConfig())
        else:
            options["quantization_config"] = LowbitConfig()
    trainer = sft(base, tmp_path, **options)
    trainer.train()
    assert any(value.any() for name, value in trained(trainer.model).items() if "lora_B" in name)
    assert sum(isinstance(p, QuantizedTensor) for p in trainer.model.parameters()) == 14
    assert_adapter_only(tmp_path / "checkpoint-1")


def test_sft_with_our_wrapper_on_a_loaded_base(tmp_path):
    """The line that loads would be the same as for bitsandbytes, and the wrapper refuse what it loaded."""
    base = load(save_dense(tmp_path / "base"), quantization_config=LowbitConfig())
    model = QLoRAModel(base, QLoRAConfig(rank=4))
    before = trained(model)
    sft(model, tmp_path).train()
    assert any(not torch.equal(value, before[name]) for name, value in trained(model).items())
    assert_adapter_only(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("where", ["lm_head", "tokens"])
def test_an_adapter_in_the_head_is_refused(tmp_path, where):
    """TRL reads the head's weight: the adapter would silently neither count nor train."""
    if where == "lm_head":
        model = qlora(target_modules=["q_proj", "lm_head"])
    else:
        base = llama(tied=True).train()
        model = QLoRAModel(base, QLoRAConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    with pytest.raises(ValueError, match=r"fused_lm_head.*modules_to_save=\['lm_head'\]"):
        sft(model, tmp_path).train()


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"quantize_head": True}], ids=str)
def test_a_head_of_its_own_or_in_4_bits(tmp_path, options):
    """TRL multiplies with parts of the head's weight: a copy that trains would not, 4 bits would be refused."""
    model = qlora(**options)
    trainer = sft(model, tmp_path, save_strategy="no")
    before = trained(model)
    trainer.train()
    after = trained(model)
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not any("lm_head" in name for name in unchanged) and len(unchanged) < len(before)
    assert any("lm_head" in name for name in before) == ("modules_to_save" in options)


@contextlib.contextmanager
def counted_bases():
    """How many bases are made or copied in the meantime."""
    made, init = [], transformers.LlamaForCausalLM.__init__

    def counting(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "__init__", counting)
        patch.setattr(
            transformers.LlamaForCausalLM, "__deepcopy__", lambda self, memo: made.append(self), raising=False
        )
        yield made


def test_dpo_is_its_own_reference(tmp_path):
    """The reference would be a second model in memory, or drop other numbers than the model that trains."""
    model = qlora(init_lora_weights="random")  # the reference is the adapter as it begins, not the base
    with counted_bases() as bases:
        arguments = trl.DPOConfig(**settings(tmp_path))
        trainer = trl.DPOTrainer(model, args=arguments, train_dataset=pairs(), processing_class=tokenizer())
        trainer.train()
    assert bases == [] and trainer.ref_model is None
    first, second = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert second["rewards/chosen"] != 0
    assert model.active_adapter == "default"
    assert not any(".ref." in name for name in trained(model)) and trained(model)
    assert_adapter_only(tmp_path / "checkpoint-1")
    assert_adapter_only(tmp_path / "checkpoint-1" / "ref")

    expected = trained(model)
    again = trl.DPOTrainer(
        qlora(init_lora_weights="random"), args=arguments, train_dataset=pairs(), processing_class=tokenizer()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = trained(again.model)
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_grpo_generates_with_the_adapter(tmp_path):
    """Reinforcement learning would generate with the base, keep a second one, or not move."""
    model, lengths = qlora(), []

    def reward(completions, **_):
        lengths.extend(len(text.split()) for text in completions)
        return [float(len(set(text.split()))) for text in completions]

    options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    data = datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(4)])
    before = trained(model)
    with counted_bases() as bases:
        arguments = trl.GRPOConfig(**settings(tmp_path, **options))
        trainer = trl.GRPOTrainer(
            model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer()
        )
        trainer.train()
    assert bases == [] and trainer.ref_model is None and len(lengths) == 4 and max(lengths) <= 4
    after = trained(model)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert trainer.state.log_history[0]["kl"] == 0
    assert_adapter_only(tmp_path / "checkpoint-1")
