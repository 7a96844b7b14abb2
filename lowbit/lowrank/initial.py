"""How LoRA's factors begin, and what then remains of the weight for the base to keep."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: Methods that leave the base's weight alone: they read its shape and its device only.
RANDOM_METHODS = ("default", "gaussian", "orthogonal", "random")
#: Methods that decompose the weight. Their factors have values from the start.
DECOMPOSING_METHODS = ("pissa", "olora", "loftq")

_FAST_PISSA = re.compile(r"pissa_niter_([0-9]+)")


def is_decomposing(method: str) -> bool:
    """Whether a method takes its factors out of the weight, so that the base keeps a residual."""
    return method in DECOMPOSING_METHODS or _FAST_PISSA.fullmatch(method) is not None


def check_init(method: str, name: str = "method") -> None:
    """Return nothing; ``name`` is what errors call the argument.

    Raises:
        TypeError: ``method`` is not a string.
        ValueError: ``method`` is not a method of :func:`initial_factors`.
    """
    choices = f"{', '.join(RANDOM_METHODS + DECOMPOSING_METHODS)}, or pissa_niter_N (N: a number of iterations)"
    if not isinstance(method, str):
        raise TypeError(f"{name}: expected a string, one of {choices}, got {method!r}")
    if method not in RANDOM_METHODS + DECOMPOSING_METHODS and not _FAST_PISSA.fullmatch(method):
        raise ValueError(f"{name}: expected one of {choices}, got {method!r}")


@torch.no_grad()
def initial_factors(
    weight: torch.Tensor,
    rank: int,
    scaling: float,
    method: str,
    *,
    quantize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    loftq_iterations: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(A, B, residual)``: the first factors of a layer, and the new weight of its base.

    A is [rank, in] and B is [out, rank]; both are fp32, contiguous and on the weight's device. The residual is
    [out, in] in the weight's dtype, or None where the base keeps its weight. Nothing is changed in place. Random
    numbers come from torch's global generator.

    ==================  ============================================================================================
    default             A is uniform as nn.Linear's weight (Kaiming, a = sqrt(5)), B is zero. PEFT: True.
    gaussian            A is normal with a standard deviation of 1 / rank, B is zero.
    orthogonal          A and B are random and B A is zero, since their halves of an orthogonal basis do not meet.
                        The rank is even. Source: datta0.github.io/posts/rethink-lora-init, as in PEFT.
    random              A and B are uniform as nn.Linear's weight, so B A is not zero and the model changes. It is for
                        tests and for factors that are loaded later. PEFT: False.
    pissa               B A is the best approximation of W / scaling, split evenly between A and B. The residual is
                        W - scaling * B A. Source: Meng et al., "PiSSA", 2024 (arXiv 2404.02948).
    pissa_niter_N       pissa from a randomized SVD with N subspace iterations, which is fast and approximate.
    olora               B is the first columns of Q and A the first rows of R, with W = Q R. The residual is
                        W - scaling * B A. Source: Büyükakyüz, "OLoRA", 2024 (arXiv 2406.01775).
    loftq               B A is the best approximation of (W - Q) / scaling, where Q = quantize(what is quantized), split
                        evenly. The residual is what is quantized: None (W itself) for one iteration, and after that
                        W - scaling * B A with the factors of the iteration before. So the base has to store
                        ``quantize(residual)``, which is Q, and its sum with scaling * B A comes close to W.
                        Source: Li et al., "LoftQ", 2023 (arXiv 2310.08659). PEFT leaves the scaling out there.
    ==================  ============================================================================================

    For pissa and olora, residual + scaling * B A is W, up to fp32 rounding and one rounding to the weight's dtype.

    Args:
        weight: [out, in] in float32, float16, bfloat16 or float64; 16-bit weights are decomposed in fp32. The random
            methods do not read it.
        rank: at least 1 (not checked), at most min(out, in) for pissa, olora and loftq.
        scaling: the positive factor that the layer puts on B A (not checked).
        method: a name of the table.
        quantize: for loftq only: from a weight [out, in] in the weight's dtype to its decoded values [out, in].
        loftq_iterations: for loftq only: how often it quantizes; at least 1.

    Raises:
        TypeError: the weight is no floating-point tensor, or the method no string.
        ValueError: the weight is not 2-D, or a decomposing method finds it on the meta device, or NaN or inf in it or
            in a result; the method is unknown; the rank is too large, or odd for "orthogonal".
    """
    check_init(method)
    _check_arguments(weight, rank, method)
    device = weight.device.type
    # Without autocast, which would round products to 16 bits; it knows no meta device.
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        if method in RANDOM_METHODS:
            return *_random_factors(weight, rank, method), None
        if not weight.isfinite().all():
            raise ValueError(f"weight: expected finite numbers for method {method!r}, got NaN or inf")
        if method == "loftq":
            return _loftq(weight, rank, scaling, quantize, loftq_iterations)
        wide = _widen(weight)
        if method == "olora":
            q, r = torch.linalg.qr(wide)
            lora_a, lora_b = _as_factors(r[:rank], q[:, :rank])
        else:
            lora_a, lora_b = _best_factors(wide, rank, scaling, method)
        residual = _residual(weight, lora_a, lora_b, scaling)
        _check_results(weight, lora_a, lora_b, residual)
        return lora_a, lora_b, residual


@torch.no_grad()
def factors_of_weight(
    weight: torch.Tensor,
    transposed: bool,
    rank: int,
    scaling: float,
    method: str,
    store: Callable[[torch.Tensor], Any] | None = None,
    loftq_iterations: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`initial_factors` of a layer's weight as the layer holds it: ``(A, B, what its base holds then)``.

    Args:
        weight: [out, in, ...], of which a convolution's further dimensions count as inputs; or [in, out].
        transposed: the weight is [in, out].
        store: from a dense weight to a quantized one in the same shape; without it the base stays dense.

    Raises:
        TypeError, ValueError: see :func:`initial_factors`.
    """

    def as_held(matrix: torch.Tensor) -> torch.Tensor:
        held = (matrix.T if transposed else matrix.view(weight.shape)).contiguous()
        return store(held) if store else held

    def as_matrix(held: torch.Tensor) -> torch.Tensor:
        return held.T if transposed else held.flatten(1)

    options = {}
    if method == "loftq":
        options = {"quantize": lambda m: as_matrix(as_held(m).dequantize()), "loftq_iterations": loftq_iterations}
    matrix = as_matrix(weight.detach())
    lora_a, lora_b, residual = initial_factors(matrix, rank, scaling, method, **options)
    return lora_a, lora_b, as_held(matrix if residual is None else residual)


def random_factors(
    out_features: int, in_features: int, rank: int, method: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A, B)`` of :func:`initial_factors` by a method that leaves the base's weight alone.

    Raises:
        ValueError: the method is none of RANDOM_METHODS; the rank is odd for "orthogonal".
    """
    if method not in RANDOM_METHODS:
        raise ValueError(f"method: expected one of {', '.join(RANDOM_METHODS)}, got {method!r}")
    weight = torch.empty(1, device=device).expand(out_features, in_features)  # of no bytes, since none of them reads it
    return initial_factors(weight, rank, 1.0, method)[:2]


def _random_factors(weight: torch.Tensor, rank: int, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    out_features, in_features = weight.shape
    options = {"dtype": torch.float32, "device": weight.device}
    if method == "orthogonal":
        # The draws are PEFT's, in its order and shapes, so that a seed gives the same factors.
        basis = torch.linalg.qr(torch.randn(rank, rank, **options)).Q
        lora_a = basis[0::2].T @ torch.randn(in_features, rank // 2, **options).T
        lora_b = torch.randn(rank // 2, out_features, **options).T @ basis[1::2]
        return _as_factors(lora_a / 10, lora_b / 10)
    lora_a = torch.empty(rank, in_features, **options)
    lora_b = torch.zeros(out_features, rank, **options)
    if method == "gaussian":
        return nn.init.normal_(lora_a, std=1 / rank), lora_b
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if method == "random":
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    return lora_a, lora_b


def _loftq(weight, rank, scaling, quantize, iterations):
    residual = None
    for remaining in reversed(range(iterations)):
        decoded = quantize(weight if residual is None else residual)
        error = _widen(weight) - decoded
        _check_results(weight, error)  # an SVD of NaN raises an error that names no argument
        lora_a, lora_b = _best_factors(error, rank, scaling, "loftq")
        if remaining:
            # In the weight's dtype already here: the caller, who gets it so, then finds the same Q.
            residual = _residual(weight, lora_a, lora_b, scaling)
            _check_results(weight, residual)
    _check_results(weight, lora_a, lora_b)
    return lora_a, lora_b, residual


def _best_factors(matrix: torch.Tensor, rank: int, scaling: float, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with scaling * B A close to ``matrix``, and singular values split evenly between them."""
    if fast := _FAST_PISSA.fullmatch(method):
        u, s, v = torch.svd_lowrank(matrix, rank, niter=int(fast[1]))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return _as_factors(root[:, None] * vh[:rank], u[:, :rank] * root)


def _residual(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    wide = _widen(weight)
    return (wide - scaling * (lora_b.to(wide.dtype) @ lora_a.to(wide.dtype))).to(weight.dtype)


def _widen(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _as_factors(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies in fp32. A view would keep the whole decomposition in memory, and safetensors refuses to save one."""
    copy = {"dtype": torch.float32, "memory_format": torch.contiguous_format, "copy": True}
    return lora_a.to(**copy), lora_b.to(**copy)


def _check_arguments(weight: Any, rank: int, method: str) -> None:
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {getattr(weight, 'dtype', weight)!r}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected a shape [out, in] with at least one element, got {tuple(weight.shape)}")
    if method == "orthogonal" and rank % 2:
        raise ValueError(f"rank: expected an even number for method 'orthogonal', got {rank}")
    if method in RANDOM_METHODS:
        return
    if weight.is_meta:
        raise ValueError(f"weight: expected values for method {method!r}, got a tensor on the meta device")
    if rank > min(weight.shape):
        raise ValueError(
            f"rank: expected at most {min(weight.shape)} for method {method!r} and a weight of shape "
            f"{tuple(weight.shape)}, got {rank}"
        )


def _check_results(weight: torch.Tensor, *results: torch.Tensor) -> None:
    if not all(bool(result.isfinite().all()) for result in results):
        largest = weight.abs().max().item()
        raise ValueError(
            f"weight: expected numbers whose decomposition fits {weight.dtype}, got NaN or inf in it; the largest is "
            f"{largest:.3g}"
        )
