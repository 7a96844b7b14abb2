"""The key names of bitsandbytes: ``.absmax``, ``.quant_state...`` in 4 bits, and Linear8bitLt's ``SCB`` for int8."""

import json
from collections.abc import Iterable

import torch

from .. import format as fmt
from ..format import FLOAT_DTYPES, WeightSpec
from ..tensor import QuantizedTensor

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def to_state(q: QuantizedTensor, prefix: str = "weight") -> dict[str, torch.Tensor]:
    """The tensors of this weight under bitsandbytes' key names, ``prefix`` being the weight's own name.

    For int8 these are the keys of its ``Linear8bitLt``, which have no place for its dtype: ``prefix`` holds the codes,
    int8 (rows, row length), and beside it stand ``SCB`` (absmax) and ``weight_format`` (0, row-major).

    Raises:
        ValueError: ``q`` is a slice or a transposed view.
    """
    layout = q.stored
    if layout.transposed or layout.first_element or not layout.exact:
        raise ValueError(f"q: expected a whole weight, got a slice or a transposed view ({q!r})")
    if q.spec.format == "int8":
        stem = _module_stem(prefix)
        return {
            prefix: q.packed.view(torch.int8).view(fmt.row_shape(q.shape)),
            f"{stem}SCB": q.absmax.view(-1),
            f"{stem}weight_format": torch.zeros((), dtype=torch.uint8, device=q.device),
        }
    about = {
        "quant_type": q.spec.format,
        "blocksize": q.spec.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    state = {
        prefix: q.packed.view(-1, 1),
        f"{prefix}.absmax": q.absmax.view(-1),
        f"{prefix}.quant_map": fmt.codebook(q.spec.format, q.device) + 0.0,  # its second zero of FP4 is not minus zero
    }
    if q.spec.double_quant:
        state[f"{prefix}.nested_absmax"] = q.group_scales
        state[f"{prefix}.nested_quant_map"] = fmt.scale_map(q.device)
        about |= {
            "nested_blocksize": fmt.GROUP_SIZE,
            "nested_dtype": "float32",
            # A meta tensor has no value; its state dict only shows names and shapes.
            "nested_offset": 0.0 if q.offset.is_meta else q.offset.item(),
        }
    text = json.dumps(about).encode()
    state[f"{prefix}.quant_state.bitsandbytes__{q.spec.format}"] = torch.tensor(
        list(text), dtype=torch.uint8, device=q.device
    )
    return state


def from_state(
    state: dict[str, torch.Tensor], prefix: str = "weight", *, int8_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Read what :func:`to_state` or bitsandbytes wrote; other keys of ``state`` are left alone.

    ``int8_dtype`` becomes the dtype of an int8 weight, whose keys do not say it. Such a weight comes back
    as the matrix (rows, row length).

    Raises:
        ValueError: a key is missing, the JSON is broken, or sizes, codebook or scale map are not this format's.
        TypeError: a tensor has the wrong dtype.
    """
    stem = f"{prefix}.quant_state.bitsandbytes__"
    found = [key for key in state if key.startswith(stem)]
    if not found and prefix in state and state[prefix].dtype == torch.int8:
        return _from_int8_state(state, prefix, int8_dtype)
    if len(found) != 1:
        raise ValueError(f"state: expected one key {stem}nf4 or {stem}fp4, or {prefix} in int8, got {found or 'none'}")
    try:
        about = json.loads(bytes(state[found[0]].tolist()))
        block_size, shape = int(about["blocksize"]), tuple(int(size) for size in about["shape"])
        quant_type, dtype = about["quant_type"], _DTYPE_NAMES[about["dtype"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{found[0]}: expected bitsandbytes' JSON description, got {error!r}") from error
    fmt.check_format(quant_type)

    def part(name: str) -> torch.Tensor:
        key = prefix + name
        if key not in state:
            raise ValueError(f"state: missing key {key!r}")
        return state[key]

    def require(name: str, expected: torch.Tensor) -> None:
        if not torch.equal(part(name).float().cpu(), expected):
            raise ValueError(f"{prefix}{name}: expected the standard table of {quant_type}, got another one")

    packed = part("")
    require(".quant_map", fmt.codebook(quant_type))
    group_scales = offset = None
    if "nested_offset" in about:
        require(".nested_quant_map", fmt.SCALE_MAP)
        if about.get("nested_blocksize") != fmt.GROUP_SIZE:
            raise ValueError(
                f"{found[0]}: expected nested_blocksize {fmt.GROUP_SIZE}, got {about.get('nested_blocksize')}"
            )
        group_scales = part(".nested_absmax")
        offset = torch.tensor(about["nested_offset"], dtype=torch.float32, device=packed.device)
    spec = WeightSpec(quant_type, block_size, offset is not None)
    return QuantizedTensor(packed, part(".absmax"), group_scales, offset, shape=shape, dtype=dtype, spec=spec)


def _from_int8_state(state: dict[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> QuantizedTensor:
    codes, stem = state[prefix], _module_stem(prefix)
    if codes.dim() != 2:
        raise ValueError(f"{prefix}: expected int8 codes of 2 dimensions, got shape {tuple(codes.shape)}")
    if f"{stem}SCB" not in state:
        raise ValueError(f"state: missing key '{stem}SCB'")
    layout = state.get(f"{stem}weight_format")  # checkpoints of Hugging Face models may leave it out
    if layout is not None and not layout.is_meta and layout.numel() and layout.flatten()[0] != 0:
        raise ValueError(f"{stem}weight_format: expected 0 (row-major), got {layout.tolist()}")
    packed = codes.contiguous().view(torch.uint8)
    return QuantizedTensor(packed, state[f"{stem}SCB"], shape=codes.shape, dtype=dtype, spec=WeightSpec("int8"))


def state_keys(state: Iterable[str], prefix: str) -> list[str]:
    """The keys of ``state`` that belong to the quantized weight called ``prefix``, in any format."""
    beside = {f"{_module_stem(prefix)}{name}" for name in ("SCB", "weight_format")}
    return [key for key in state if key == prefix or key.startswith(prefix + ".") or key in beside]


def _module_stem(prefix: str) -> str:
    """What stands before a weight's own name: "layer." for "layer.weight"."""
    return prefix[: prefix.rfind(".") + 1]
