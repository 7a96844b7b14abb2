"""How good codes and scales are found: the largest magnitude of each block, or a search. The bytes are the same kind."""

from .quantize import quantize

__all__ = ["quantize"]
