"""The CUDA kernels of quantize(codes="descent"), executed by the emulator: equal to the reference, bit for bit."""

import pytest
import torch
from cases import descent_case
from conftest_cuda import FORMAT_CODES, call, written

from lowbit import reference_descent

#: (rows, columns, candidate scales, format): lanes without a row, several blocks of threads, fewer rows than a warp's
#: to a block (128 columns keep 32 rows of GPTQ, 32 of the descent; 256 keep 32 and 16).
CASES = ((1, 32, 1, "nf4"), (33, 32, 5, "fp4"), (35, 64, 6, "nf4"), (17, 256, 2, "nf4"))


@pytest.mark.parametrize(("rows", "columns", "count", "format"), CASES)
def test_blocks_equal_the_reference(rows, columns, count, format):
    """A model calibrated on a GPU has to be the same file as one calibrated on a CPU."""
    weight, hessian, upper, candidates = descent_case(rows, columns, count, rows)
    spec, sizes = f"{format}:{columns}", (FORMAT_CODES[format], rows, columns, count)
    expected = reference_descent.gptq_block(weight, upper, candidates, spec)
    decoded, errors = written(rows * columns, torch.float32), written(rows * columns, torch.float32)
    choice = written(rows, torch.int32)
    call("lowbit_gptq_block", weight.contiguous(), upper.contiguous(), candidates, *sizes, decoded, errors, choice)
    for ours, theirs in zip((decoded, errors, choice), expected, strict=True):
        assert torch.equal(ours, theirs.view(-1))

    decoded, gradient = expected[0], (weight - expected[0]) @ hessian
    candidates = candidates.roll(1, 1)
    expected = reference_descent.descend_block(decoded, gradient, hessian, candidates, 2, spec)
    result, choice = written(rows * columns, torch.float32), written(rows, torch.int32)
    call("lowbit_descend_block", decoded, gradient, hessian.contiguous(), candidates, *sizes, 2, result, choice)
    for ours, theirs in zip((result, choice), expected, strict=True):
        assert torch.equal(ours, theirs.view(-1))
