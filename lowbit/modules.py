"""``quantize_`` and ``dequantize_``: a whole model's linear weights, in place. Modules keep their classes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import nn
from tqdm import tqdm

from .checks import named_errors
from .format import WeightSpec
from .models import check_module, output_embedding
from .names import has_suffix
from .ops.dense import frozen_linear
from .quantizers.quantize import check_scale, quantize_to
from .tensor import QuantizedTensor

#: Below this many weights a model converts before a progress bar could be read.
_PROGRESS_FROM = 50_000_000
#: Dense weights of so many bytes are named by :func:`storage_summary`.
_LARGE = 2**20
#: Called with each model whose weights were replaced: lowbit_lora tells models of transformers how to multiply by them.
AFTER_REPLACING: list[Callable[[nn.Module], object]] = []


def linear_weights(module: nn.Module) -> list[str]:
    """The names of the parameters by which ``module`` multiplies its input.

    Those of nn.Linear and its subclasses, nn.MultiheadAttention, transformers' Conv1D, and stacks of experts [experts,
    out, in], as transformers 5 fuses them, of modules that say ``is_transposed`` or whose class name ends in "Experts".
    """
    parameters = module._parameters
    if isinstance(module, nn.Linear) or is_conv1d(module):
        names = ["weight"]
    elif isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif "is_transposed" in vars(module) or type(module).__name__.endswith("Experts"):
        names = [name for name, value in parameters.items() if value is not None and value.dim() == 3]
    else:
        names = []
    return [name for name in names if parameters.get(name) is not None and parameters[name].numel()]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def quantize_(
    model: nn.Module,
    spec: WeightSpec = WeightSpec(),  # noqa: B008 (frozen)
    *,
    scale: str = "absmax",
    skip: Iterable[str] = (),
) -> nn.Module:
    """Store the linear weights of ``model`` as ``spec`` says, in place; the model computes with the decoded weights.

    Weights of linear layers and of stacks of experts become frozen :class:`~lowbit.QuantizedTensor` parameters;
    modules, biases and everything else stay as they are. Shared weights stay shared. A weight that is also an
    embedding's (a tied ``lm_head``), the layer that ``model.get_output_embeddings()`` names, and the factors of LoRA
    (modules whose name begins with ``lora_``) stay dense. What is quantized already stays as it is.

    Args:
        model: any module.
        spec: how each weight is stored.
        scale: how scales are found, as in :func:`lowbit.quantize`: "absmax" or "search".
        skip: modules whose weights stay dense, with all inside them: names or dotted suffixes ("lm_head",
            "encoder.layer.0").

    Returns:
        ``model``.

    Raises:
        TypeError: an argument of the wrong type; a weight that is not float32, float16 or bfloat16 (it is named).
        ValueError: an unknown scale, an entry of ``skip`` that matches nothing, NaN or inf in a weight (it is named).
            The model is then unchanged.
    """
    check_module(model)
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"spec: expected a lowbit.WeightSpec, got {type(spec).__name__}")
    check_scale(scale, spec)
    return replace_weights(model, quantized_weights(find_weights(model, skipped_modules(model, skip)), spec, scale))


def find_weights(
    model: nn.Module, skipped: set[nn.Module], *, embeddings: bool = False, head: bool = False
) -> dict[nn.Parameter, str]:
    """The dense weights to quantize, with the name that each has first in the model; none of the modules skipped.

    ``embeddings`` adds those of nn.Embedding, and ``head`` the layer that ``model.get_output_embeddings()`` names.
    """
    kept_head = None if head else output_embedding(model)
    found, kept = {}, set()
    for prefix, module in model.named_modules():
        is_adapter = any(part.startswith("lora_") for part in prefix.split("."))
        names = [] if module in skipped or module is kept_head or is_adapter else linear_weights(module)
        if embeddings and isinstance(module, nn.Embedding) and module not in skipped:
            names = ["weight"]
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if name not in names:
                kept.add(parameter)
            elif not isinstance(parameter, QuantizedTensor):
                found.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {parameter: name for parameter, name in found.items() if parameter not in kept}


def skipped_modules(model: nn.Module, skip: Iterable[str]) -> set[nn.Module]:
    """The modules that ``skip`` names, and all inside them; an error for an entry that matches nothing."""
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a list of names, got the string {skip!r}")
    skipped = set()
    for entry in skip:
        modules = model.named_modules(remove_duplicate=False)  # a shared one by each of its names
        matches = [module for name, module in modules if has_suffix(name, entry)]
        if not matches:
            raise ValueError(f"skip: expected names of modules, got {entry!r}, which matches none")
        skipped.update(inner for match in matches for inner in match.modules())
    return skipped


def quantized_weights(
    weights: dict[nn.Parameter, str], spec: WeightSpec, scale: str
) -> dict[nn.Parameter, nn.Parameter]:
    """A frozen quantized parameter for each of the weights, which are named in errors; shows a progress bar."""
    size = sum(weight.numel() for weight in weights)
    # disable=None shows the bar on a terminal only.
    progress = tqdm(weights.items(), "Quantizing", leave=False, disable=None if size > _PROGRESS_FROM else True)
    replacements = {}
    for weight, name in progress:
        with named_errors(name):
            quantized = quantize_to(weight.detach(), spec, scale)
        replacements[weight] = nn.Parameter(quantized, requires_grad=False)
    return replacements


def replace_weights(model: nn.Module, replacements: dict[nn.Parameter, nn.Parameter]) -> nn.Module:
    """Put each replacement wherever its parameter is, so that shared weights stay shared; returns ``model``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in replacements:
                module._parameters[name] = replacements[parameter]
    for tell in AFTER_REPLACING:
        tell(model)
    return model


def dequantize_(model: nn.Module) -> nn.Module:
    """Decode every quantized weight of ``model`` in place, in its own dtype; returns ``model``. Undoes ``quantize_``.

    The dense parameters are frozen. Shared weights stay shared. Where decoding fails (for want of memory) the model is
    unchanged.
    """
    check_module(model)
    parameters = [p for module in model.modules() for p in module._parameters.values()]
    return replace_weights(model, decoded_weights(p for p in parameters if isinstance(p, QuantizedTensor)))


def decoded_weights(weights: Iterable[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """A frozen dense parameter for each of the quantized weights."""
    return {q: nn.Parameter(q.dequantize(), requires_grad=False) for q in dict.fromkeys(weights)}


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its module hangs; all of them or, if interrupted, none."""
    done = []
    try:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is not None and child in replacements:
                    done.append((parent, name, child))
                    parent._modules[name] = replacements[child]
    except BaseException:
        for parent, name, child in done:
            parent._modules[name] = child
        raise


class FrozenLinear(nn.Linear):
    """An nn.Linear whose weight is frozen; what :func:`adopt_frozen` makes of those a wrapped model keeps."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_linear(input, self.weight, self.bias)


def adopt_frozen(model: nn.Module) -> None:
    """Turn each plain nn.Linear with a frozen 16-bit weight into a FrozenLinear, in place: weights stay tied."""
    for module in model.modules():
        if type(module) is not nn.Linear or isinstance(module.weight, QuantizedTensor):  # which has kernels of its own
            continue
        if module.weight.dtype in (torch.bfloat16, torch.float16) and not module.weight.requires_grad:
            module.__class__ = FrozenLinear


def release_frozen(model: nn.Module) -> None:
    """Turn each FrozenLinear back into an nn.Linear."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear


def check_weights_at_hand(model: nn.Module) -> None:
    """ValueError if another library has quantized the model, or some of its weights are not in memory; one is named.

    A model on the meta device is accepted inside ``with torch.device("meta")``: to be counted, not to compute.
    """
    if is_quantized(model) and not has_quantized_weights(model):
        raise ValueError(
            f"model: expected weights that are dense or lowbit's own, got a model that "
            f"{getattr(model, 'quantization_method', 'transformers')} has quantized already"
        )
    for name, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"model: expected weights in memory, but accelerate keeps those of {name or 'it'!r} elsewhere; load "
                "the model without offloading"
            )
    if torch.get_default_device().type == "meta":
        return
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"model: expected weights in memory, but {name!r} is on the meta device; load the model first (to "
                "count parameters without weights, wrap it inside `with torch.device('meta')`)"
            )


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers has quantized the model while it loaded it."""
    return bool(getattr(model, "is_quantized", False))


def has_quantized_weights(model: nn.Module) -> bool:
    """Whether a parameter is a QuantizedTensor."""
    return any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())


def forget_quantization(model: nn.Module) -> None:
    """Have transformers know that a model which it has quantized is dense, if all of its weights now are."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not has_quantized_weights(model):
        quantizer.remove_quantization_config(model)


@dataclasses.dataclass
class BeforeFreezing:
    """What :meth:`freeze` changes in a model, by name, so that it can be put back where modules were replaced since."""

    requires_grad: dict[str, bool]
    nested: dict[nn.Module, bool]
    also: Callable[[nn.Module], None] | None

    @classmethod
    def of(cls, model: nn.Module, also: Callable[[nn.Module], None] | None = None) -> "BeforeFreezing":
        """What has to be put back in a model that has not been changed yet; ``also`` puts back something else."""
        requires_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        nested = {m: m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder)}
        return cls(requires_grad, nested, also)

    def freeze(self, model: nn.Module) -> None:
        """Freeze all parameters. nn.TransformerEncoder does without nested tensors.

        It looks at its first layer alone; nested tensors fail in those whose fused path an adapter turns off.
        """
        for module in self.nested:
            module.use_nested_tensor = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def apply(self, model: nn.Module) -> None:
        """Put it back; quantized weights stay frozen."""
        release_frozen(model)
        if self.also:
            self.also(model)
        for module, value in self.nested.items():
            module.use_nested_tensor = value
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not isinstance(parameter, QuantizedTensor):
                parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))


def storage_summary(modules: dict[nn.Module, str], reasons: dict[nn.Module, str], trained: set[nn.Module]) -> str:
    """One line: how many bytes hold quantized weights, and which large weights are dense, and why.

    Args:
        modules: those to look at, with their names; only parameters of their own count.
        reasons: why the weights of some of them are dense; of others the class is named.
        trained: those that train whole.
    """
    stored, large = {}, {}
    for module, name in modules.items():
        if module in trained:
            large[id(module)] = f"{name} (trains whole)"
            continue
        for key, parameter in module._parameters.items():
            if isinstance(parameter, QuantizedTensor):
                stored[id(parameter)] = parameter
            elif parameter is not None and parameter.nbytes >= _LARGE:
                kind = "embedding" if isinstance(module, nn.Embedding) else f"of a {type(module).__name__}"
                why = reasons.get(module, kind)
                large.setdefault(id(parameter), f"{name}.{key} ({parameter.nbytes / 2**20:,.0f} MiB, {why})")
    wide = sum(parameter.numel() * parameter.dtype.itemsize for parameter in stored.values())
    small = sum(parameter.nbytes for parameter in stored.values())
    dense = [*large.values()]
    more = f" and {len(dense) - 5} more" if len(dense) > 5 else ""
    text = f"lowbit: {len(stored)} weights of {wide / 2**20:,.1f} MiB take {small / 2**20:,.1f} MiB"
    return text + (f"; dense: {', '.join(dense[:5])}{more}" if dense else "")
