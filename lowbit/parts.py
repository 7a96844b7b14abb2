"""A part of a quantized weight as a weight by itself, for tensor parallelism: rows or columns, cut at blocks."""

from .tensor import QuantizedTensor


def rows_of(q: QuantizedTensor, begin: int, end: int) -> QuantizedTensor:
    """Rows [begin, end) of a weight [rows, columns], with memory of their own; the values are the same.

    Scales stay double-quantized where the part begins with a group of 256 blocks, else they become fp32.

    Raises:
        ValueError: the part begins inside a block.
    """
    _check(q, begin, end, 0)
    operands = q[begin:end].operands()
    if operands is None:
        raise _inside_a_block(q, f"rows {begin} to {end}")
    packed, absmax, group_scales, offset, spec = operands
    parts = [None if part is None else part.clone() for part in (packed, absmax, group_scales, offset)]
    spec = type(q.spec).parse(spec)
    return QuantizedTensor(*parts, shape=(end - begin, q.shape[1]), dtype=q.dtype, spec=spec)


def columns_of(q: QuantizedTensor, begin: int, end: int) -> QuantizedTensor:
    """Columns [begin, end) of a weight [rows, columns], with memory of their own; the values are the same.

    Scales become fp32: blocks of one group of 256 are no longer neighbours.

    Raises:
        ValueError: a cut is inside a block.
    """
    _check(q, begin, end, 1)
    count, width = q.shape
    block = q.spec.block_size
    if block is None:  # one scale for each row
        packed = q.packed.view(count, -1)[:, begin:end].contiguous()
        return QuantizedTensor(packed, q.absmax.clone(), shape=(count, end - begin), dtype=q.dtype, spec=q.spec)
    if width % block or begin % block or end % block:
        raise _inside_a_block(q, f"columns {begin} to {end}")
    codes = q.packed.view(count, width // block, -1)[:, begin // block : end // block].contiguous()
    scales = q.scales().view(count, -1)[:, begin // block : end // block].contiguous()
    spec = q.spec.without_double_quant()
    return QuantizedTensor(codes, scales, shape=(count, end - begin), dtype=q.dtype, spec=spec)


def _check(q: QuantizedTensor, begin: int, end: int, dim: int) -> None:
    whole = q.stored.exact and not q.stored.first_element and not q.stored.transposed and q.dim() == 2
    if not whole:
        raise ValueError(f"q: expected a whole weight of two dimensions, got {q!r}")
    if not 0 <= begin < end <= q.shape[dim]:
        raise ValueError(f"begin and end: expected a part of {q.shape[dim]}, got {begin} to {end}")


def _inside_a_block(q: QuantizedTensor, part: str) -> ValueError:
    return ValueError(
        f"{part}: expected cuts between blocks of {q.spec.block_size} elements, got a weight of {tuple(q.shape)}; "
        "quantize with a smaller block_size, or split over fewer processes"
    )
