"""bitsandbytes' key names: what to_state writes, from_state reads back, and what it refuses."""

import json

import pytest
import torch
from cases import DTYPES, FORMATS, make_weight

import lowbit
from lowbit import files


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_round_trip(format, dtype, double_quant):
    """A saved weight must come back bit for bit."""
    q = lowbit.quantize(make_weight((33, 65), dtype), format=format, double_quant=double_quant)
    loaded = files.from_state(files.to_state(q, "layer.weight") | {"other": torch.ones(1)}, "layer.weight")
    assert repr(loaded) == repr(q)
    assert torch.equal(loaded.dequantize(), q.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_keys_are_bitsandbytes(double_quant):
    """Keys, dtypes, shapes or the description would differ from bitsandbytes', which could not read the file."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = make_weight((96, 384), torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    theirs = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = files.to_state(lowbit.quantize(weight, double_quant=double_quant))
    assert set(ours) == set(theirs)
    description = "weight.quant_state.bitsandbytes__nf4"
    for key in set(ours) - {description}:
        assert ours[key].shape == theirs[key].shape and ours[key].dtype == theirs[key].dtype, key
    decoded = [json.loads(bytes(side[description].tolist())) for side in (ours, theirs)]
    assert set(decoded[0]) == set(decoded[1])
    for key in set(decoded[0]) - {"nested_offset"}:
        assert decoded[0][key] == decoded[1][key], key

    read = files.from_state(theirs)
    assert torch.equal(read.dequantize(), bnb.functional.dequantize_4bit(packed, state))
    state_back = bnb.functional.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in ours.items() if k != "weight"}, device=torch.device("cpu")
    )
    back = bnb.functional.dequantize_4bit(ours["weight"], state_back)
    assert torch.equal(back, files.from_state(ours).dequantize())


def broken_states():
    state = files.to_state(lowbit.quantize(make_weight((33, 65))))
    description = "weight.quant_state.bitsandbytes__nf4"
    yield {k: v for k, v in state.items() if k != description}, ValueError, "expected one key"
    yield state | {description: torch.tensor([123], dtype=torch.uint8)}, ValueError, "JSON"
    yield {k: v for k, v in state.items() if k != "weight.absmax"}, ValueError, "missing key 'weight.absmax'"
    yield state | {"weight": state["weight"][:-1]}, ValueError, "packed: expected 1073 elements"
    yield state | {"weight": state["weight"].view(torch.int8)}, (TypeError, ValueError), "expected"
    yield state | {"weight.absmax": state["weight.absmax"].float()}, TypeError, "absmax: expected torch.uint8"
    yield state | {"weight.quant_map": torch.zeros(16)}, ValueError, "quant_map: expected the standard table"
    yield state | {"weight.nested_absmax": torch.ones(7)}, ValueError, "group_scales: expected 1 elements"


@pytest.mark.parametrize(("state", "error", "message"), list(broken_states()))
def test_broken_state_is_an_error(state, error, message):
    """A damaged or foreign file must be refused, not decoded to noise."""
    with pytest.raises(error, match=message):
        files.from_state(state)


def test_tables_are_the_file_s_own():
    """A change to a state dict would change the library's own table of scales."""
    q = lowbit.quantize(make_weight((33, 65)))
    before = q.dequantize()
    files.to_state(q)["weight.nested_quant_map"].zero_()
    assert torch.equal(q.dequantize(), before)


def test_slices_are_refused():
    """The keys have no place for where a slice begins: it would be read as another weight."""
    q = lowbit.quantize(make_weight((33, 64)))
    for part in (q[1:], q.T):
        with pytest.raises(ValueError, match="expected a whole weight"):
            files.to_state(part)
