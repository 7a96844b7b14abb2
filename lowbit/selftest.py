"""A numeric self-test of every kernel set that can run here, against the fp32 reference."""

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from . import backends
from .ops.samples import ROWS, samples


def isa_names() -> list[str]:
    """The instruction sets the native CPU kernels can use on this machine, the fastest first."""
    if backends.native.missing_reason() is not None:
        return []
    return torch.ops.lowbit.cpu_isas()


def triton_devices() -> list[str]:
    """Where the Triton kernels can run: the GPUs there are, and in Triton's interpreter the CPU."""
    if backends.triton.missing_reason() is not None:
        return []
    has = {"cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available(), "cpu": True}
    return [device for device in backends.triton.DEVICE_TYPES if has.get(device)]


def run() -> list[tuple[str, str | None]]:
    """Pairs (what was tested, None or what went wrong)."""
    results = []
    for isa in isa_names():
        torch.ops.lowbit.set_cpu_isa(isa)
        try:
            results += [(f"native {isa}: {name}", problem) for name, problem in _compare("lowbit")]
        finally:
            torch.ops.lowbit.set_cpu_isa("auto")
    if backends.native.missing_cuda_reason() is None and torch.cuda.is_available():
        results += [(f"CUDA: {name}", problem) for name, problem in _compare("lowbit", "cuda")]
    for device in triton_devices():
        results += [(f"Triton on {device}: {name}", problem) for name, problem in _compare("lowbit_triton", device)]
    results += [(f"reference: {name}", problem) for name, problem in _compare("lowbit_reference")]
    return results


class _OnDevice:
    """The ops of a namespace, run on a device: arguments are copied there, and results back as a tuple."""

    def __init__(self, namespace: str, device: str):
        self.ops, self.device = getattr(torch.ops, namespace), device

    def __getattr__(self, name: str):
        op = getattr(self.ops, name).default
        named = op._schema.arguments

        def run(*args):
            # A copy, since an op may write into an argument.
            moved = [
                tree_map_only(torch.Tensor, lambda a: a.to(self.device, copy=True), value)
                if argument.name not in _ON_THE_HOST
                else value
                for argument, value in zip(named, args, strict=True)
            ]
            result = op(*moved)
            if result is None:
                result = [value for argument, value in zip(named, moved, strict=True) if argument.is_write]
            return tuple(part.cpu() for part in tree_leaves(result))

        return run


#: Arguments of any op that are read by the host.
_ON_THE_HOST = ("layout", "constants")


def _compare(namespace: str, device: str = "cpu") -> list[tuple[str, str | None]]:
    """Each op of ``namespace`` on ``device`` against the reference, and the reference against dense fp64 arithmetic."""
    tested, oracle = _OnDevice(namespace, device), _OnDevice("lowbit_reference", "cpu")
    results = []
    # As many rows as no kernel for a few takes; bf16 has kernels of its own on some CPUs.
    for dtype, rows in ((torch.float32, ROWS), (torch.bfloat16, ROWS), (torch.bfloat16, 300)):
        for name, what, arguments in samples(dtype, rows):
            if rows == ROWS or "linear" in name:
                problem = _problem(name, getattr(tested, name)(*arguments), getattr(oracle, name)(*arguments), dtype)
                results.append((f"{name} {what} in {str(dtype).removeprefix('torch.')}, {rows} rows", problem))
    return [*results, *_near_the_weight(tested)]


#: Ops whose results are a matter of bits.
_EXACT = (
    *("quantize", "quantize_scales", "search_scales", "encode", "gptq_block", "descend_block"),
    *("dequantize", "dequantize_out", "optimizer_step"),
)


def _problem(name: str, ours: tuple, theirs: tuple, dtype: torch.dtype) -> str | None:
    for actual, expected in zip(ours, theirs, strict=True):
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            return f"expected {expected.dtype} {tuple(expected.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        if name in _EXACT:
            if not torch.equal(actual, expected):
                return "other bits than the reference's"
        else:
            # Some kernels round W to bf16: 2^-8 of each weight, and 2^-8 of the output.
            problem = _difference(actual, expected.double(), 1e-5 if dtype == torch.float32 else 2**-6)
            if problem is not None:
                return problem
    return None


def _near_the_weight(tested: "_OnDevice") -> list[tuple[str, str | None]]:
    """Not only equal to the reference: decoded weights are near the weight, products near those of decoded weights."""
    generator, results = torch.Generator().manual_seed(0), []
    weight, x = torch.randn(96, 200, generator=generator), torch.randn(5, 200, generator=generator)
    # Half the widest gap of the codebook is 0.152 (NF4) or 0.167 (FP4) of a block's scale; int8's step is 1 / 127.
    for spec, limit in (("nf4:64", 0.16), ("fp4:64", 0.17), ("int8", 0.51 / 127)):
        packed, absmax = tested.quantize(weight, spec)
        (decoded,) = tested.dequantize(packed, absmax, None, None, spec, [96, 200], torch.float32)
        near = bool(((decoded - weight).abs() <= limit * weight.abs().max()).all())
        results.append((f"{spec} decoded", None if near else "decoded weights are far from the weight"))
        (y,) = tested.linear(x, packed, absmax, None, None, spec, 96, None, None, None, 1.0)
        results.append((f"{spec} multiplied", _difference(y, x.double() @ decoded.double().T)))
    return results


def _difference(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> str | None:
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    return None if error < limit else f"relative error {error:.1e}"
