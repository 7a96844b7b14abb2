"""LowbitQuantizer: how transformers quantizes, loads and saves a model by a LowbitConfig.

The interface moved between transformers 5.5 and 5.24. Both are served: ``get_weight_conversions`` is the older one's
way to read quantized files, ``update_weight_conversions`` the newer one's.
"""

import importlib.util
import warnings

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lowbit import QuantizedTensor, dequantize_, models
from lowbit.checks import named_errors
from lowbit.format import check_float_dtype
from lowbit.modules import find_weights
from lowbit.quantizers.quantize import quantize_to

from . import bitsandbytes, checkpoint, experts, parallel, saving
from .config import FORMAT_VERSION, METHOD, LowbitConfig


class LowbitQuantizer(HfQuantizer):
    """Quantizes a model while it is loaded, or loads one that is quantized. Made by transformers."""

    requires_calibration = False
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        #: The errors of single weights, which are raised once transformers has read the others.
        self.errors: list[Exception] = []
        #: The weights that are, or will be, quantized: by the model's names, and by those in the files.
        self.names: frozenset[str] = frozenset()
        self._keys: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._devices: set[str] = set()
        self._loading: nn.Module | None = None
        #: What is written beside the format's version into the metadata of files.
        self.metadata: dict[str, str] = {}

    # ---- what transformers asks

    is_trainable = True
    is_qat_trainable = True  # without it Trainer refuses models that PEFT has not wrapped
    is_compileable = True

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        parallel.check_not_zero3()
        if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
            moved = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
            if moved:
                raise ValueError(
                    f"device_map: expected every weight on a device that computes, got {moved[0] or 'all'!r} on "
                    f"{device_map[moved[0]]!r}; lowbit does not offload"
                )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: expected every weight in memory, got 'disk'; lowbit does not offload")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        check_float_dtype("dtype", dtype)
        return dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        self.check_not_split()
        return param_name in self.names

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes per weight, by which transformers plans a device_map."""
        if param_name not in self.names:
            return param.element_size()
        return quantize_to(torch.empty_like(param, device="meta"), self.quantization_config.spec).nbytes / param.numel()

    def adjust_max_memory(self, max_memory: dict) -> dict:
        """Leaves room for a dense weight while it is quantized."""
        return {device: size * 0.9 if isinstance(size, (int, float)) else size for device, size in max_memory.items()}

    # ---- loading

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        self._loading = model
        are_safe = bool(checkpoint_files) and all(str(path).endswith(".safetensors") for path in checkpoint_files)
        self._keys = checkpoint.quantized_keys(checkpoint_files) if are_safe else {}
        if not self.pre_quantized:
            if self._keys:
                raise ValueError(
                    f"quantization_config: expected a dense model, but {next(iter(self._keys))!r} is quantized in "
                    f"{checkpoint_files[0]}; leave quantization_config out, and keep the one in config.json"
                )
            self.names = weights_to_quantize(model, self.quantization_config)
        elif not self._keys:
            raise ValueError(
                "model: expected safetensors files with quantized weights, as the quantization_config in config.json "
                f"says, got none in {', '.join(map(str, checkpoint_files or [])) or 'a state dict'}"
            )
        else:
            self._expect_stored(model)

    def _expect_stored(self, model: nn.Module) -> None:
        """Find the parameters of the quantized weights in the files."""
        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        self._keys = {_renamed(key, renamings): dtype for key, dtype in self._keys.items()}
        prefix = f"{model.base_model_prefix}."
        names = {}
        for key, dtype in self._keys.items():  # a base model may be loaded from a model with a head, and the reverse
            names |= {name: dtype for name in (key, key.removeprefix(prefix), prefix + key)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.names = frozenset(names.keys() & parameters.keys())
        for name in self.names:
            self._dtypes[name] = parameters[name].dtype
            stored = _FLOATS.get(names[name])
            if stored is not None:
                # transformers casts what is a float in the file to the parameter's dtype, but these floats are codes.
                meta = torch.empty_like(parameters[name], dtype=stored, device="meta")
                _put(model, name, nn.Parameter(meta, requires_grad=False))

    def get_quantize_ops(self) -> checkpoint.Quantize:
        return checkpoint.Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What transformers 5.5 adds to the model's own conversions."""
        if not self.pre_quantized:
            return []
        return [checkpoint.QuantizedParts(frozenset(self._keys), checkpoint.Restore(self))]

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """All conversions, for newer versions. Ours is the first: no other should touch a part of a weight."""
        return self.get_weight_conversions() + weight_conversions

    def quantized(self, model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
        """The weight that was read, as it is to be stored."""
        self._check_not_offloaded(name, value)
        if name not in self.names:
            return value
        transposed = self._is_transposed(model, name)
        with named_errors(name):
            stored = value.T.contiguous() if transposed else value
            q = quantize_to(stored, self.quantization_config.spec, self.quantization_config.scale)
        return checkpoint.frozen(q.T if transposed else q)

    def restored(self, model: nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> nn.Parameter:
        """The weight of the tensors that were read."""
        self._check_not_offloaded(name, tensors[""])
        shape, transposed = model.get_parameter(name).shape, self._is_transposed(model, name)
        return checkpoint.frozen(checkpoint.from_tensors(name, tensors, shape, self._dtypes[name], transposed))

    def _is_transposed(self, model: nn.Module, name: str) -> bool:
        """Whether a weight is stored as [out, in] and is [in, out] in the model."""
        module = model.get_submodule(name.rpartition(".")[0])
        return self.quantization_config.conv1d_transposed and isinstance(module, Conv1D)

    def check_not_split(self) -> None:
        """ValueError if the model is split. Not before weights are read: transformers splits it just then."""
        parallel.check_not_split(self._loading)

    def _check_not_offloaded(self, name: str, value: torch.Tensor) -> None:
        self._devices.add(value.device.type)
        if "cpu" in self._devices and len(self._devices) > 1:
            raise ValueError(
                f"device_map: expected every weight on a device that computes, but {name!r} would be on the host; "
                "lowbit does not offload"
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if self.errors:
            raise self.errors[0]
        # Saving undoes these conversions: those of tensors, as of experts into a stack, cannot be undone here.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not isinstance(c, WeightConverter)]
        self._keys, self._dtypes, self._loading = {}, {}, None
        saving.install()
        return experts.use(model)

    def __setstate__(self, state: dict) -> None:
        """A model was unpickled, maybe where none had been loaded."""
        vars(self).update(state)
        saving.install()

    # ---- afterwards

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = {}
        for name, value in model.state_dict().items():
            if not isinstance(value, QuantizedTensor):
                state[name] = value
            elif name not in tied or model.get_parameter(tied[name]) is not model.get_parameter(name):
                state |= checkpoint.to_tensors(name, value)
        return state, {"lowbit_format_version": str(FORMAT_VERSION)} | self.metadata

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        weights = [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
        dequantize_(model)
        if dtype is not None:
            for name in weights:
                parameter = model.get_parameter(name)
                parameter.data = parameter.data.to(dtype)
        return model

    def remove_quantization_config(self, model: nn.Module) -> None:
        super().remove_quantization_config(model)
        vars(model).pop("_weight_conversions", None)


#: safetensors' names of the floats in which bitsandbytes can store codes.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weights_to_quantize(model: nn.Module, config: LowbitConfig) -> frozenset[str]:
    """The names of the parameters that a config means, with every name of a shared one.

    Raises:
        ValueError: there are none.
    """
    skipped = models.kept_in_fp32(model) | models.read_by_fused_kernels(model).keys()
    for head in models.task_head(model)[1]:
        skipped |= set(model.get_submodule(head).modules())
    patterns = config.modules_to_not_convert or []
    for pattern in patterns:
        matched = {module for name, module in model.named_modules() if not should_convert_module(name, [pattern])}
        if not matched:
            warnings.warn(f"modules_to_not_convert: {pattern!r} matches no module", stacklevel=2)
        skipped |= {inner for module in matched for inner in module.modules()}
    found = find_weights(model, skipped, embeddings=config.quantize_embeddings, head=config.quantize_head)
    if not found:
        raise ValueError(
            f"model: expected linear layers to quantize, got none in {type(model).__name__}"
            + (f" outside of modules_to_not_convert={patterns}" if patterns else "")
        )
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p in found)


def _renamed(key: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, key = name.rpartition(".")
    model.get_submodule(module)._parameters[key] = parameter


if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(METHOD)(LowbitConfig)
    auto.register_quantizer(METHOD)(LowbitQuantizer)
    experts.register()
    if importlib.util.find_spec("bitsandbytes") is None:
        bitsandbytes.register()
