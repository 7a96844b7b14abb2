"""Tiny random models of transformers' families, and batches for them: what the tests of calibration run on."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from lowbit_lora.calibrate.state import State

#: More than the sizes that all have in common.
_FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 32, "sliding_window": 6},
    "Phi": {},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
}
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(family: str, seed: int = 0, **settings):
    """A random model in eval mode, hidden 64, 2 layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if family == "GPT2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 64}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | ends | settings)).eval()
    if family == "Bert":
        return transformers.BertModel(transformers.BertConfig(**_SIZES | settings)).eval()
    if family == "ViT":
        config = transformers.ViTConfig(**_SIZES | {"image_size": 32, "patch_size": 8} | settings)
        return transformers.ViTModel(config).eval()
    config = getattr(transformers, f"{family}Config")(**_SIZES | _FAMILIES[family] | settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batches_of(family: str, count: int = 3, rows: int = 4, length: int = 12) -> list[dict]:
    """Random token ids, or images."""
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        return [{"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)} for _ in range(count)]
    return [{"input_ids": torch.randint(3, 50, (rows, length), generator=generator)} for _ in range(count)]


@contextlib.contextmanager
def killed_after(blocks: int) -> Iterator[None]:
    """Context in which a calibration is killed once the results of so many blocks are kept."""
    save = State.save

    def killed(self, chain, number, *args, **kwargs):
        if number == blocks:
            raise KeyboardInterrupt
        save(self, chain, number, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "save", killed)
        yield


def outputs(model, batches: list[dict]) -> torch.Tensor:
    """What the model returns first, of all batches."""
    with torch.no_grad():
        return torch.cat([model(**batch)[0].float() for batch in batches])


def error(model, dense: torch.Tensor, batches: list[dict]) -> float:
    """The mean squared error of the outputs."""
    return (outputs(model, batches) - dense).square().mean().item()
