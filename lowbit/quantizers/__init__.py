"""How codes and scales are found: from each block's largest magnitude, by a search, or by descent under a Hessian.

Any reader decodes the result of each.
"""

from .curvature import Curvature, loss
from .quantize import quantize

__all__ = ["Curvature", "loss", "quantize"]
