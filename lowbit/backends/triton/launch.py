"""The one place that starts a Triton kernel."""

import torch


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of the tensors' device; nothing to do for an empty grid.

    ``options`` are keyword arguments of the kernel (its constexprs) and of the compiler (``num_warps``,
    ``num_stages``). Products and sums are not contracted to FMAs unless a kernel asks for one: the format's bits are
    those of separate roundings.
    """
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    with torch.get_device_module(device).device(device) if device.type != "cpu" else _NoDevice():
        kernel[grid](*arguments, enable_fp_fusion=False, **options)


class _NoDevice:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False
