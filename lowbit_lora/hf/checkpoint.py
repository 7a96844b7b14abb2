"""Quantized weights in checkpoint files: the tensors of each, and how transformers' loader puts them together again.

The keys are those of bitsandbytes, whose folders are read the same way: "x.weight", "x.weight.absmax" and so on, also
for stacks of experts ("experts.gate_up_proj.absmax"). An int8 weight has two, "x.weight" and "x.weight.absmax".
"""

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from lowbit import QuantizedTensor, WeightSpec, files
from lowbit.checks import named_errors

from ..heap import return_memory

#: What follows a weight's name in the keys of its tensors. The first is the codes' own key.
ENDS = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
_ABSMAX = ".absmax"


def to_tensors(name: str, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a weight, by their keys."""
    if q.stored.transposed:  # LowbitConfig.conv1d_transposed
        q = q.transpose(-1, -2)
    if q.spec.format == "int8":
        return {name: q.packed, name + _ABSMAX: q.absmax}
    return files.to_state(q, name)


def from_tensors(
    name: str, tensors: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype, transposed: bool = False
) -> QuantizedTensor:
    """The weight of these tensors, whose keys are among :data:`ENDS`; ``transposed``: it is stored the other way round.

    Raises:
        ValueError, TypeError: they are no whole weight of this shape; it is named.
    """
    with named_errors(name):
        # bitsandbytes can store the bytes as if they were floats, for FSDP.
        codes = tensors[""].contiguous().view(-1).view(torch.uint8)
        if len(tensors) == 2:
            return QuantizedTensor(codes, tensors[_ABSMAX], shape=shape, dtype=dtype, spec=WeightSpec("int8"))
        q = files.from_state({f"weight{end}": tensor for end, tensor in tensors.items()} | {"weight": codes})
        if transposed:
            q = q.transpose(-1, -2)
        if q.shape != shape:
            raise ValueError(f"expected shape {tuple(shape)}, got {tuple(q.shape)} in the file")
        return q.to(dtype)


def quantized_keys(paths: list[str]) -> dict[str, str]:
    """The keys of the codes of all quantized weights in safetensors files -> the dtype in which they are stored.

    Raises:
        OSError: a file is missing, truncated or corrupt; it is named.
    """
    dtypes, scales = {}, []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    dtypes[key] = file.get_slice(key).get_dtype()
                    if key.endswith(_ABSMAX):
                        scales.append(key.removesuffix(_ABSMAX))
        except SafetensorError as error:
            raise OSError(f"{path}: expected a whole file, but it is truncated or corrupt ({error})") from error
    return {key: dtypes[key] for key in scales if key in dtypes}


class QuantizedParts(WeightConverter):
    """Collects the tensors of each quantized weight, for :class:`Restore`.

    A pattern would not do: that of the codes ("x.weight") fits dense weights too.
    """

    def __init__(self, names: frozenset[str], restore: "Restore"):
        super().__init__(list(ENDS), "weight", operations=[restore])
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        for end in ENDS:
            name = source_key.removesuffix(end)
            if name in self.names and name + end == source_key:
                self._was_used = True
                return name, end
        return source_key, None

    def __deepcopy__(self, memo):
        return QuantizedParts(self.names, self.operations[0])


class _Step(ConversionOps):
    """What the loader does to a weight. An error is kept for the quantizer: the loader would only log it."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer  # by this name transformers knows that the tensors keep their dtypes

    def __deepcopy__(self, memo):
        return self

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        try:
            return self.converted(input_dict, full_layer_name, model)
        except (TypeError, ValueError) as error:
            self.hf_quantizer.errors.append(error)
            return {}


class Quantize(_Step):
    """Quantizes weights as they come from a dense checkpoint."""

    def converted(self, input_dict, full_layer_name, model):
        converted = {}
        while input_dict:  # so that no dense weight outlives its turn
            name, value = input_dict.popitem()
            converted[name] = self.hf_quantizer.quantized(model, name, value[0] if isinstance(value, list) else value)
            del value
            return_memory()
        return converted


class Restore(_Step):
    """Puts a quantized weight together."""

    def converted(self, input_dict, full_layer_name, model):
        tensors = {end: value[0] if isinstance(value, list) else value for end, value in input_dict.items()}
        return {full_layer_name: self.hf_quantizer.restored(model, full_layer_name, tensors)}


def frozen(q: QuantizedTensor) -> nn.Parameter:
    """The weight as a parameter."""
    return nn.Parameter(q, requires_grad=False)
