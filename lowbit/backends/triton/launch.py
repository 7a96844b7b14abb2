"""The one place that starts a Triton kernel."""

import contextlib
import contextvars
import functools

import torch

_TRACED: contextvars.ContextVar[bool] = contextvars.ContextVar("lowbit_triton_traced", default=False)


@contextlib.contextmanager
def traced():
    """Launches made meanwhile become nodes of the graph that torch.compile is making, which may fuse around them."""
    token = _TRACED.set(True)
    try:
        yield
    finally:
        _TRACED.reset(token)


def is_traced() -> bool:
    """Whether :func:`traced` is in force."""
    return _TRACED.get()


#: Triton itself asks for it.
_OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _check_device(device: torch.device) -> None:
    """RuntimeError for an NVIDIA GPU that Triton does not compile for."""
    if device.type != "cuda" or torch.version.hip:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        raise RuntimeError(
            "backend 'triton': expected a GPU of compute capability "
            f"{'.'.join(map(str, _OLDEST_CAPABILITY))} or newer, got {'.'.join(map(str, capability))} ({device}); the "
            "CUDA kernels serve it (`LOWBIT_CUDA=1 pip install .` with nvcc), or use_backend('reference')"
        )


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of the tensors' device; nothing to do for an empty grid.

    ``options`` are keyword arguments of the kernel (its constexprs) and of the compiler (``num_warps``,
    ``num_stages``). Products and sums are not contracted to FMAs unless a kernel asks for one: the format's bits are
    those of separate roundings.
    """
    if 0 in grid:
        return
    if is_traced():
        # Inductor has no such option. Only products are traced, whose bound allows for a rounding less.
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    _check_device(device)
    on_device = contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with on_device:
        kernel[grid](*arguments, enable_fp_fusion=False, **options)
