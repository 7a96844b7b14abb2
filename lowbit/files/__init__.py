"""Other people's key names for quantized weights; and, in modules of their own, files on disk and on the hub.

State dicts are torch's own, and need nothing of this.
"""

from .bitsandbytes import from_state, state_keys, to_state

__all__ = ["from_state", "state_keys", "to_state"]
