"""Other people's key names for quantized weights, and nothing else: state dicts are torch's own."""

from .bitsandbytes import from_state, state_keys, to_state

__all__ = ["from_state", "state_keys", "to_state"]
