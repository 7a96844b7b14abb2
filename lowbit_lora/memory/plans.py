"""The memory of each of several GPUs, by the way in which they share the work."""

from typing import Any

from .estimate import Estimate, Setting, estimate

#: What is known of the plans: "ddp" and "fsdp2" are torch's, "tensor" cuts each layer (column- and row-wise).
PLANS = ("ddp", "fsdp2", "tensor")
#: GPU -> its memory in bytes.
GPUS = {
    name: size << 30
    for name, size in {
        "12 GB (RTX 3060)": 12,
        "16 GB (T4, RTX 4080)": 16,
        "24 GB (RTX 4090, L4)": 24,
        "40 GB (A100)": 40,
        "48 GB (L40S, A6000)": 48,
        "80 GB (A100, H100)": 80,
        "141 GB (H200)": 141,
        "180 GB (B200)": 180,
    }.items()
}
#: What CUDA, the kernels and the allocator take beside the tensors.
RESERVED = 1 << 30


def fitting_gpu(peak: int) -> str | None:
    """The smallest GPU on which a step of this peak fits, or None."""
    return next((name for name, size in GPUS.items() if peak + RESERVED <= size), None)


def per_gpu(
    config: dict[str, Any], setting: Setting, plan: str, gpus: int, alone: Estimate | None = None
) -> int | None:
    """The peak on each GPU in bytes; None where the plan cannot cut the model into so many parts.

    Args:
        config: of :data:`~lowbit_lora.memory.SHAPES`, or as there.
        setting: the batch is that of each GPU; with "tensor" all of them work on the same one.
        plan: of :data:`PLANS`.
        gpus: how many.
        alone: the estimate for one GPU, if it is known.
    """
    if gpus > 1 and plan == "tensor":
        cut = _cut(config, setting, gpus)
        return None if cut is None else estimate(cut, setting).peak
    alone = alone or estimate(config, setting)
    if gpus == 1:
        return alone.peak
    if plan == "ddp":  # the gradients wait in buckets to be sent
        return alone.peak + alone.gradients
    stored = alone.weights + alone.adapters + alone.states + alone.gradients
    # Whole at any time: what is in no block, a block that computes, and the next one that arrives.
    gathered = alone.outside + 2 * alone.block
    # Gradients of weights are whole until they are summed; those of adapters are small.
    reduced = 0 if alone.adapters else alone.outside + alone.block
    return -(-stored // gpus) + gathered + alone.activations + reduced


def _cut(config: dict[str, Any], setting: Setting, gpus: int) -> dict[str, Any] | None:
    """The config of one GPU's part: its heads and its share of the MLP; embeddings and head are whole on each."""
    block = setting.options.get("block_size", 64)
    parts = {}
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        parts[key], rest = divmod(config[key], gpus)
        if rest or not parts[key]:
            return None
    is_cut_at_blocks = parts["intermediate_size"] % block == 0 and config["head_dim"] % block == 0
    return config | parts if is_cut_at_blocks or setting.method != "qlora" else None


def table(shapes: dict[str, dict[str, Any]], setting: Setting, counts: tuple[int, ...]) -> dict[str, dict[str, list]]:
    """Model -> plan -> the peaks in bytes on each of so many GPUs."""
    found: dict[str, dict[str, list]] = {}
    for name, config in shapes.items():
        alone = estimate(config, setting)
        found[name] = {plan: [per_gpu(config, setting, plan, n, alone) for n in counts] for plan in PLANS}
    return found
