"""Shapes, dtypes and tolerances of the tests, listed once."""

import math

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import format as fmt
from lowbit import selftest

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

#: (out_features, in_features) that hurt: 1, odd, blocks that cross rows, rows that start inside a byte, empty.
LINEAR_SHAPES = ((1, 1), (3, 5), (7, 64), (33, 130), (96, 384), (17, 513), (130, 192), (64, 4096), (0, 64), (4, 0))
#: Rows of x: none, the matrix-vector path, its edge, that of few rows, ragged tiles.
ROWS = (0, 1, 2, 3, 4, 5, 16, 17, 33)

#: Every set of kernels that runs here: a context manager name for ``kernels`` below.
KERNELS = tuple(f"native-{isa}" for isa in selftest.isa_names()) + ("reference",)

dtypes = st.sampled_from(DTYPES)
formats = st.sampled_from(FORMATS)
block_sizes = st.sampled_from(BLOCK_SIZES)
#: From where fp32 is subnormal to where squares overflow. float16 weights are clamped to its range.
magnitudes = st.sampled_from((1e-42, 1e-30, 1e-6, 0.02, 1.0, 1e4, 1e30))

#: Half a unit in the last place of 1.0: the relative error of one rounding to nearest.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Half the spacing of the subnormal numbers: the absolute error of one rounding near zero.
TINY_ROUNDOFF = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def codebook_rounding(format: str, dtype: torch.dtype) -> float:
    """Largest relative error of the codebook when it is rounded to ``dtype``."""
    codebook = fmt.codebook(format).double()
    return float(((codebook.to(dtype).double() - codebook).abs() / codebook.abs().clamp(min=1e-9)).max())


def codebook_error(kernels: str, format: str, dtype: torch.dtype, rows: int, k: int) -> float:
    """Largest relative error of the codebook: two sets of kernels round it to bf16 for up to four rows of bf16."""
    if kernels not in ("native-avx2", "native-avx512bf16") or dtype != torch.bfloat16 or not 1 <= rows <= 4 or k % 64:
        return 0.0
    return codebook_rounding(format, torch.bfloat16)


def weight_error(kernels: str, format: str, dtype: torch.dtype, rows: int, k: int) -> float:
    """Largest relative error of a weight as ``linear`` multiplies it.

    The kernels of AVX512-BF16 and AMX round weights to bf16 for bf16 activations (``few_rows.h``, ``bf16_gemm.h``): for
    more than four rows, on AVX512-BF16 more than two of 4-bit weights, or 4-bit weights whose chunks of 64 cross rows.
    Their sums stay within Higham's bound: products
    of two bf16 are exact in fp32. (They take subnormals for zero; no test of products has any.)
    """
    most = 2 if kernels == "native-avx512bf16" and format != "int8" else 4
    if rows > most or (format != "int8" and k % 64):
        return _bf16_weights(kernels, dtype)
    return 0.0 if format == "int8" else codebook_error(kernels, format, dtype, rows, k)


def weight_error_backward(kernels: str, format: str, dtype: torch.dtype, rows: int, k: int) -> float:
    """`weight_error` of ``linear_grad_input``, where few rows times int8 go to ``bf16_gemm.h`` too."""
    return _bf16_weights(kernels, dtype) if rows > 4 or format == "int8" or k % 64 else 0.0


def _bf16_weights(kernels: str, dtype: torch.dtype) -> float:
    rounds = kernels in ("native-avx512bf16", "native-amx") and dtype == torch.bfloat16
    return UNIT_ROUNDOFF[dtype] if rounds else 0.0


def rounds_to_int8(kernels: str, dtype: torch.dtype, rows: int, k: int) -> bool:
    """Whether ``precision="int8"`` rounds 4-bit weights and activations. The exact product serves where it is faster.

    That is for any number of rows on AVX-512 without VNNI, and for more than 16 with it: of bf16 for more than one row
    where it is multiplied in pairs, and for more than four where it is by tiles.
    """
    if k % 64 or kernels == "native-avx512":
        return False
    most = {"native-avx512bf16": 1, "native-amx": 4}.get(kernels, 16) if dtype == torch.bfloat16 else 16
    return rows <= most or kernels not in ("native-avx512vnni", "native-avx512bf16", "native-amx")


def weight_error_cuda(format: str, dtype: torch.dtype) -> float:
    """`weight_error` of the CUDA kernels, where tensor cores multiply the codebook in 16 bits and scale sums in fp32.

    Products of two such numbers are exact in fp32.
    """
    return 0.0 if format == "int8" or dtype == torch.float32 else codebook_rounding(format, dtype)


def gemm_tolerance(
    magnitude: torch.Tensor,
    lora_magnitude: torch.Tensor,
    exact: torch.Tensor,
    terms: int,
    format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Bound on |computed - exact| where CUDA kernels multiply on tensor cores; ``magnitude`` includes LoRA's.

    The codebook is rounded to ``dtype``. Its products with x are exact in fp32, so the sums that scales multiply err by
    their additions alone. Tensor cores truncate sums instead of rounding them, which costs 2 u for each. Source: Fasi,
    Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021.
    LoRA's factors are sums of two bf16 (v = high + low + error, |low| <= 2^-8 |v|, |error| <= 2^-16 |v|), and low times
    low is left out: 3 * 2^-16 of its magnitude, to first order; 4 * 2^-16 covers the second.
    Each of its terms is three.
    """
    return (
        product_tolerance(magnitude, exact, 2 * terms, dtype, codebook_rounding(format, dtype))
        + 4 * 2.0**-16 * lora_magnitude
    )


def lora_tolerance(
    magnitude: torch.Tensor,
    exact: torch.Tensor,
    terms: int,
    operands: tuple[torch.dtype, torch.dtype],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Bound on |computed - exact| of the CUDA products of LoRA, whose operands are sums of bf16 on tensor cores.

    bf16 is one, fp16 exactly two, fp32 two to 2^-16 of it. Where both operands have two, low times low, 2^-16 of the
    product, is left out; 1.01 covers the second order. Each term is as many as there are products, and their sums are
    truncated, as in :func:`gemm_tolerance`.
    """
    has_two = [operand != torch.bfloat16 for operand in operands]
    lost = 2.0**-16 * (operands.count(torch.float32) + all(has_two))
    return product_tolerance(magnitude, exact, 2 * terms * (1 + sum(has_two)), dtype, 1.01 * lost)


def product_tolerance(
    magnitude: torch.Tensor, exact: torch.Tensor, terms: int, dtype: torch.dtype, weight_error: float = 0.0
) -> torch.Tensor:
    """Bound on |computed - exact| of a dot product accumulated in fp32 and rounded once to ``dtype``.

    ``magnitude`` is the same product with every factor's absolute value. Summing n terms in any order errs by at most
    (n - 1) u of it, each term's own roundings (codebook times scale, times x, times scaling) by 3 u more, to first
    order; source: Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2. 8 u covers lane sums, bias
    and the second order; ``weight_error`` is the relative error of each weight. Then half a unit in the last place for
    the output's rounding.
    """
    accumulated = ((terms + 8) * UNIT_ROUNDOFF[torch.float32] + weight_error) * magnitude
    return accumulated + UNIT_ROUNDOFF[dtype] * (exact.abs() + accumulated) + TINY_ROUNDOFF[dtype]


def tensor_core_tolerance(
    magnitude: torch.Tensor,
    exact: torch.Tensor,
    terms: int,
    dtype: torch.dtype,
    operand: torch.Tensor,
    lora_magnitude: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """:func:`product_tolerance` of a CUDA kernel that rounds each weight once to ``dtype`` for the tensor cores.

    That is a relative error of 2^-8 in bf16 and 2^-11 in fp16, and near zero an absolute one of TINY_ROUNDOFF, which
    the other operand multiplies (``operand``: the sums of its absolute values that go into each element). Tensor cores
    cut off what does not fit where fp32 arithmetic rounds, which doubles the error of each sum: twice the terms. (Fasi
    et al., "Numerical behavior of NVIDIA tensor cores", 2021.) LoRA's factors, whose magnitude is not in ``magnitude``,
    are not rounded to ``dtype``: as in :func:`gemm_tolerance`, each of their terms being three.
    """
    rounding = UNIT_ROUNDOFF[dtype] * magnitude + 4 * 2.0**-16 * lora_magnitude
    tolerance = product_tolerance(magnitude + lora_magnitude, exact, 2 * terms, dtype)
    return tolerance + (1 + UNIT_ROUNDOFF[dtype]) * rounding + 1.01 * TINY_ROUNDOFF[dtype] * operand


def scaled_codebook_tolerance(
    magnitude: torch.Tensor,
    exact: torch.Tensor,
    terms: int,
    format: str,
    dtype: torch.dtype,
    operand: torch.Tensor,
    lora_magnitude: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """:func:`tensor_core_tolerance` of a Triton kernel that multiplies the 16-bit codebook by its scale in 16 bits.

    The scale is the sum s = high + low of two such numbers, off by u^2 s; the weight is fma(value, high, value * low),
    so rounded once more (u), after an inner rounding of u * |value * low| <= u^2 |value * s|: the codebook's rounding,
    u and 3 u^2. Near zero the scale, low, the inner product and the result are off by TINY_ROUNDOFF each, and no value
    is larger than 1: 4 of them. LoRA's factors: as in :func:`gemm_tolerance`, each term being three. ``magnitude``
    includes LoRA's.
    """
    if dtype == torch.float32:
        return product_tolerance(magnitude, exact, terms, dtype)
    u = UNIT_ROUNDOFF[dtype]
    weight = u + 3 * u * u + (0.0 if format == "int8" else codebook_rounding(format, dtype) * (1 + 2 * u))
    tolerance = product_tolerance(magnitude, exact, 2 * terms, dtype, weight)
    return tolerance + (1 + 2 * u) * (4 * TINY_ROUNDOFF[dtype] * operand + 4 * 2.0**-16 * lora_magnitude)


def assert_within(actual: torch.Tensor, exact: torch.Tensor, tolerance: torch.Tensor) -> None:
    """Assert that every |actual - exact| <= tolerance. The message names the worst element."""
    error = (actual.double() - exact).abs()
    excess = torch.where(error <= tolerance, 0.0, error - tolerance)
    if excess.numel() and bool((excess != 0).any()):  # NaN counts as wrong
        worst = int(torch.nan_to_num(excess, nan=float("inf")).argmax())
        got, want = actual.flatten()[worst].item(), exact.flatten()[worst].item()
        pytest.fail(f"element {worst}: got {got}, expected {want} +- {tolerance.flatten()[worst].item():.3g}")


def make_weight(shape, dtype=torch.float32, magnitude=0.02, seed=0) -> torch.Tensor:
    """A random finite weight, its first block's worth of elements zero where it is large enough."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
    if weight.numel() > 300:
        weight.view(-1)[64:128] = 0
    limit = torch.finfo(dtype).max / 2
    return weight.clamp(-limit, limit).to(dtype)


def gram(k, tokens=None, seed=0, dead=(), massive=None):
    """X^T X of correlated inputs; ``dead`` channels are zero, and one token is ``massive`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator)
    x = torch.randn(tokens or 4 * k, k, generator=generator) @ mix * torch.rand(k, generator=generator)
    x[:, list(dead)] = 0
    if massive:
        x[0] *= massive
    return x.T @ x


def descent_case(rows, columns, count, seed):
    """``(weight, Hessian, U, candidate scales)`` of one block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[rows // 2 : rows // 2 + 1] = 0
    curvature = lowbit.quantizers.Curvature(gram(columns, seed=seed))
    order, upper = curvature.factor(columns)
    factors = torch.cat([torch.ones(1), 0.6 + 0.5 * torch.rand(count - 1, generator=generator)])
    factors[2::3] *= -1
    candidates = weight.abs().amax(1, keepdim=True) * factors
    return weight[:, order], curvature.damped[order][:, order], upper, candidates


def rounded_factors(low, up, dtype, scaling=1.0):
    """LoRA's factors [m, rank] and [n, rank] as every backend must round them for a product in ``dtype``, bit for bit.

    In fp16, up takes over a large scaling, and the part of a component of low that is beyond 2^15.
    """
    if scaling != 1:
        low = low.float() * scaling
    if dtype == torch.float16:
        largest = torch.linalg.vector_norm(low.float().nan_to_num(0.0, 0.0, 0.0), math.inf, 0)
        moved = (largest / 2**15).clamp(max(1.0, abs(scaling)), 2.0**15)
        low, up = low / moved, up * moved
    return low.to(dtype), up.to(dtype)


def factors(m, n, rank, low_dtype, up_dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of LoRA, some of them beyond fp16, infinite, NaN, negative zeros or tiny."""
    generator = torch.Generator().manual_seed(m + 7 * n + rank)
    low, up = (torch.randn(rows, rank, generator=generator) for rows in (m, n))
    low *= 10.0 ** (torch.arange(rank) % 6 * 2 - 3)
    low[m // 2, ::3], low[m // 3, 1::4], low[-1, 2::5], low[0, 5::7] = math.inf, math.nan, -math.inf, 3e38
    low[1:2], up[1:2] = -0.0, 1e-42
    up[n // 2, ::2], up[-1, 1::2] = math.inf, math.nan
    return low.to(low_dtype), up.to(up_dtype)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equal dtype, shape and elements, signs of zeros included, but not the payload of a NaN."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    ours, theirs = ours.contiguous(), theirs.contiguous()
    assert torch.equal(ours.isnan(), theirs.isnan())
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    number = ~theirs.isnan()
    assert torch.equal(ours.view(bits)[number], theirs.view(bits)[number])


class CalledOps(TorchDispatchMode):
    """Context that notes which of torch's ops are called, also inside the CPU kernels of the namespace ``into``."""

    def __init__(self, into: str | None = None):
        super().__init__()
        self.into, self.ops = into, []

    @property
    def names(self) -> list[str]:
        return [op.name() for op in self.ops]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if lowbit.QuantizedTensor in types:
            return NotImplemented  # the weight's own dispatch calls others, which come here
        self.ops.append(op)
        if op.namespace != self.into:
            return op(*args, **(kwargs or {}))
        with self:
            return op._op_dk(torch._C.DispatchKey.CPU, *args)


class kernels:
    """Context in which ops run on one of :data:`KERNELS`."""

    def __init__(self, name: str):
        backend, _, self.isa = name.partition("-")
        self.backend = lowbit.use_backend(backend)

    def __enter__(self):
        self.backend.__enter__()
        if self.isa:
            torch.ops.lowbit.set_cpu_isa(self.isa)

    def __exit__(self, *error):
        if self.isa:
            torch.ops.lowbit.set_cpu_isa("auto")
        return self.backend.__exit__(*error)
