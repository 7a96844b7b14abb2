"""The Triton kernel that rounds LoRA's factors: bit for bit what torch's ops would make."""

import itertools

import pytest
import torch
from cases import DTYPES, CalledOps, assert_same_bits, factors, make_weight, rounded_factors
from conftest_triton import compiled_only, emulate, function, interpreted, launches
from triton_calls import parts_of

from lowbit.backends.triton import products as module

#: (m, n, rank, dtype of the result, of low, of up, scaling, whether up is a transpose)
CASES = {
    "one row": (1, 65, 8, torch.float16, torch.float32, torch.float32, 0.7, False),
    "one output": (3, 1, 17, torch.float16, torch.float32, torch.bfloat16, 1.0, True),
    "rank 1": (257, 130, 1, torch.float16, torch.float16, torch.float32, -64.0, False),
    "rank 1, transposed": (3, 1030, 1, torch.bfloat16, torch.bfloat16, torch.float32, 1.0, True),
    "tiles": (1000, 2050, 8, torch.float16, torch.float32, torch.float32, 0.7, False),
    "tiles, transposed": (1030, 3000, 17, torch.float16, torch.float32, torch.float32, 1.0, True),
    "many components": (257, 1030, 130, torch.float16, torch.float32, torch.float32, 2.0**-10, False),
    "bf16": (1000, 1030, 17, torch.bfloat16, torch.float32, torch.float32, 0.7, False),
    "bf16 from bf16": (257, 65, 8, torch.bfloat16, torch.bfloat16, torch.bfloat16, 16.0, True),
    "fp16 from fp16": (257, 65, 8, torch.float16, torch.float16, torch.float16, 1.0, True),
    "fp32": (33, 65, 8, torch.float32, torch.float32, torch.float16, 0.7, False),
    "scaling beyond 2^15": (33, 65, 8, torch.float16, torch.float32, torch.float32, 1e6, False),
    "no scaling left": (33, 65, 8, torch.float16, torch.float32, torch.float32, 0.0, False),
}


def assert_equals_torch(run, m, n, rank, dtype, low_dtype, up_dtype, scaling, is_transposed):
    """Assert that ``run`` of module.rounded_factors returns torch's bits, and up's laid out as up itself."""
    low, up = factors(m, n, rank, low_dtype, up_dtype)
    if is_transposed:
        up = up.T.contiguous().T
    ours = run(low, up, dtype, scaling)
    for our, their in zip(ours, rounded_factors(low, up, dtype, scaling), strict=True):
        assert_same_bits(our, their)
    assert ours[0].is_contiguous() and ours[1].stride() == up.stride()


def emulated(*arguments):
    with launches("sm_80") as made:
        factors = module.rounded_factors(*arguments)
    (launch,) = made
    for factor in factors:
        (factor if factor.is_contiguous() else factor.T).fill_(7)
    emulate(launch, detect_global_waw=True)
    return factors


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name):
    """A row left out, or divided by more than up is multiplied by, is another LoRA than the one being trained."""
    assert_equals_torch(module.rounded_factors, *CASES[name])


@compiled_only
@pytest.mark.parametrize("name", CASES)
def test_ptx_equals_torch(name):
    """What NVIDIA GPUs run: divisions and conversions that round otherwise would be other bits."""
    assert_equals_torch(emulated, *CASES[name])


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ptx_of_every_dtype(dtype):
    """LoRA may be kept in any dtype, and t in another: misread, it is noise."""
    for low_dtype, up_dtype in itertools.product(DTYPES, repeat=2):
        assert_equals_torch(emulated, 33, 70, 5, dtype, low_dtype, up_dtype, 0.7, False)


def test_factors_that_are_right_stay():
    """Factors that need no rounding would be copied, by a launch for nothing."""
    low, up = torch.ones(3, 2).bfloat16(), torch.ones(5, 2).bfloat16()
    with launches() as made:
        assert module.rounded_factors(low, up, torch.bfloat16)[0] is low
        assert module.rounded_factors(low, up, torch.bfloat16)[1] is up
    assert not made


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_launch_for_both_factors(dtype):
    """A chain of torch's ops, of two microseconds each, took as long as the product of a batch of 512 rows."""
    parts, t = parts_of(make_weight((64, 70))), torch.ones(600, 8)
    calls = {
        "linear": (torch.ones(600, 70, dtype=dtype), *parts, 64, None, t, torch.ones(64, 8), 0.7),
        "linear_grad_input": (torch.ones(600, 64, dtype=dtype), *parts, 70, t, torch.ones(8, 70)),
    }
    for op, arguments in calls.items():
        arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        with launches("sm_80") as made, CalledOps() as called:
            function(op)(*arguments)
        assert [launch.kernel.__name__ for launch in made] == ["rounded_factors_kernel"], op
        # But for views, and what gives memory.
        of_memory = ("aten::empty", "aten::new_empty")
        names = [each.name() for each in called.ops if not each.is_view and not each.name().startswith(of_memory)]
        assert sorted(names) == ["aten::addmm", "aten::mm", "lowbit_triton::dequantize"], op
