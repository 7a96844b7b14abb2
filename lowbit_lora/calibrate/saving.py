"""A calibrated model of transformers saves as one that LowbitConfig quantized, and says how it was made."""

import sys

from torch import nn

from lowbit import QuantizedTensor, WeightSpec

from .report import CalibrationReport

#: The key in the metadata of safetensors files.
KEY = "lowbit_calibration"


def remember(model: nn.Module, spec: WeightSpec, report: CalibrationReport) -> None:
    """Have ``model.save_pretrained`` write the quantized weights, and what is known of them beside the format.

    Other models than transformers' stay as they are.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    from ..hf import saving
    from ..hf.config import LowbitConfig
    from ..hf.quantizer import LowbitQuantizer

    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    config = LowbitConfig(
        spec.format,
        spec.block_size,
        spec.double_quant,
        "search",
        conv1d_transposed=any(weight.stored.transposed for weight in weights),
    )
    quantizer = LowbitQuantizer(config, pre_quantized=True)
    quantizer.metadata[KEY] = report.metadata()
    model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
    saving.install()
