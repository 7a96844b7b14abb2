"""get_paged_optimizer on models: what it steps, with which settings, and in the hands of transformers' Trainer."""

import pytest
import torch
from conftest_models import IDS, LABELS, bert, llama, mlp

import lowbit
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel, get_paged_optimizer
from lowbit_lora.optim import AdamW, FusedOptimizer, PagedAdamW, PagedAdamW8bit, PagedLion, optimizer_cls_and_kwargs


def peft_model():
    peft = pytest.importorskip("peft")
    base = lowbit.quantize_(llama(), skip=["lm_head"])
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def lora(model, **settings):
    return LoraModel(model, LoraConfig(**{"target_modules": "all-linear", **settings}))


def qlora(model, **settings):
    return QLoRAModel(model, QLoRAConfig(**{"target_modules": "all-linear", **settings}))


WRAPPED = {
    "lora": lambda: lora(bert()),
    "qlora": lambda: qlora(llama()),
    "dora": lambda: qlora(llama(), use_dora=True),
    "bf16": lambda: qlora(llama().bfloat16(), lora_dtype="bfloat16"),
    "biases and a head": lambda: lora(bert(), target_modules=["query"], bias="all", modules_to_save=["classifier"]),
    "embeddings": lambda: lora(llama(), target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda: lora(llama(), target_modules=["q_proj"], trainable_token_indices=[1, 2, 5]),
    "parameters": lambda: lora(llama(), target_modules=[], target_parameters=["q_proj.weight"]),
    "peft": peft_model,
    "dense": bert,
    "frozen in part": lambda: llama().requires_grad_(False).requires_grad_(True),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"optimizer": "lion"}], ids=str)
def test_steps_what_trains_and_nothing_else(kind, options):
    """A parameter that trains would be left out, or the frozen base be changed."""
    model = WRAPPED[kind]().train()
    optimizer = get_paged_optimizer(model, lr=1e-2, weight_decay=0.01, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = LABELS if hasattr(model, "classifier") else IDS
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        changed = not torch.equal(p.detach(), before[name])
        # torch gives no gradient to what the loss does not depend on.
        assert changed == (p.requires_grad and p.grad is not None and bool(p.grad.any())), name
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in model.parameters() if p.requires_grad}


def test_no_decay_of_biases_and_norms():
    """Biases and norms would be pulled to zero."""
    model = mlp()
    decays = {
        p: group["weight_decay"]
        for group in get_paged_optimizer(model, weight_decay=0.5).param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert decays[p] == (0.0 if name.endswith("bias") or "norm" in name else 0.5), name
    everything = get_paged_optimizer(model, weight_decay=0.5, decay_biases_and_norms=True)
    assert [group["weight_decay"] for group in everything.param_groups] == [0.5]


def test_lora_plus():
    """B would train at A's rate, or the schedule change their ratio."""
    model = lora(bert(), target_modules=["query"])
    optimizer = get_paged_optimizer(model, lr=1e-3, lora_plus_ratio=16)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" in name:
            assert rates[p] == pytest.approx(0.5 * (16e-3 if "lora_B" in name else 1e-3)), name
    assert schedule.get_last_lr()


@pytest.mark.parametrize(
    ("options", "cls"),
    [({}, PagedAdamW), ({"bits": 8}, PagedAdamW8bit), ({"optimizer": "lion"}, PagedLion), ({"paged": False}, AdamW)],
)
def test_the_class_that_is_asked_for(options, cls):
    """Another optimizer would train than the options name."""
    assert type(get_paged_optimizer(mlp(), **options)) is cls


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 4}, "bits"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
    ],
)
def test_bad_options(options, named):
    """A setting that cannot be meant would be taken."""
    with pytest.raises((ValueError, TypeError), match=named):
        get_paged_optimizer(mlp(), **options)


def test_no_parameter_that_trains():
    """Training would run for hours and change nothing."""
    with pytest.raises(ValueError, match="require gradients, got none in Mlp"):
        get_paged_optimizer(mlp().requires_grad_(False))


@pytest.mark.parametrize("paged", [True, False])
def test_the_config_chooses(paged, tmp_path):
    """paged_adamw would be without effect."""
    model = qlora(llama(), paged_adamw=paged)
    optimizer = model.create_optimizer(lr=1e-3, bits=8)
    assert optimizer.paged == paged and optimizer.bits == 8
    assert isinstance(LoraModel(mlp(), LoraConfig(target_modules=["first"])).create_optimizer(), AdamW)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.arange(index, index + 7) % 50
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("bits", [32, 8])
def test_trainer_trains_and_resumes(bits, tmp_path):
    """transformers' Trainer would refuse the optimizer, or resume from its checkpoint to something else."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trained(folder, **options):
        model = peft_model()
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
        )
        made = optimizer_cls_and_kwargs(model, lr=1e-2, weight_decay=0.1, bits=bits, stochastic_rounding=True)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), optimizer_cls_and_kwargs=made)
        trainer.train(**options)
        assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), FusedOptimizer)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = trained(tmp_path)
    resumed = trained(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert any(value.any() for name, value in expected.items() if "lora_B" in name)
