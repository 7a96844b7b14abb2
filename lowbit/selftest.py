"""A numeric self-test of every kernel set that can run here, against the fp32 reference."""

import torch

from . import backends, ops  # noqa: F401  (ops registers what torch.ops looks up)


def isa_names() -> list[str]:
    """The instruction sets the native CPU kernels can use on this machine, the widest first."""
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
        results += [(f"native {isa}: {name}", problem) for name, problem in _compare("lowbit")]
    if isa_names():
        torch.ops.lowbit.set_cpu_isa("auto")
    if backends.native.missing_cuda_reason() is None and torch.cuda.is_available():
        results += [(f"CUDA: {name}", problem) for name, problem in _compare("lowbit", "cuda")]
    for device in triton_devices():
        results += [(f"Triton on {device}: {name}", problem) for name, problem in _compare("lowbit_triton", device)]
    results += [(f"reference: {name}", problem) for name, problem in _compare("lowbit_reference")]
    return results


class _OnDevice:
    """The ops of a namespace, run on a device: arguments are copied there and results back."""

    def __init__(self, namespace: str, device: str):
        self.ops, self.device = getattr(torch.ops, namespace), device

    def __getattr__(self, name: str):
        def run(*args):
            moved = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args]
            result = getattr(self.ops, name)(*moved)
            return result.cpu() if isinstance(result, torch.Tensor) else tuple(part.cpu() for part in result)

        return run


def _compare(namespace: str, device: str = "cpu") -> list[tuple[str, str | None]]:
    """Each op of ``namespace`` on ``device`` against dense fp64 arithmetic and the reference's bytes."""
    tested, oracle = _OnDevice(namespace, device), torch.ops.lowbit_reference
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 200, generator=generator)
    x = torch.randn(5, 200, generator=generator)
    grad = torch.randn(5, 96, generator=generator)
    results = []
    for format in ("nf4", "fp4"):
        spec = f"{format}:64:double_quant"
        packed, absmax = tested.quantize(weight, spec)
        offset = absmax.mean()
        codes, group_scales = tested.quantize_scales(absmax, offset)
        same = all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(
                (packed, absmax, codes, group_scales),
                (*oracle.quantize(weight, spec), *oracle.quantize_scales(absmax, offset)),
                strict=True,
            )
        )
        results.append((f"{format} quantize", None if same else "bytes differ from the reference's"))

        parts = (packed, codes, group_scales, offset, spec)
        decoded = tested.dequantize(*parts, [96, 200], torch.float32)
        same = torch.equal(decoded, oracle.dequantize(*parts, [96, 200], torch.float32))
        # Not only equal to the reference but near the weight: half the widest gap of the codebook is 0.152 (NF4) or
        # 0.167 (FP4) of a block's scale, and double quantization moves the scale a little.
        limit = 0.17 if format == "nf4" else 0.19
        near = bool(((decoded - weight).abs() <= limit * weight.abs().max()).all())
        results.append((f"{format} dequantize", None if same and near else "decoded weights are wrong"))

        y = tested.linear(x, *parts, 96, None, None, None, 1.0)
        results.append((f"{format} linear", _difference(y, x.double() @ decoded.double().T)))
        grad_x = tested.linear_grad_input(grad, *parts, 200)
        results.append((f"{format} linear backward", _difference(grad_x, grad.double() @ decoded.double())))
        # bf16 has kernels of its own on some CPUs, which round W to it: 2^-8 of each weight, and of the output.
        half = x.bfloat16()
        y = tested.linear(half, *parts, 96, None, None, None, 1.0)
        results.append((f"{format} linear in bf16", _difference(y, half.double() @ decoded.double().T, 2**-7)))
        # As many rows as no kernel for a few takes.
        many = half.repeat(60, 1)
        y = tested.linear(many, *parts, 96, None, None, None, 1.0)
        results.append((f"{format} linear of 300 rows", _difference(y, many.double() @ decoded.double().T, 2**-6)))

    packed, absmax = tested.quantize(weight, "int8")
    same = all(map(torch.equal, (packed, absmax), oracle.quantize(weight, "int8")))
    results.append(("int8 quantize", None if same else "bytes differ from the reference's"))
    parts = (packed, absmax, None, None, "int8")
    decoded = tested.dequantize(*parts, [96, 200], torch.float32)
    same = torch.equal(decoded, oracle.dequantize(*parts, [96, 200], torch.float32))
    near = bool(((decoded - weight).abs() <= 0.51 / 127 * weight.abs().max()).all())
    results.append(("int8 dequantize", None if same and near else "decoded weights are wrong"))
    y = tested.linear(x, *parts, 96, None, None, None, 1.0)
    results.append(("int8 linear", _difference(y, x.double() @ decoded.double().T)))
    grad_x = tested.linear_grad_input(grad, *parts, 200)
    results.append(("int8 linear backward", _difference(grad_x, grad.double() @ decoded.double())))
    return results


def _difference(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> str | None:
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    return None if error < limit else f"relative error {error:.1e}"
