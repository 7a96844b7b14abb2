"""Many GPUs: what of transformers' and DeepSpeed's ways a quantized model cannot go."""

import sys


def check_not_zero3() -> None:
    """ValueError under DeepSpeed's ZeRO-3, which splits every parameter as a flat tensor of its dtype."""
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    if deepspeed is not None and deepspeed.is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed: expected ZeRO stage 0, 1 or 2 with quantized weights, got stage 3, which splits each parameter "
            "as a flat tensor of floats. To split the base over GPUs use FSDP2, which splits it in 4 bits "
            "(examples/accelerate/fsdp2.yaml)"
        )
