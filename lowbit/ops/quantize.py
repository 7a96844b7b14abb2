"""The ops that make and decode the bytes of a weight. None has a gradient: a stored weight is frozen."""

import torch

from .. import format as fmt
from .. import reference_descent
from ..format import WeightSpec
from .record import WEIGHT, Op, op_of


def _fake_quantize(weight, spec):
    record = WeightSpec.parse(spec)
    packed = weight.new_empty([record.packed_size(weight.numel())], dtype=torch.uint8)
    return packed, weight.new_empty([record.scale_count(weight.shape)], dtype=record.record.scales.dtype)


def _fake_quantize_scales(absmax, offset):
    groups = fmt.block_count(absmax.numel(), fmt.GROUP_SIZE)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty([groups])


def _fake_search_scales(weight, importance, spec):
    return weight.new_empty([WeightSpec.parse(spec).scale_count(weight.shape)], dtype=torch.float32)


def _fake_encode(weight, scales, spec):
    return weight.new_empty([WeightSpec.parse(spec).packed_size(weight.numel())], dtype=torch.uint8)


def _fake_gptq_block(weight, factor, candidates, spec):
    return torch.empty_like(weight), torch.empty_like(weight), weight.new_empty([len(weight)], dtype=torch.int32)


def _fake_descend_block(decoded, gradient, hessian, candidates, sweeps, spec):
    return torch.empty_like(decoded), decoded.new_empty([len(decoded)], dtype=torch.int32)


def _fake_dequantize(packed, absmax, group_scales, offset, spec, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def _fake_dequantize_out(packed, absmax, group_scales, offset, spec, out):
    return None


def _noting_the_change(namespace: str):
    op = op_of(namespace, "dequantize_out")

    def dequantize_out(keyset, *args):
        # Autograd knows by its version that a tensor saved for a backward has been overwritten.
        torch.autograd.graph.increment_version(args[-1])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return dequantize_out


OPS = (
    Op("quantize(Tensor weight, str spec) -> (Tensor, Tensor)", _fake_quantize),
    Op("quantize_scales(Tensor absmax, Tensor offset) -> (Tensor, Tensor)", _fake_quantize_scales),
    Op("search_scales(Tensor weight, Tensor? importance, str spec) -> Tensor", _fake_search_scales),
    Op("encode(Tensor weight, Tensor scales, str spec) -> Tensor", _fake_encode),
    Op(
        "gptq_block(Tensor weight, Tensor factor, Tensor candidates, str spec) -> (Tensor, Tensor, Tensor)",
        _fake_gptq_block,
        kernel=lambda namespace: reference_descent.gptq_block,
    ),
    Op(
        "descend_block(Tensor decoded, Tensor gradient, Tensor hessian, Tensor candidates, int sweeps, str spec) -> "
        "(Tensor, Tensor)",
        _fake_descend_block,
        kernel=lambda namespace: reference_descent.descend_block,
    ),
    Op(f"dequantize({WEIGHT}, int[] shape, ScalarType dtype) -> Tensor", _fake_dequantize),
    Op(f"dequantize_out({WEIGHT}, Tensor(a!) out) -> ()", _fake_dequantize_out, in_place=_noting_the_change),
)
