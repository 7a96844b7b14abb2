"""Calibrated quantization: which codes and scales lose least of what a model does with data, in the same bytes."""

from .merged import calibrate_merged
from .model import calibrate
from .report import CalibrationReport, LayerReport

__all__ = ["CalibrationReport", "LayerReport", "calibrate", "calibrate_merged"]
