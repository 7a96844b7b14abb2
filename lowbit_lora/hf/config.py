"""LowbitConfig: what ``from_pretrained(..., quantization_config=...)`` takes, and what a folder's config.json holds."""

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit import WeightSpec
from lowbit.checks import check_names, check_switch
from lowbit.quantizers.quantize import check_scale

#: The name that transformers knows the method by.
METHOD = "lowbit"
#: Of the keys in the files, and of config.json's entry. A reader refuses a newer one.
FORMAT_VERSION = 1


class LowbitConfig(QuantizationConfigMixin):
    """Store a model's linear weights in 4 bits, or in 8, while transformers loads it.

        AutoModelForCausalLM.from_pretrained(path, quantization_config=LowbitConfig())

    Norms, biases, the head of a task and modules that the model keeps in fp32 stay as they are, and so do the weights
    that :func:`lowbit.quantize_` leaves alone.

    Args:
        format, block_size, double_quant, scale: how each weight is stored, as in :func:`lowbit.quantize`.
        modules_to_not_convert: modules that stay dense: names, ends of names and regular expressions, as everywhere in
            transformers.
        quantize_head: store the output layer (``lm_head``) so too; one that is tied to an embedding needs both.
        quantize_embeddings: store embeddings so too.
        conv1d_transposed: store the weights of transformers' Conv1D (GPT-2) as [out, in], as bitsandbytes does, which
            ``save_pretrained(format="bitsandbytes")`` needs; by default they are stored as they lie, [in, out].
        format_version, quant_method: of a folder; a user leaves them out.

    Raises:
        ValueError: an argument out of range, another ``quant_method``, a newer ``format_version``.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int | None = 64,
        double_quant: bool = True,
        scale: str = "absmax",
        modules_to_not_convert: list[str] | None = None,
        quantize_head: bool = False,
        quantize_embeddings: bool = False,
        *,
        conv1d_transposed: bool = False,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ):
        _check_origin(quant_method, format_version)
        spec = WeightSpec(format, block_size, double_quant)
        check_scale(scale, spec)
        skipped = modules_to_not_convert
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        self.format, self.block_size, self.double_quant = spec.format, spec.block_size, spec.double_quant
        self.scale = scale
        self.modules_to_not_convert = None if skipped is None else check_names("modules_to_not_convert", skipped)
        self.quantize_head = check_switch("quantize_head", quantize_head)
        self.conv1d_transposed = check_switch("conv1d_transposed", conv1d_transposed)
        self.quantize_embeddings = check_switch("quantize_embeddings", quantize_embeddings)

    @property
    def spec(self) -> WeightSpec:
        """How a weight is stored."""
        return WeightSpec(self.format, self.block_size, self.double_quant)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """The config that :meth:`to_dict` wrote.

        Raises:
            ValueError: also for a key that there is none of.
        """
        # The version first: a newer one may have other keys.
        _check_origin(config_dict.get("quant_method"), config_dict.get("format_version", FORMAT_VERSION))
        known = vars(cls())
        unknown = [key for key in config_dict if key not in known]
        if unknown:
            raise ValueError(f"quantization_config: expected keys among {', '.join(known)}, got {', '.join(unknown)}")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)


def _check_origin(method: object, version: object) -> None:
    if method != METHOD:
        raise ValueError(f"quant_method: expected {METHOD!r}, got {method!r}")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format_version: expected a number from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version: expected at most {FORMAT_VERSION}, got {version}: a newer lowbit wrote this folder; "
            "update lowbit to load it"
        )
