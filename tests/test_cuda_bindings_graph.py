"""What a CUDA graph holds of lowbit's ops: capture of a decoding step, and replay on other inputs, on the emulator."""

import contextlib

import pytest
import torch
from cases import make_weight
from conftest_cuda import launchers
from conftest_models import llama
from cuda_bindings import OnStub

import lowbit
from lowbit_lora import LoraConfig, LoraModel

#: Ops of torch that wait for a GPU, which ends a capture.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


@contextlib.contextmanager
def capture():
    """Context that checks that a stream which is captured could be; gives the :class:`OnStub` in it.

    cuda_bindings.run fails at any call of the runtime but a launch on torch's stream.
    """
    library = launchers()
    library.set_capturing(True)
    try:
        with OnStub() as called:
            yield called
    finally:
        library.set_capturing(False)
    assert not WAITS & {name.removeprefix("aten::").partition(".")[0] for name in called.launches}


def test_a_decoding_step_of_a_llama():
    """`generate` with a static cache replays one captured step per token: a step that waits, allocates by itself or
    depends on a number that the host reads could not be captured, or would repeat the first token's.
    """
    transformers = pytest.importorskip("transformers")
    model = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1).bfloat16()
    config = model.config
    lowbit.quantize_(model, skip=["lm_head"])
    model = LoraModel(model, LoraConfig(rank=4, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=16)

    def inputs(token: int, position: int) -> dict[str, torch.Tensor]:
        at = torch.tensor([position])
        mask = (torch.arange(16) <= position)[None, None, None, :]
        return {
            "input_ids": torch.tensor([[token]]),
            "attention_mask": mask,
            "cache_position": at,
            "position_ids": at[None],
        }

    def step(given: dict) -> torch.Tensor:
        return model(**given, past_key_values=cache, use_cache=True).logits

    made = []
    with torch.no_grad():
        with OnStub():
            step(inputs(1, 0))  # the cache is made, and it is seen that q and v take the same x
        for given in (inputs(2, 1), inputs(3, 2)):
            with capture() as called:
                step(given)
            made.append(called.launches)
    assert made[0] == made[1]  # the second token's step is the first one's
    ours = [name for name in made[0] if "gemv" in name or "lora_product" in name]
    assert sum("gemv" in name for name in ours) == 7 and sum("lora_product" in name for name in ours) == 2


def test_a_replay_reads_what_is_in_memory_then():
    """A kernel whose arguments hold a number of the captured step, or a counter that it does not reset, would repeat
    the first token.
    """
    generator = torch.Generator().manual_seed(0)
    q = lowbit.quantize(make_weight((64, 128)))
    x, another = (torch.randn(1, 128, generator=generator).bfloat16() for _ in range(2))
    lora_a, lora_b = torch.randn(4, 128, generator=generator), torch.randn(64, 4, generator=generator)
    library = launchers()
    begin = len(library.launches)
    with torch.no_grad(), capture():
        y = lowbit.lora_linear(x, q, lora_a, lora_b, 0.5)
    graph = library.launches[begin:]
    first = y.clone()
    with torch.no_grad(), OnStub():
        expected = lowbit.lora_linear(another, q, lora_a, lora_b, 0.5)
    x.copy_(another)
    for launch in graph:
        library.replay(launch)
    assert torch.equal(y, expected) and not torch.equal(y, first)
