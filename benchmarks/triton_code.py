"""The machine code of lowbit's Triton kernels, compiled for GPUs that are not here."""

import dataclasses
import sys
import tempfile
from pathlib import Path

from machine_code import Kernel, count, disassemble

sys.path.append(str(Path(__file__).parent.parent))

_POINTERS = {
    "x": "*bf16",
    "packed": "*u8",
    "absmax": "*u8",
    "group_scales": "*fp32",
    "offset": "*fp32",
    "scale_map": "*fp32",
    "y": "*bf16",
}
_SIZES = ("n", "k")  # multiples of 16


def linear_configs(arch: str, rows: tuple[int, ...]) -> list:
    """The tiles of linear for these numbers of rows of x (a 4096 x 4096 layer, NF4, bf16) on ``arch``, "sm_90" say.

    Without those rows for which W is decoded first. Empty where Triton is not installed.
    """
    from lowbit.backends import triton as backend

    if backend.missing_reason() is not None:
        return []
    import torch

    from lowbit.backends.triton import shapes

    gpu = shapes.Gpu(int(arch.removeprefix("sm_")), 108)
    problems = [shapes.Problem(shapes.rows_of(m), 4096, 4096, torch.bfloat16, "nf4", 64) for m in rows]
    tiles = [shapes.linear_config(each, gpu) for each in problems if not shapes.decodes_first(each, gpu)]
    return list(dict.fromkeys(dataclasses.replace(tile, splits=1) for tile in tiles))


def linear_loop(config, arch: str) -> tuple[Kernel, list[str]]:
    """The kernel of a ``Config``, without LoRA and bias, and its loop over k."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowbit.backends.triton.linear import copies_of_scales, linear_kernel

    names = [parameter.name for parameter in linear_kernel.params]
    constants = {
        **dict.fromkeys(("bias", "t", "lora_b"), None),
        "FORMAT": "nf4",
        "BLOCK_SIZE": 64,
        "DOUBLE_QUANT": True,
        "PORTABLE": False,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "SPLITS": 1,
        "COPIES": copies_of_scales(config),
        "WEIGHT_FIRST": config.weight_first,
    }
    signature = {**_POINTERS, **dict.fromkeys(("m", *_SIZES, "rank"), "i32"), "scaling": "fp32"}
    signature.update(dict.fromkeys(constants, "constexpr"))
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*_POINTERS, *_SIZES)}
    ordered = {name: signature[name] for name in names}
    source = ASTSource(fn=linear_kernel, signature=ordered, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "linear.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (kernel,) = disassemble(cubin, arch)
    (loop,) = [body for body in kernel.loops() if count(body, "LDGSTS")]
    return kernel, loop
