"""The formats in Python: a record per format, codebooks, thresholds, and the 8-bit map of double-quantized scales.

``docs/format.md`` states the bytes whole; they are those of bitsandbytes 0.50.2. The C++ twin of this file is
``csrc/format.h``, and ``tests/test_format.py`` holds the two together.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314), appendix E; the sixteen values of NormalFloat4, by code.
# fmt: off
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on

#: A 4-bit float (1 sign, 2 exponent, 1 mantissa bit) divided by 12; code 8 is minus zero.
_FP4_POSITIVE = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4_CODEBOOK = _FP4_POSITIVE + tuple(-value for value in _FP4_POSITIVE)

#: Largest code of int8. Source: Dettmers et al., "LLM.int8()", 2022 (arXiv 2208.07339), section 2.1.
INT8_MAX = 127.0

#: Blocks whose absmax values share one fp32 group scale under double quantization.
GROUP_SIZE = 256
#: Floor under absmax before its reciprocal is taken, so that an all-zero block divides by something.
TINY_ABSMAX = 1e-38


@dataclass(frozen=True)
class ScaleKind:
    """How the scales of a format are stored.

    Attributes:
        per_row: one scale per row of the weight; else one per block.
        dtype: of the stored scales (before double quantization).
        double_quant: whether they can be double-quantized.
        encode, decode: plain torch functions between fp32 scales and what is stored; None where fp32 is stored.
    """

    per_row: bool = False
    dtype: torch.dtype = torch.float32
    double_quant: bool = False
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None


BLOCK_SCALES = ScaleKind(double_quant=True)
ROW_SCALES = ScaleKind(per_row=True)


@dataclass(frozen=True)
class Format:
    """All that the library knows of one format.

    Attributes:
        name: what users and files call it.
        bits: of a code; 4 (two codes per byte) or 8.
        codebook: the decoded value of each code in units of its scale; None: the code itself, a signed integer.
        scales: how scales are stored.
        block_sizes: which block sizes there are; empty where a scale belongs to a row.
    """

    name: str
    bits: int
    codebook: tuple[float, ...] | None
    scales: ScaleKind
    block_sizes: tuple[int, ...] = ()


_BLOCK_SIZES = tuple(2**power for power in range(5, 13))
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = _BLOCK_SIZES[0], _BLOCK_SIZES[-1]
#: Every format by name. A format that is added here is served by the reference backend.
FORMATS: dict[str, Format] = {}


def register(record: Format) -> None:
    """Add a format. The reference backend serves it; kernels are written for each by hand (CONTRIBUTING.md).

    Raises:
        ValueError: the name is taken.
    """
    if record.name in FORMATS:
        raise ValueError(f"format: expected a new name, got {record.name!r}, which there is")
    FORMATS[record.name] = record


register(Format("nf4", 4, NF4_CODEBOOK, BLOCK_SCALES, _BLOCK_SIZES))
register(Format("fp4", 4, FP4_CODEBOOK, BLOCK_SCALES, _BLOCK_SIZES))
register(Format("int8", 8, None, ROW_SCALES))


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is stored: everywhere the same record, and for the ops the same string.

    Args:
        format: a name in :data:`FORMATS`: "nf4", "fp4" or "int8".
        block_size: elements of the row-major weight that share a scale; for 4 bits a power of two from 32 to 4096.
            None, whatever was given, for a format with one scale per row.
        double_quant: store the scales in 8 bits. False, whatever was given, for a format whose scales cannot be.

    Attributes:
        text: the spec as the ops take it: "nf4:64:double_quant", "nf4:64", "int8".

    Raises:
        ValueError: an unknown format, or a block size that it does not have.
        TypeError: an argument of the wrong type.
    """

    format: str = "nf4"
    block_size: int | None = 64
    double_quant: bool = True

    def __post_init__(self):
        check_format(self.format)
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant: expected a bool, got {self.double_quant!r}")
        scales = self.record.scales
        if scales.per_row:
            object.__setattr__(self, "block_size", None)
        else:
            _check_block_size(self.block_size, self.record)
        if not scales.double_quant:
            object.__setattr__(self, "double_quant", False)
        size = "" if self.block_size is None else f":{self.block_size}"
        text = self.format + size + (":double_quant" if self.double_quant else "")
        object.__setattr__(self, "text", text)  # made once: every call of an op takes it

    @property
    def record(self) -> Format:
        """What the library knows of the format."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        return self.text

    @staticmethod
    @functools.cache
    def parse(text: str) -> "WeightSpec":
        """The spec that ``text`` says, which is what str() of it gives.

        Raises:
            RuntimeError: ``text`` is not of that form (ops take it, and their errors are RuntimeErrors).
        """
        name, *rest = text.split(":")
        double_quant = rest[-1:] == ["double_quant"]
        sizes = rest[:-1] if double_quant else rest
        try:
            spec = WeightSpec(name, int(sizes[0]) if sizes else None, double_quant)
        except (ValueError, TypeError) as error:
            raise RuntimeError(f"spec: {error} (in {text!r})") from error
        if spec.text != text:
            raise RuntimeError(f"spec: expected one like 'nf4:64:double_quant', 'nf4:64' or 'int8', got {text!r}")
        return spec

    def packed_size(self, numel: int) -> int:
        """Bytes of the codes of ``numel`` weights."""
        return (numel * self.record.bits + 7) // 8

    def scale_count(self, shape: tuple[int, ...]) -> int:
        """How many scales a weight of this shape has."""
        return row_shape(shape)[0] if self.block_size is None else block_count(math.prod(shape), self.block_size)

    def without_double_quant(self) -> "WeightSpec":
        """The spec of the same weight with its scales decoded."""
        return WeightSpec(self.format, self.block_size, False)


def check_format(format: str) -> None:
    """ValueError unless ``format`` is a name in :data:`FORMATS`."""
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")


def _check_block_size(block_size: int, record: Format) -> None:
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size: expected an int, got {block_size!r}")
    sizes = record.block_sizes
    if block_size not in sizes:
        several = f"a power of two from {sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
        raise ValueError(f"block_size: expected {several}, got {block_size}")


FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_float_dtype(name: str, dtype: torch.dtype) -> None:
    """TypeError unless ``dtype`` is float32, float16 or bfloat16."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")


#: What ``scale="search"`` tries for a block: absmax times each of these, in this order; the first of the best wins.
SCALE_FACTORS = (1.0, -1.0) + tuple(sign * (0.8 + i * (0.3 / 16)) for i in range(17) for sign in (1, -1))
#: absmax above it is not multiplied: the product could leave fp32.
LARGEST_SEARCHED = 3e38


def codebook(format: str, device: torch.device | str | None = None) -> torch.Tensor:
    """The 16 decoded values of ``format``, fp32 [16], indexed by code."""
    return torch.tensor(FORMATS[format].codebook, dtype=torch.float32, device=device)


def thresholds(format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What decides a code: ``(midpoints fp32 [15], code_of_rank uint8 [16])``.

    The rank of x is the number of midpoints t with ``x > t``; its code is ``code_of_rank[rank]``. FP4 holds zero
    twice (codes 0 and 8): the stable sort puts code 0 first and their midpoint is 0, which makes a tiny positive value
    code 8 and a tiny negative one code 0, as in bitsandbytes.
    """
    ordered, order = torch.sort(codebook(format), stable=True)
    return (ordered[:-1] + ordered[1:]) * 0.5, order.to(torch.uint8)


def _dynamic_scale_map() -> torch.Tensor:
    """The signed dynamic 8-bit map (7 exponent bits) that encodes absmax - offset, fp32 [256], sorted.

    Decade e holds 2**e values between 0.1 and 1, times 10**(e - 6); source: Dettmers, "8-Bit Approximations for
    Parallelism in Deep Learning", 2015 (arXiv 1511.04561).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


SCALE_MAP = _dynamic_scale_map()
_SCALE_MAP_VALUES = SCALE_MAP.tolist()


def scale_map(device: torch.device | str | None = None) -> torch.Tensor:
    """:data:`SCALE_MAP` on a device. It is made anew: torch.compile takes no tensor from outside of what it traces."""
    return torch.tensor(_SCALE_MAP_VALUES, dtype=torch.float32, device=device)


def _scale_code_table() -> torch.Tensor:
    """Code of the map entry nearest to i / 32767.5 - 1, uint8 [65536] (bitsandbytes' CPU rule for scales)."""
    entries = SCALE_MAP.double()
    positions = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1.0
    above = torch.searchsorted(entries, positions).clamp(1, 255)
    below_is_nearer = (positions - entries[above - 1]) <= (entries[above] - positions)
    return torch.where(below_is_nearer, above - 1, above).to(torch.uint8)


SCALE_CODE_TABLE = _scale_code_table()


def block_count(numel: int, block_size: int) -> int:
    """Number of blocks in a weight of ``numel`` elements; the last one may be short."""
    return -(-numel // block_size)


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, length of a row)`` of a weight in int8; one row for 1 dimension, and for none."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)
