"""Writes bitsandbytes_0_50_2.safetensors: what bitsandbytes' CPU code makes of a few small weights.

Run with bitsandbytes 0.50.2 installed: ``python tests/golden/make_golden.py``.
"""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

PATH = Path(__file__).with_name("bitsandbytes_0_50_2.safetensors")
# format, block size, shape, dtype: full and short blocks, odd sizes, 1-D to 3-D.
CASES = (
    ("nf4", 64, (9, 33), torch.float32),
    ("nf4", 32, (13, 31), torch.bfloat16),
    ("nf4", 128, (3, 5, 17), torch.float16),
    ("nf4", 1024, (1030,), torch.bfloat16),
    ("fp4", 64, (5, 33), torch.float32),
    ("fp4", 32, (64,), torch.bfloat16),
)
INT8_CASES = (((7, 33), torch.float32), ((5, 50), torch.float16), ((9, 41), torch.bfloat16))


def main() -> None:
    tensors, about = {}, []
    for index, (format, block_size, shape, dtype) in enumerate(CASES):
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))
        weight = weight.clamp(-100, 100).to(dtype)
        weight.view(-1)[:block_size] = 0
        for double_quant in (False, True):
            packed, state = bnb.quantize_4bit(
                weight, blocksize=block_size, quant_type=format, compress_statistics=double_quant
            )
            name = f"{index}.{'dq' if double_quant else 'plain'}"
            tensors[f"{name}.packed"] = packed.reshape(-1)
            tensors[f"{name}.absmax"] = state.absmax.clone()
            if double_quant:
                tensors[f"{name}.group_scales"] = state.state2.absmax.clone()
                tensors[f"{name}.offset"] = state.offset.clone()
        tensors[f"{index}.weight"] = weight
        about.append({"format": format, "block_size": block_size})
    for index, (shape, dtype) in enumerate(INT8_CASES):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(dtype)
        weight[:, 3] = weight.abs().amax(1) / 2  # a tie, before the scale is rounded
        weight[1] = 0
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
        tensors |= {f"int8.{index}.weight": weight, f"int8.{index}.codes": codes, f"int8.{index}.absmax": absmax}
        tensors[f"int8.{index}.decoded"] = bnb.int8_vectorwise_dequant(codes, absmax)
    save_file(tensors, PATH, metadata={"cases": json.dumps(about), "made_by": "bitsandbytes 0.50.2, CPU"})


if __name__ == "__main__":
    main()
