"""One module per family of PTX instructions; importing them registers their handlers with the compiler."""

from . import arithmetic, bits, compare, control, convert, matrix, memory, warp, wgmma

__all__ = ["arithmetic", "bits", "compare", "control", "convert", "matrix", "memory", "warp", "wgmma"]
