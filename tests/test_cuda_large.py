"""The CUDA kernels on weights of more than 2^32 elements, executed by the emulator: no index wraps at 31 or 32 bits.

Such a weight is mapped but not filled: only blocks with elements past 2^32 run, and only the memory that they touch has
contents. Everything else is zero, so that an index which wrapped around finds other numbers.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from cases import (
    assert_within,
    gemm_tolerance,
    product_tolerance,
    tensor_core_tolerance,
    weight_error_cuda,
)
from conftest_cuda import DTYPE_CODES, FORMAT_CODES, bias_arguments, launchers, spec_of, written

from lowbit import reference

BEYOND = 2**32
K = 4096
#: The first rows of W [.., K] past 2^32 elements.
BEYOND_ROW = BEYOND // K
RANK = 8


def huge(size, dtype):
    """Zeros that take memory only where they are touched."""
    try:
        return np.zeros(size, dtype)
    except MemoryError:
        pytest.skip(f"no address space for {size * np.dtype(dtype).itemsize >> 30} GiB")


def as_torch(array, dtype=None):
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.view(dtype)


@contextlib.contextmanager
def running(blocks, processors=108):
    """Context that runs only ``blocks`` of each grid, on a GPU of so many multiprocessors.

    It does not look for double writes, which would take 8 bytes per byte.
    """
    library = launchers()
    device, options = library.device, library.options
    library.device = dataclasses.replace(device, sm_count=processors)
    library.options = {**options, "detect_global_waw": False, "counters": False, "blocks": blocks}
    try:
        yield library
    finally:
        library.device, library.options = device, options


def first_block(grid):
    return [(0, 0, 0)]


def last_block(grid):
    return [tuple(size - 1 for size in grid)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Packed:
    """A weight of ``numel`` codes that is zero outside of some slices."""

    def __init__(self, numel, format="nf4", double_quant=True, row_length=K):
        self.numel, self.format, self.double_quant = numel, format, double_quant and format != "int8"
        self.block_size = row_length if format == "int8" else 64
        self.per_byte = 1 if format == "int8" else 2
        self.packed = huge(numel // self.per_byte, np.uint8)
        blocks = numel // self.block_size
        self.scales = huge(blocks, np.uint8 if self.double_quant else np.float32)
        self.group_scales = huge(-(-blocks // 256), np.float32) if self.double_quant else None
        self.offset = np.array([0.01], np.float32) if self.double_quant else None

    def fill(self, first, end):
        """Random codes and scales for the elements [first, end); ``first`` at the beginning of a block."""
        random_bytes = np.random.default_rng(first % 1000 + 1)
        self.packed[first // self.per_byte : end // self.per_byte] = random_bytes.integers(
            0, 256, (end - first) // self.per_byte
        )
        blocks = slice(first // self.block_size, -(-end // self.block_size))
        count = blocks.stop - blocks.start
        if not self.double_quant:
            self.scales[blocks] = random_bytes.uniform(0.5, 2, count)
            return
        self.scales[blocks] = random_bytes.integers(0, 256, count)
        groups = slice(blocks.start // 256, -(-blocks.stop // 256))
        self.group_scales[groups] = random_bytes.uniform(0.5, 2, groups.stop - groups.start)

    def decoded(self, first, end, dtype=torch.float32):
        """The elements [first, end) by the reference; ``first`` at the beginning of a group of blocks."""
        blocks = slice(first // self.block_size, -(-end // self.block_size))
        groups = offset = None
        if self.double_quant:
            assert blocks.start % 256 == 0
            groups = as_torch(self.group_scales[blocks.start // 256 : -(-blocks.stop // 256)].copy())
            offset = torch.tensor(self.offset[0])
        scales = as_torch(self.scales[blocks].copy())
        packed = as_torch(self.packed[first // self.per_byte : end // self.per_byte].copy())
        spec = spec_of(self.format, self.block_size, self.double_quant)
        length = min(end - first, self.block_size)  # of the rows of int8, or of a part of one
        shape = [end - first] if self.format != "int8" else [(end - first) // length, length]
        return reference.dequantize(packed, scales, groups, offset, spec, shape, dtype)

    def arguments(self):
        scales = (None, self.scales, self.group_scales, self.offset)
        if not self.double_quant:
            scales = (self.scales, None, None, None)
        return self.packed, *scales, FORMAT_CODES[self.format], self.block_size


#: Slices that one block takes in three rounds, where the grid covers 2^31 elements; after the last comes a tail.
ROUNDS = ((0, 8192), (2**31, 2**31 + 8192), (BEYOND, BEYOND + 8192 + 128))
NUMEL = ROUNDS[-1][1]


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize(double_quant):
    """A weight's far end decoded from its beginning would be noise in the model, without an error."""
    weight = Packed(NUMEL, double_quant=double_quant)
    for first, end in ROUNDS:
        weight.fill(first, end)
    out = huge(NUMEL, np.uint16)
    with running(first_block, processors=2**31 // (8 * 1024) // 4) as library:
        dtype = torch.bfloat16
        assert library.call("lowbit_dequantize", *weight.arguments(), NUMEL, out, DTYPE_CODES[dtype], None) == 0
    for first, end in ROUNDS:
        assert torch.equal(as_torch(out[first:end], dtype), weight.decoded(first, end, dtype))


def test_dequantize_columns():
    """The window of a weight's last row would be decoded from its beginning."""
    rows, row_length, count = 8, BEYOND // 4, 8192
    weight = Packed(rows * row_length)
    ends = [(row + 1) * row_length for row in (0, 3, 7)]
    for end in ends:
        weight.fill(end - 16384, end)
    out = written(rows * count, torch.bfloat16)
    first = row_length - count
    sizes = (rows, row_length, first, count)
    dtype = DTYPE_CODES[torch.bfloat16]
    assert launchers().call("lowbit_dequantize_columns", *weight.arguments(), *sizes, out, dtype, None) == 0
    for row, end in zip((0, 3, 7), ends, strict=True):
        assert torch.equal(out.view(rows, count)[row], weight.decoded(end - 16384, end, torch.bfloat16)[-count:])


def test_dequantize_int8():
    """The last of many rows, or the end of one long row, would be decoded from the weight's beginning."""
    dtype = torch.bfloat16
    weight = Packed((BEYOND_ROW + 8) * K, "int8")
    weight.fill(BEYOND, weight.numel)
    out = huge(weight.numel, np.uint16)
    with running(last_block) as library:
        arguments = (*weight.arguments(), weight.numel, out, DTYPE_CODES[dtype], None)
        assert library.call("lowbit_dequantize", *arguments) == 0
    assert torch.equal(as_torch(out[BEYOND:], dtype).view(8, K), weight.decoded(BEYOND, weight.numel, dtype))

    tile, in_a_round = 512, 65535
    numel = -(-BEYOND // (in_a_round * tile)) * in_a_round * tile + tile
    del out
    weight = Packed(numel, "int8", row_length=numel)
    weight.fill(0, 512)
    weight.packed[-512:] = weight.packed[:512][::-1]
    out = huge(numel, np.uint16)
    with running(first_block) as library:
        assert library.call("lowbit_dequantize", *weight.arguments(), numel, out, DTYPE_CODES[dtype], None) == 0
    for part in (slice(0, 512), slice(numel - 512, numel)):
        codes, absmax = as_torch(weight.packed[part].copy()), as_torch(weight.scales)
        expected = reference.dequantize(codes, absmax, None, None, "int8", [1, 512], dtype)
        assert torch.equal(as_torch(out[part], dtype), expected.view(-1))


def filled_floats(rounds, dtype=torch.bfloat16):
    weight = huge(rounds[-1][1], np.uint16)
    for i, (first, end) in enumerate(rounds):
        as_torch(weight[first:end], dtype)[:] = random(end - first, seed=i).to(dtype)
    return weight


def test_quantize():
    """The far end of a weight would be quantized with other scales, or stored elsewhere."""
    dtype = torch.bfloat16
    weight, packed, absmax = filled_floats(ROUNDS), huge(NUMEL // 2, np.uint8), huge(NUMEL // 64, np.float32)
    with running(first_block, processors=2**31 // (8 * 1024) // 8) as library:
        arguments = (weight, DTYPE_CODES[dtype], NUMEL, FORMAT_CODES["nf4"], 64, packed, absmax, None)
        assert library.call("lowbit_quantize", *arguments) == 0
    for first, end in ROUNDS:
        expected = reference.quantize(as_torch(weight[first:end], dtype), "nf4:64")
        assert torch.equal(as_torch(packed[first // 2 : end // 2]), expected[0])
        assert torch.equal(as_torch(absmax[first // 64 : end // 64]), expected[1])


def test_encode():
    """The second half of a searched quantization reads scales and weights by the same far index."""
    dtype = torch.bfloat16
    weight, packed, scales = filled_floats(ROUNDS), huge(NUMEL // 2, np.uint8), huge(NUMEL // 64, np.float32)
    for first, end in ROUNDS:
        scales[first // 64 : end // 64] = random((end - first) // 64).numpy() + 3
    with running(first_block, processors=2**31 // (8 * 1024) // 8) as library:
        arguments = (weight, DTYPE_CODES[dtype], NUMEL, FORMAT_CODES["nf4"], 64, scales, packed, None)
        assert library.call("lowbit_encode", *arguments) == 0
    for first, end in ROUNDS:
        own = as_torch(scales[first // 64 : end // 64].copy())
        expected = reference.encode(as_torch(weight[first:end], dtype), own, "nf4:64")
        assert torch.equal(as_torch(packed[first // 2 : end // 2]), expected)


def test_search_scales():
    """Importance belongs to the column of an element, whose number past 2^32 is no other's."""
    dtype, rounds = torch.bfloat16, tuple((first, first + 1024) for first in (0, 2**31, BEYOND))
    numel, columns = rounds[-1][1], 4194305  # a divisor of numel, odd
    assert numel % columns == 0
    weight, scales = filled_floats(rounds), huge(numel // 64, np.float32)
    importance = random(columns).abs()
    with running(first_block, processors=2**31 // 1024 // 8) as library:
        arguments = (weight, DTYPE_CODES[dtype], numel, FORMAT_CODES["nf4"], 64, importance, columns, scales, None)
        assert library.call("lowbit_search_scales", *arguments) == 0
    for first, end in rounds:
        own = importance[(torch.arange(1024) + first) % columns]
        expected = reference.search_scales(as_torch(weight[first:end], dtype).view(1, -1), own, "nf4:64")
        assert torch.equal(as_torch(scales[first // 64 : end // 64]), expected)


def test_quantize_int8():
    """A row past 2^32 elements would be quantized from other weights."""
    dtype, numel = torch.bfloat16, (BEYOND_ROW + 1) * K
    weight = filled_floats(((BEYOND, numel),))
    codes, absmax = huge(numel, np.uint8), huge(BEYOND_ROW + 1, np.float32)
    with running(last_block, processors=2**20) as library:  # a block for each row
        arguments = (weight, DTYPE_CODES[dtype], BEYOND_ROW + 1, K, codes, absmax, None)
        assert library.call("lowbit_quantize_int8", *arguments) == 0
    expected = reference.quantize(as_torch(weight[BEYOND:], dtype).view(1, K), "int8")
    assert torch.equal(as_torch(codes[BEYOND:]).view(-1), expected[0].view(-1))
    assert absmax[-1] == expected[1].item()


def test_quantize_scales():
    """Scales of more than 2^37 elements: no GPU holds such a weight today, and none of its scales may be another's."""
    blocks = 2**31 + 256
    absmax, offset = huge(blocks, np.float32), torch.tensor([0.25])
    absmax[-256:] = random(256).abs()
    codes, group_scales = huge(blocks, np.uint8), huge(blocks // 256, np.float32)
    with running(last_block) as library:
        assert library.call("lowbit_quantize_scales", absmax, offset, blocks, codes, group_scales, None) == 0
    expected = reference.quantize_scales(as_torch(absmax[-256:]), offset[0])
    assert torch.equal(as_torch(codes[-256:]), expected[0]) and group_scales[-1] == expected[1].item()


class Product:
    """x [m, k] times the last rows of a weight [n, k] past 2^32 elements, with LoRA and bias."""

    def __init__(self, m, rows, dtype, format="nf4", k=K):
        self.m, self.k, self.dtype, self.rows = m, k, dtype, rows
        self.n = -(-BEYOND // (128 * k)) * 128 + 256  # in every kernel's last block all rows are real ones
        self.weight = Packed(self.n * k, format)
        unit = k if format == "int8" else 64 * 256
        self.first = (self.n - rows) * k // unit * unit  # whole groups of blocks
        self.weight.fill(self.first, self.n * k)
        self.x, self.t, self.bias = random(m, k).to(dtype), random(m, RANK), torch.zeros(self.n)
        self.lora_b = torch.zeros(self.n, RANK)
        self.bias[-rows:], self.lora_b[-rows:] = random(rows), random(rows, RANK)
        self.y = torch.zeros(m, self.n, dtype=dtype)

    def arguments(self):
        lora = (*bias_arguments(self.bias), self.t, self.lora_b, 0.5, self.m, self.n, self.k, RANK)
        return self.x, DTYPE_CODES[self.dtype], *self.weight.arguments(), *lora, self.y

    def exact(self):
        """The product with the last rows, that of the magnitudes, and LoRA's share of it."""
        weight = self.weight.decoded(self.first, self.n * self.k).double().reshape(-1)[-self.rows * self.k :]
        weight, x, t = weight.view(self.rows, self.k), self.x.double(), 0.5 * self.t.double()
        lora_b, bias = self.lora_b[-self.rows :].double(), self.bias[-self.rows :].double()
        lora = t.abs() @ lora_b.abs().T
        return x @ weight.T + t @ lora_b.T + bias, x.abs() @ weight.abs().T + lora + bias.abs(), lora


@pytest.mark.parametrize(
    ("dtype", "format", "k", "kernel"),
    [
        (torch.bfloat16, "nf4", K, "gemv_mma"),
        (torch.float32, "nf4", K, "gemv_fma"),
        (torch.bfloat16, "int8", K, "gemv_int8"),
        (torch.bfloat16, "nf4", K - 1, "linear_any"),
    ],
)
def test_gemv(dtype, format, k, kernel):
    """The last outputs of a layer as large as a vocabulary times its width would be other rows'."""
    rows = 4 if kernel == "linear_any" else 16
    product, sizes = Product(2, rows, dtype, format, k), np.zeros(2, np.int64)
    with running(last_block) as library:
        assert library.call("lowbit_linear_gemv", *product.arguments(), None, None, sizes, None) == 0
    assert kernel in library.launches[-1].kernel and not sizes.any()
    exact, magnitude, _ = product.exact()
    tolerance = product_tolerance(magnitude, exact, k + RANK, dtype, 1.01 * weight_error_cuda(format, dtype))
    assert_within(product.y[:, -rows:], exact, tolerance)


def test_gemv_of_long_rows():
    """Rows of 2^26 columns, the most for 32-bit offsets, would be summed wrongly over blocks."""
    k, n, share = 2**26, 80, 4096
    weight = Packed(n * k, double_quant=False)
    for row in range(n - 16, n):
        weight.fill((row + 1) * k - share, (row + 1) * k)
    x, y = torch.zeros(1, k, dtype=torch.bfloat16), torch.zeros(1, n, dtype=torch.bfloat16)
    x[:, -share:] = random(1, share)
    arguments = (x, DTYPE_CODES[x.dtype], *weight.arguments(), None, 0, None, None, 1.0, 1, n, k, 0)
    sizes, shares = np.zeros(2, np.int64), k // share
    with running(last_block, processors=5 * shares // 2) as library:
        assert library.call("lowbit_linear_gemv", *arguments, None, None, None, sizes, None) == 0
        assert sizes.tolist() == [n * shares, n // 16]
        # The blocks that do not run have written zeros and arrived.
        workspace, counters = np.zeros(n * shares, np.float32), np.full(n // 16, shares - 1, np.uint32)
        assert library.call("lowbit_linear_gemv", *arguments, y, workspace, counters, sizes, None) == 0
    rows = [weight.decoded((row + 1) * k - share, (row + 1) * k) for row in range(n - 16, n)]
    decoded, used = torch.stack(rows).double(), x[:, -share:].double()
    exact, magnitude = used @ decoded.T, used.abs() @ decoded.abs().T
    rounding = 1.01 * weight_error_cuda("nf4", x.dtype)
    assert_within(y[:, -16:], exact, product_tolerance(magnitude, exact, share, x.dtype, rounding))


@pytest.mark.parametrize("m", [16, 33])
def test_gemm(m):
    """More rows of x would meet other weights or scales, whose numbers have 32 bits in units of 32 or 64 columns."""
    rows = 64  # in the last tile of columns, whatever its width
    product = Product(m, rows, torch.bfloat16)
    with running(last_block) as library:
        assert library.call("lowbit_linear_gemm", *product.arguments(), None, None, None) == 0
    assert library.launches[-1].grid[1] == 1
    exact, magnitude, lora = product.exact()
    tolerance = gemm_tolerance(magnitude, lora, exact, K + RANK, "nf4", torch.bfloat16)
    assert_within(product.y[:, -rows:], exact, tolerance)


@pytest.mark.parametrize(
    ("dtype", "format", "kernel", "columns"),
    [
        (torch.bfloat16, "nf4", "grad_input_mma", 128),
        (torch.float32, "nf4", "grad_input_fma", 256),
        (torch.bfloat16, "int8", "grad_input_element", 256),
    ],
)
def test_grad_input(dtype, format, kernel, columns):
    """Rows of W past 2^32 elements would be read elsewhere; they are a third of the contraction."""
    m, n, k, share = 2, 192, 2**25, 256 * 64
    weight = Packed(n * k, format, row_length=k)
    for row in range(n):
        weight.fill((row + 1) * k - share, (row + 1) * k)
    grad, out = random(m, n).to(dtype), torch.zeros(m, k, dtype=dtype)
    arguments = (grad, DTYPE_CODES[dtype], *weight.arguments(), None, None, m, n, k, 0, out, None, None)
    sizes = np.zeros(2, np.int64)
    with running(last_block) as library:
        assert library.call("lowbit_linear_grad_input", *arguments, sizes, None) == 0
    assert kernel in library.launches[-1].kernel and not sizes.any()
    rows = [weight.decoded((row + 1) * k - share, (row + 1) * k).view(-1)[-columns:] for row in range(n)]
    used, decoded = grad.double(), torch.stack(rows).double()
    exact, magnitude = used @ decoded, used.abs() @ decoded.abs()
    tolerance = tensor_core_tolerance(magnitude, exact, n, dtype, used.abs().sum(-1, keepdim=True))
    assert_within(out[:, -columns:], exact, tolerance)
