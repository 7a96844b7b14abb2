"""A calibrated model of transformers saves as one that LowbitConfig quantized, and says how it was made."""

import sys

from torch import nn

from lowbit import QuantizedTensor

from .report import CalibrationReport

#: The key in the metadata of safetensors files.
KEY = "lowbit_calibration"


def remember(model: nn.Module, report: CalibrationReport | None = None) -> None:
    """Have ``model.save_pretrained`` write the quantized weights, and what is known of them beside the format.

    Other models than transformers' stay as they are, and so does what one knows already of how it is stored.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    from ..hf import saving
    from ..hf.config import LowbitConfig
    from ..hf.quantizer import LowbitQuantizer

    weights = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    if not weights:
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, LowbitQuantizer):
        spec = weights[0].spec
        config = LowbitConfig(
            spec.format,
            spec.block_size,
            spec.double_quant,
            "search" if spec.record.scales.double_quant else "absmax",
            conv1d_transposed=any(weight.stored.transposed for weight in weights),
        )
        quantizer = LowbitQuantizer(config, pre_quantized=True)
        model.config.quantization_config = config
        model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
        saving.install()
    if report is not None:
        quantizer.metadata[KEY] = report.metadata()
