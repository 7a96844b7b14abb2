"""transformers' Trainer and accelerate on models with adapters, with no change to a script for PEFT's models."""

import copy
import ctypes
import gc
import os
import pickle
import sys

import pytest
import torch
from conftest_models import IDS, bert, llama
from torch import nn

from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.hf.trainer import save_adapters_only

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True, scope="module")
def collect_garbage_quickly():
    """Each train() collects garbage, and looks through every object of these libraries for it, which takes 0.3 s."""
    gc.freeze()
    yield
    gc.unfreeze()


class Rows(torch.utils.data.Dataset):
    """Sequences that count, with a column that no model takes."""

    def __init__(self, count: int = 8, labels: bool = True):
        self.count, self.labels = count, labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        ids = torch.arange(i, i + 8)
        return {"input_ids": ids, "labels": ids if self.labels else i % 2, "note": f"row {i}"}


class Plain(nn.Module):
    """A language model of the user's own: its forward takes no further arguments, and its norm has statistics."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 64), nn.BatchNorm1d(64)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 50)

    def forward(self, input_ids, labels=None):
        states = self.norm(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        states = states.contiguous()  # torch's product of others takes another way where a factor needs a gradient
        logits = self.head(torch.tanh(self.hidden(states)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


def model_of(kind: str) -> LoraModel:
    """A model with an adapter in training mode; the same one each time."""
    options = {"rank": 4, "lora_dropout": 0.1}
    base = MODELS[kind][0]().train()
    torch.manual_seed(1)
    if MODELS[kind][1] == "lora":
        return LoraModel(base, LoraConfig(**options | MODELS[kind][2]))
    return QLoRAModel(base, QLoRAConfig(**options | MODELS[kind][2]))


#: name -> (its base, the kind of wrapper, what its config has besides)
MODELS = {
    "llama": (llama, "qlora", {}),
    "tied": (lambda: llama(tied=True), "qlora", {}),
    "dense": (lambda: llama(tied=True), "lora", {"use_dora": True}),
    "bf16": (lambda: llama().bfloat16(), "qlora", {"lora_dtype": "bfloat16"}),
    "bert": (bert, "qlora", {}),
    "plain": (plain, "qlora", {"target_modules": ["hidden"]}),
    "pissa": (llama, "lora", {"init_lora_weights": "pissa"}),
    "pissa in 4 bits": (llama, "qlora", {"init_lora_weights": "pissa"}),
}


def trainer_of(model: LoraModel, folder, **options) -> "transformers.Trainer":
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings | options)
    rows = [Rows(count, labels=not hasattr(model, "classifier")) for count in (8, 4)]
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows[0], eval_dataset=rows[1])


def state(model: LoraModel) -> dict[str, torch.Tensor]:
    """What trains, and the buffers that training moves."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return kept | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and one
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("kind", MODELS)
def test_trains_evaluates_saves_and_loads_the_best(tmp_path, kind):
    """No column that fits, no eval_loss, the base in each checkpoint, or KeyError where the best is loaded."""
    model = model_of(kind)
    before = state(model)
    base = {name: p.clone() for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses)
    best = trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    after = state(model)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    for name, weight in base.items():
        assert torch.equal(model.get_parameter(name).packed, weight.packed), name

    names = set(os.listdir(best))
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    fresh = type(model).from_pretrained(MODELS[kind][0](), best)
    with torch.no_grad():
        out = [one.eval()(input_ids=IDS)["logits"] for one in (fresh, model)]
    if kind == "pissa":  # the file is the difference to the base as it was
        torch.testing.assert_close(*out)
    else:
        assert torch.equal(*out)


RUNS = {
    "plainly": {},
    "bf16": {"bf16": True},
    "accumulating": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
RESUMED = [("llama", run) for run in RUNS] + [(kind, "plainly") for kind in MODELS if kind != "llama"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize(("kind", "run"), RESUMED)
def test_resume_is_bit_for_bit(tmp_path, kind, run):
    """A run that was interrupted would end at another model than one that was not."""

    def end(resume: str | None = None) -> dict[str, torch.Tensor]:
        model = model_of(kind)
        trainer_of(model, tmp_path, **RUNS[run]).train(resume_from_checkpoint=resume)
        return state(model)

    through = end()
    assert_equal_states(end(str(tmp_path / "checkpoint-2")), through)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_checkpointing_trains_the_same():
    """A checkpointed block whose input requires no gradient would train nothing."""
    grads = []
    for reentrant in (None, False, True):
        model = model_of("llama").eval()  # without dropout
        if reentrant is not None:
            model.train()
            transformers.modeling_utils.PreTrainedModel.gradient_checkpointing_enable(
                model.get_base_model(), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        assert_equal_states(other, grads[0])


@pytest.mark.parametrize(("kind", "takes"), [("llama", True), ("plain", False)])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, kind, takes):
    """The loss would be divided twice, or not at all; a forward without **kwargs would be given num_items_in_batch."""
    ends = []
    for size, steps in ((4, 1), (2, 2)):
        model = model_of(kind).eval()
        model.train = lambda mode=True: None  # no dropout, and no statistics of a part of the batch
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = trainer_of(model, tmp_path, max_steps=1, optim="sgd", save_strategy="no", **options)
        assert trainer.model_accepts_loss_kwargs is takes
        trainer.train()
        ends.append(state(model))
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name])


def test_label_smoothing_and_neftune(tmp_path):
    """Trainer looks for the base at base_model.model then."""
    model = model_of("llama")
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1, neftune_noise_alpha=5.0, save_strategy="no")
    losses = trainer.train().training_loss, trainer.evaluate()["eval_loss"]
    assert all(loss > 0 for loss in losses)
    assert not model.get_base_model().get_input_embeddings()._forward_hooks


def test_a_model_card_says_what_is_there(tmp_path):
    """The hub would take the folder for a whole model, and nobody would know of which base."""
    model = model_of("llama")
    model.config.name_or_path = "someone/some-model"
    trainer = trainer_of(model, tmp_path)
    trainer.save_model()
    trainer.create_model_card(tags=["mine"])
    data = __import__("huggingface_hub").ModelCard.load(str(tmp_path / "README.md")).data
    assert data.library_name == "peft" and data.base_model == "someone/some-model"
    assert {"lora", "lowbit", "mine"} <= set(data.tags)


# ---- what makes Trainer see an adapter


def test_is_a_peft_model_in_name_only():
    """Trainer would not see an adapter; or PeftModel's methods, which find no layers of theirs, would hide ours."""
    model = model_of("llama")
    assert isinstance(model, peft.PeftModel) and isinstance(model, QLoRAModel) and type(model) is QLoRAModel
    assert not isinstance(model, peft.PeftMixedModel)
    assert repr(model).startswith("QLoRAModel(") and model.__class__.__module__ == QLoRAModel.__module__
    generated = model.generate(IDS[:, :3], max_new_tokens=1, do_sample=False, pad_token_id=0)

    # As FSDP2 does: the class is then one that really inherits from PeftModel.
    model.__class__ = type("Sharded", (model.__class__,), {})
    assert type(model).__name__ == "Sharded" and type(model) is model.__class__
    assert not hasattr(model, "get_prompt") and model.vocab_size == 50
    assert torch.equal(model.generate(IDS[:, :3], max_new_tokens=1, do_sample=False, pad_token_id=0), generated)


def test_is_no_peft_model_before_peft_is_there(monkeypatch):
    """Every script would pay for the import of PEFT, which takes seconds."""
    model = model_of("llama")
    monkeypatch.delitem(sys.modules, "peft")
    assert model.__class__ is QLoRAModel and not isinstance(model, peft.PeftModel)
    assert "peft" not in sys.modules


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_while_peft_is_there(copied):
    """pickle refuses an object whose __class__ is not its type."""
    model = model_of("llama")
    twin = copied(model)
    assert type(twin) is QLoRAModel and isinstance(twin, peft.PeftModel)
    assert_equal_states(state(twin), state(model))


def test_the_attributes_that_are_asked_for():
    """use_adapter of TRL puts back what active_adapter said."""
    model = model_of("llama")
    assert model.base_model.model is model.get_base_model()
    assert model.active_adapter == "default" and list(model.peft_config) == ["default"]
    model.add_adapter("ref", model.peft_config["default"])
    assert list(model.peft_config) == ["default", "ref"]
    model.set_adapter(["default", "ref"])
    assert model.active_adapter == ["default", "ref"]


def test_a_second_adapter_of_a_decomposed_base_begins_at_zero():
    """TRL's reference would take the factors out of the base once more."""
    model = model_of("pissa in 4 bits")
    model.add_adapter("ref", model.peft_config["default"])
    model.eval().set_adapter("ref")
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, ours)


def test_peft_functions_find_no_layers():
    """accelerate would write an empty checkpoint of a model under FSDP with SHARDED_STATE_DICT."""
    with pytest.raises(RuntimeError, match="PEFT does not know the layers of lowbit_lora"):
        peft.get_peft_model_state_dict(model_of("llama"))


@pytest.mark.parametrize("kind", ["conv", "llama"])
def test_dropout_is_turned_off_as_in_any_model(kind):
    """TRL sets p = 0 in each nn.Dropout for DPO: the reference would be another model at each call."""
    if kind == "conv":
        base, x = nn.Sequential(nn.Conv1d(32, 32, 3)), torch.randn(2, 32, 9)
        model = LoraModel(base, LoraConfig(rank=4, target_modules=["0"], lora_dropout=0.5, init_lora_weights="random"))
        run = lambda: model(x)  # noqa: E731
    else:
        model = QLoRAModel(llama(), QLoRAConfig(rank=4, lora_dropout=0.5, init_lora_weights="random"))
        run = lambda: model(input_ids=IDS).logits  # noqa: E731
    model.train()
    with torch.no_grad():
        assert not torch.equal(run(), run())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        dropped = run()
        assert torch.equal(model.eval() and run(), dropped)


# ---- accelerate


@pytest.mark.parametrize("kind", ["tied", "dense", "plain"])
def test_accelerate_resumes_bit_for_bit_from_adapters_alone(tmp_path, kind):
    """A checkpoint of a 70B model would be as large as the model, or fail at its shared or quantized weights."""

    def start():
        accelerator = accelerate.Accelerator(cpu=True)
        save_adapters_only(accelerator)
        model = model_of(kind)
        model.add_adapter("second", LoraConfig(target_modules=["hidden" if kind == "plain" else "q_proj"], rank=2))
        other = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
        return accelerator, *accelerator.prepare(other, model, optimizer)

    def step(accelerator, other, model, optimizer):
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=IDS, labels=IDS)["loss"])
        optimizer.step()

    one = start()
    torch.manual_seed(2)
    step(*one)
    one[0].save_state(str(tmp_path))
    step(*one)
    names = {name for _, _, files in os.walk(tmp_path) for name in files}
    assert (tmp_path / "adapter" / "second" / "adapter_model.safetensors").is_file()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 300  # of the other model
    assert "pytorch_model.bin" not in names

    two = start()
    with torch.no_grad():
        two[1].weight.zero_()
    two[0].load_state(str(tmp_path))
    assert torch.equal(two[1].weight, one[1].weight)
    step(*two)
    assert_equal_states(state(two[2]), state(one[2]))


def test_accelerate_in_bf16():
    """accelerate's mixed precision would compute in fp32, or something else than torch's autocast does."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    one, other = (model_of("llama").eval() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        expected = one(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    found = accelerator.prepare(other)(input_ids=IDS, labels=IDS)
    accelerator.backward(found.loss)
    accelerate.state.AcceleratorState._reset_state(True)
    assert expected.logits.dtype == torch.bfloat16 and found.logits.dtype == torch.float32
    assert torch.equal(found.logits, expected.logits.float())
    grads = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (one, other)]
    assert_equal_states(*grads)


def test_accelerate_says_what_to_call(tmp_path):
    """An error from inside safetensors would not say what to do."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model_of("llama"))
    with pytest.raises(ctypes.ArgumentError, match=r"save_adapters_only\(accelerator\)"):
        accelerator.save_state(str(tmp_path))
