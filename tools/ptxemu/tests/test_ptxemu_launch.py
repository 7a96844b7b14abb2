"""Loading PTX and launching kernels: parsing, arguments, limits; no compiler needed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_kernels import HEADER
from ptxemu import Device, EmulatorError, LaunchError, UnsupportedInstruction, load
from ptxemu.parser import parse_constant, split_operands

KERNELS = load(
    HEADER.format(arch="80")
    + """
.const .align 4 .b8 code[16] = {0, 0, 128, 63, 0, 0, 0, 64};
.global .align 4 .f32 scale = 0f40400000;
.visible .entry _Z5storePjjfs(.param .u64 p, .param .u32 n, .param .f32 f, .param .align 4 .b8 s[8])
.maxntid 64, 1, 1
{
  /* { a comment with braces ; */
  .reg .pred %p<2>; .reg .b32 %r<9>; .reg .f32 %f<4>; .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [p]; ld.param.u32 %r1, [n]; ld.param.f32 %f1, [f];
  ld.param.u32 %r2, [s+4]; // the second half of the struct
  mov.u32 %r3, %tid.x; mad.wide.u32 %rd2, %r3, 4, %rd1;
  { .reg .b32 %r1; mov.u32 %r1, 77; }
  cvt.rzi.u32.f32 %r4, %f1; add.u32 %r5, %r1, %r4; add.u32 %r6, %r5, %r2;
  mov.u64 %rd3, scale; ld.global.f32 %f2, [%rd3]; cvt.rzi.u32.f32 %r7, %f2; add.u32 %r6, %r6, %r7;
  ld.const.f32 %f3, [code+4]; cvt.rzi.u32.f32 %r8, %f3; mad.lo.u32 %r6, %r8, 1000, %r6;
  st.global.u32 [%rd2], %r6; ret;
}
.visible .entry texture(.param .u64 p) { tex.2d.v4.f32.f32 {%a, %b, %c, %d}, [x, {%e, %f}]; ret; }
.visible .entry guarded(.param .u64 p)
{
  .reg .pred never; .reg .b32 r; setp.ne.u32 never, 0, 0;
  @never brev.b128 r, r; ret;
}
"""
)
STRUCT = np.array([0, 50], np.uint32)


def store(p, *arguments, block=32, **options):
    return KERNELS.launch("store", 1, block, [p, *arguments], **options)


def test_arguments_reach_their_parameters():
    """Scopes, structs, constants with initial values and comments, as compilers write them."""
    out = np.zeros(32, np.uint32)
    store(out, 7, 5.9, STRUCT)
    assert (out == 7 + 5 + 50 + 3 + 2000).all()
    assert KERNELS.kernels == ["_Z5storePjjfs", "texture", "guarded"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1,), r"kernel _Z5storePjjfs takes 4 arguments \(u64, u32, f32, b8\[8 bytes\]\), got 2"),
        ((1, 2.0, STRUCT, 4), "takes 4 arguments.*got 5"),
        ((1.5, 2.0, STRUCT), r"argument 1 must be an integer \(u32\), got float 1.5"),
        ((2**32, 2.0, STRUCT), "argument 1 must be an integer of 32 bits, got int 4294967296"),
        ((1, 2.0, STRUCT[:1]), "argument 3 must have 8 bytes, got 4"),
        ((1, STRUCT, STRUCT), r"argument 2 must be 4 bytes \(f32\), not an array"),
        ((1, 2.0, 5), "argument 3 must be 8 bytes, got int 5"),
        ((1, "2", STRUCT), "argument 2 must be an array or a number, got str"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    """A swapped or missing argument would be read as garbage by the kernel."""
    with pytest.raises(LaunchError, match=message):
        store(np.zeros(32, np.uint32), *arguments)


@pytest.mark.parametrize(
    "grid, block, message",
    [
        (0, 32, "grid must be 1 to"),
        ((1, 65536), 32, "grid must be 1 to"),
        (1, 0, "block must be 1 to"),
        (1, (32, 32, 2), "block must be 1 to"),
        (1, 65, r"65 threads exceed the kernel's __launch_bounds__\(64\)"),
    ],
)
def test_configurations_that_cuda_refuses(grid, block, message):
    """They fail on every GPU, so they must fail here."""
    with pytest.raises(LaunchError, match=f"kernel _Z5storePjjfs: .*{message}"):
        KERNELS.launch("store", grid, block, [np.zeros(64, np.uint32), 1, 2.0, STRUCT])


def test_shared_memory_is_limited_by_the_device():
    """A tile for an H100 does not fit an RTX 4090."""
    out = np.zeros(32, np.uint32)
    store(out, 1, 2.0, STRUCT, shared=200_000, device=Device.for_arch("90"))
    with pytest.raises(LaunchError, match="exceed 101376"):
        store(out, 1, 2.0, STRUCT, shared=200_000, device=Device.for_arch("sm_89"))
    with pytest.raises(ValueError, match="arch must be one of 75, 80"):
        Device.for_arch("sm_35")


def test_missing_trailing_arguments_may_be_filled():
    """Triton adds scratch pointers that its callers do not know of."""
    out = np.zeros(32, np.uint32)
    KERNELS.launch("store", 1, 32, [out, 7, 2.0], pad_args=True)
    assert (out == 7 + 2 + 3 + 2000).all()


def test_unknown_kernels_and_options():
    """A typing error names what there is."""
    with pytest.raises(LaunchError, match="0 kernels match 'stores'; this module has _Z5storePjjfs"):
        KERNELS.launch("stores", 1, 32, [])
    with pytest.raises(LaunchError, match="2 kernels match 're'"):
        KERNELS.launch("re", 1, 32, [])
    with pytest.raises(ValueError, match=r"schedule must be one of \('lockstep'.*got 'fast'"):
        store(np.zeros(32, np.uint32), 1, 2.0, STRUCT, schedule="fast")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sched'"):
        store(np.zeros(32, np.uint32), 1, 2.0, STRUCT, sched="random")


def test_unknown_instructions_matter_only_when_executed():
    """A kernel may contain a path for another chip; one that runs into it must not get a made-up result."""
    KERNELS.launch("guarded", 1, 32, [None])
    with pytest.raises(UnsupportedInstruction, match=r"tex.2d.* is not supported.*kernel texture, PTX line \d+"):
        KERNELS.launch("texture", 1, 32, [None])
    assert ["kernel texture" in line for line in KERNELS.unsupported("texture")] == [True]
    assert not KERNELS.unsupported("store")


def test_nonsense_names_its_line():
    """PTX that is damaged must not run half."""
    text = HEADER.format(arch="80") + ".visible .entry k()\n{\n add.u32 a, b, c; ret; }"
    with pytest.raises(EmulatorError, match="kernel k, PTX line 6"):
        load(text).launch("k", 1, 32, [])


@given(st.integers(-(2**31), 2**64 - 1))
def test_integer_constants(value):
    """Immediates in every base the compilers use."""
    assert parse_constant(str(value)).value == value
    if value >= 0:
        assert parse_constant(hex(value)).value == parse_constant(f"{value}U").value == value
        assert parse_constant(f"0{value:o}").value == parse_constant(f"0b{value:b}").value == value


@given(st.floats(width=32, allow_nan=False))
def test_float_constants(value):
    """Scale constants are written as the bits of a float."""
    bits = int(np.float32(value).view(np.uint32))
    constant = parse_constant(f"0f{bits:08X}")
    assert np.float32(constant.as_float()).view(np.uint32) == bits
    assert parse_constant(f"-0F{bits:08x}").value == bits ^ 0x80000000
    assert parse_constant("%f1") is None


OPERANDS = ("%r1", "[%rd12+8]", "{a, b}", "(x, [y, {z, w}])", "-5", "p|q")


@given(st.lists(st.sampled_from(OPERANDS)))
def test_operands_split_at_outer_commas(operands):
    """Vectors and address expressions hold commas of their own."""
    assert split_operands(", ".join(operands)) == operands
