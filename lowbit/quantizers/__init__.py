"""How codes and scales are found: from each block's largest magnitude, or by a search. Any reader decodes both."""

from .quantize import quantize

__all__ = ["quantize"]
