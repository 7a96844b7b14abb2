"""How much memory and disk a calibration takes, asked before the first layer."""

import shutil

import torch

from lowbit.format import WeightSpec

from ..optim.managed import host_memory
from .blocks import Chain

#: Matrices of the size of a Gram matrix that are there at once, beside the Gram matrices themselves.
_FACTORS = 5
_FP32 = 4


def check(
    chains: list[Chain],
    weights: list[torch.nn.Parameter],
    spec: WeightSpec,
    is_sequential: bool,
    activations: str | None,
    resume: str | None,
) -> None:
    """MemoryError or OSError unless there is room, as far as the system says how much there is.

    Args:
        weights: to be quantized.
        activations: the folder that hidden states are kept in; None: memory.
        resume: the folder of the state of a run, or None.
    """
    result = sum(int(weight.numel() * _bytes_per_weight(spec)) for weight in weights)
    streams = stored = working = 0
    for chain in chains:
        tokens = sum(hidden.numel() for hidden in chain.hidden)  # times the width
        width = chain.hidden[0].shape[-1]
        most = max(hidden.numel() for hidden in chain.hidden) // width
        for block in chain.blocks.values():
            matrices = [p.shape for p in block.parameters() if p.dim() >= 2]
            widest = max((max(shape[-2:]) for shape in matrices), default=0)
            parameters = sum(p.numel() for p in block.parameters())
            inputs = sum({shape[-2:] for shape in matrices} and {max(shape[-2:]) for shape in matrices})
            inputs = max(inputs, 3 * width + widest)
            streams = max(streams, _FP32 * tokens * (2 if is_sequential else 1))
            stored = max(stored, _FP32 * inputs * tokens // width if is_sequential else 0)
            working = max(
                working,
                _FP32 * (2 * parameters + 2 * most * inputs + (_FACTORS + 2) * widest**2),
            )
    on_disk = (streams + stored if activations else 0, (streams * 2 + result) if resume else 0)
    needed = result + working + (0 if activations else streams + stored)
    device = weights[0].device if weights else torch.device("cpu")
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"calibrate: expected about {_gib(needed)} of free memory, got {_gib(available)}; use fewer or smaller "
            "batches" + ("" if activations else ", or keep activations in a folder (activations=)")
        )
    for argument, folder, size in (("activations", activations, on_disk[0]), ("resume", resume, on_disk[1])):
        if folder is not None and size > (free := shutil.disk_usage(folder).free):
            raise OSError(f"{argument}: expected about {_gib(size)} of free disk at {folder}, got {_gib(free)}")


def _bytes_per_weight(spec: WeightSpec) -> float:
    return 0.52 if spec.double_quant else 0.5 + 4 / (spec.block_size or 64)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
