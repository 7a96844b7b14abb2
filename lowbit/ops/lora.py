"""LoRA's own products as ops, for what no op with a weight computes: LoRA beside a dense weight, and on dropped x.

On a GPU they read activations in their own dtype, without a copy in fp32; t is fp32. :class:`lowbit.ops.linear.Product`
calls them where there are kernels, below autograd.
"""

import torch

from .record import Op, without_backward


def _fake_lora_down(x, factor, scale):
    return x.new_empty([*x.shape[:-1], factor.shape[0]], dtype=torch.float32)


def _fake_lora_up(t, factor, bias, scale, dtype):
    return t.new_empty([*t.shape[:-1], factor.shape[0]], dtype=dtype)


def _fake_lora_outer(wide, low, scale, is_transposed):
    sizes = [wide.shape[-1], low.shape[-1]]
    return low.new_empty(sizes[::-1] if is_transposed else sizes)


OPS = (
    Op(
        "lora_down(Tensor x, Tensor factor, float scale) -> Tensor",
        _fake_lora_down,
        without_backward("lora_down", (0, 1)),
    ),
    Op(
        "lora_up(Tensor t, Tensor factor, Tensor? bias, float scale, ScalarType dtype) -> Tensor",
        _fake_lora_up,
        without_backward("lora_up", (0, 1, 2)),
    ),
    Op(
        "lora_outer(Tensor wide, Tensor low, float scale, bool is_transposed) -> Tensor",
        _fake_lora_outer,
        without_backward("lora_outer", (0, 1)),
    ),
)
