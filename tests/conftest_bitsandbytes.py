"""What bitsandbytes makes of the bytes that lowbit writes."""

import pytest
import torch

import lowbit


def assert_bitsandbytes_decodes(q: lowbit.QuantizedTensor) -> None:
    """Assert that bitsandbytes, from the keys of a file, decodes what lowbit decodes; skip where it is missing."""
    bnb = pytest.importorskip("bitsandbytes")
    written = lowbit.files.to_state(q)
    state = bnb.functional.QuantState.from_dict(
        {key.removeprefix("weight."): value for key, value in written.items() if key != "weight"},
        device=torch.device("cpu"),
    )
    theirs = bnb.functional.dequantize_4bit(written["weight"], state)
    assert torch.equal(theirs.float(), q.dequantize(torch.float32))
