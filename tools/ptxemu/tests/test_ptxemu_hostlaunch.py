"""Launch code run for real on the stub runtime: what it asks for is what gets checked."""

import ctypes
import dataclasses

import numpy as np
import pytest
import torch
from ptx_kernels import KERNELS, needs_nvcc
from ptxemu import Device, LaunchError, MemoryFault, Pointer, Uninitialized, hostlaunch

pytestmark = needs_nvcc

PLAIN, TWICE = 0, 1
KIB = 1024


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return hostlaunch.build(KERNELS / "launchers.cu", out=tmp_path_factory.mktemp("launchers"))


@pytest.fixture
def library(built):
    built.launches.clear()
    built.runtime_calls.clear()
    built.device, built.options = Device.for_arch("sm_80"), {}
    built.set_device_count(1)
    built.forget()
    return built


@pytest.fixture
def x():
    return np.arange(384, dtype=np.float32)


class ScaleArguments(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("a", ctypes.c_float), ("n", ctypes.c_int)]


def reverse(library, x, y, n=384, mode=PLAIN, blocks=3, threads=128, shared=512, stream=None, **keywords):
    return library.call("reverse", x, y, n, mode, blocks, threads, shared, stream, **keywords)


def test_the_launcher_decides_everything(library, x):
    """Grid, block, shared memory, arguments and stream are those of the host code, and tests see them."""
    y = np.full(384, np.nan, np.float32)
    assert reverse(library, x, y, mode=TWICE, stream=0x5EED) == 0
    np.testing.assert_array_equal(y.reshape(3, 128), 2 * x.reshape(3, 128)[:, ::-1])
    (launch,) = library.launches
    assert "reverse_kernel" in launch.kernel and (launch.grid, launch.block) == ((3, 1, 1), (128, 1, 1))
    assert (launch.shared, launch.stream, launch.device) == (512, 0x5EED, 0)
    assert launch.result.load_bytes == 4 * 384


def test_torch_tensors_are_arguments(library, x):
    """The library's tests hold torch tensors."""
    y = torch.zeros(384)
    reverse(library, torch.from_numpy(x), y)
    np.testing.assert_array_equal(y.numpy().reshape(3, 128), x.reshape(3, 128)[:, ::-1])
    assert library.launches[-1].stream == 0


def test_pointers_into_arrays(library, x):
    """A launcher that adds an offset to a pointer still points into the same array."""
    y = np.full(384, np.nan, np.float32)
    reverse(library, Pointer(x, 512), Pointer(y, 512), n=256, blocks=2)
    assert np.isnan(y[:128]).all()
    np.testing.assert_array_equal(y[128:].reshape(2, 128), x[128:].reshape(2, 128)[:, ::-1])
    with pytest.raises(MemoryFault, match=r"arg0\+1536"):
        reverse(library, Pointer(x, 512), y)


@pytest.mark.parametrize("blocks", [0, -1])
def test_a_wrong_grid_is_an_error(library, x, blocks):
    """An empty tensor or an overflow must not become a launch that CUDA refuses on the user's machine."""
    with pytest.raises(LaunchError, match=r"kernel \w*reverse_kernel\w*: grid must be 1 to"):
        reverse(library, x, np.zeros_like(x), blocks=blocks)
    assert reverse(library, x, np.zeros_like(x), blocks=blocks, check=False) == 9  # cudaErrorInvalidConfiguration
    assert not library.launches


def test_a_grid_too_large_for_the_arrays_is_an_error(library, x):
    """The kernel's own bound is wrong, or the launcher passed the wrong n."""
    with pytest.raises(MemoryFault, match=r"out of bounds.*block \(3,0,0\).*launchers.cu"):
        reverse(library, x, np.zeros_like(x), n=400, blocks=4)


def test_a_block_beyond_the_launch_bounds_is_an_error(library, x):
    """The kernel was compiled for fewer registers than such a block needs."""
    with pytest.raises(LaunchError, match=r"256 threads exceed the kernel's __launch_bounds__\(128\)"):
        reverse(library, x, np.zeros_like(x), threads=256, shared=1024)
    with pytest.raises(LaunchError, match="block must be"):
        reverse(library, x, np.zeros_like(x), threads=1025)


def test_too_little_shared_memory_is_an_error(library, x):
    """Bytes where elements were meant: the kernel writes past what it was given."""
    with pytest.raises(MemoryFault, match=r"at shared\+128 \(size 128 bytes\)"):
        reverse(library, x, np.zeros_like(x), shared=128)


def test_large_shared_memory_must_be_asked_for(built, library, x):
    """Beyond 48 KB a launch fails on every GPU unless cudaFuncSetAttribute came first, and up to a limit only."""
    with pytest.raises(LaunchError, match=r"49153 bytes of dynamic shared memory exceed 49152; ask.*FuncSetAttribute"):
        reverse(library, x, np.zeros_like(x), shared=48 * KIB + 1)
    assert reverse(library, x, np.zeros_like(x), shared=48 * KIB + 1, check=False) == 1
    assert library.call("allow_shared", 100 * KIB) == 0
    assert reverse(library, x, np.zeros_like(x), shared=100 * KIB) == 0
    with pytest.raises(LaunchError, match="exceed 102400"):
        reverse(library, x, np.zeros_like(x), shared=100 * KIB + 4)
    with pytest.raises(LaunchError, match="exceed 49152"):  # the other instance of the template did not ask
        reverse(library, x, np.zeros_like(x), mode=TWICE, shared=100 * KIB)
    library.device = Device.for_arch("sm_86")
    with pytest.raises(LaunchError, match=r"asks for 102400 bytes.*the device has 101376 for it"):
        library.call("allow_shared", 100 * KIB)


def test_static_shared_memory_counts(library):
    """Together they are limited to 48 KB unless asked for, and to what the device has."""
    y = np.zeros(32, np.float32)
    assert library.call("beside_static", y, 0, 16 * KIB) == 0
    np.testing.assert_array_equal(y, 2 * np.arange(32))
    with pytest.raises(LaunchError, match="16388 bytes of dynamic shared memory exceed 16384; ask"):
        library.call("beside_static", y, 0, 16 * KIB + 4)
    assert library.call("beside_static", y, 100 * KIB, 100 * KIB) == 0
    with pytest.raises(
        LaunchError, match="asks for 138240 bytes of dynamic shared memory, the device has 134144 for it"
    ):
        library.call("beside_static", y, 135 * KIB, 16 * KIB)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("x", "y", 384, PLAIN, 3, 128, 512), r"lowbit::reverse\(float\*, float\*, long, Mode, .*: got 7 arguments"),
        (("x", "y", 384.5, PLAIN, 3, 128, 512, None), r"argument 2 \(long\) cannot hold 384.5"),
        (("x", "y", 384, PLAIN, 2**31, 128, 512, None), r"argument 4 \(int\) cannot hold 2147483648"),
        (("x", 5, 384, PLAIN, 3, 128, 512, None), r"argument 1 \(float\*\) needs an array, Pointer or None, got 5"),
        (("x", "y", "x", PLAIN, 3, 128, 512, None), r"argument 2 \(long\) got an array"),
        (("x", "double", 384, PLAIN, 3, 128, 512, None), r"points to 4-byte elements, got an array of float64"),
    ],
)
def test_arguments_are_checked_against_the_function(library, x, arguments, message):
    """A call from a test that C would silently misread."""
    arrays = {"x": x, "y": np.zeros_like(x), "double": np.zeros(384)}
    with pytest.raises(LaunchError, match=message):
        library.call("reverse", *[arrays[a] if isinstance(a, str) else a for a in arguments])


def test_functions_are_found_by_name(library):
    """Launchers live in namespaces and may be overloaded."""
    assert library.call("add", 2, 3) == library.call("lowbit::add", 2, 3) == 5
    assert library.call("add", 2, 3, 4) == 9
    with pytest.raises(LaunchError, match=r"lowbit::add\(int, int\) or lowbit::add\(int, int, int\): got 1 arguments"):
        library.call("add", 2)
    with pytest.raises(LaunchError, match=r"on_device\(int, int\*, float\*, float\*\): got 1 arguments"):
        library.call("on_device", 0)  # extern "C": the types are those of the source
    with pytest.raises(LaunchError, match=r"no function subtract in the library, which has .*lowbit::reverse"):
        library.call("subtract", 2, 3)


def test_structs_by_value_hold_pointers(library, x):
    """Kernels take their arguments as one struct; the pointers in it are checked like any other."""
    y = np.full(384, np.nan, np.float32)
    arguments = ScaleArguments(library.address(x), library.address(y), 3.0, 300)
    assert library.call("lowbit::scale", arguments, 7) == 0
    np.testing.assert_array_equal(y[:300], 3 * x[:300])
    assert np.isnan(y[300:]).all()
    assert library.launches[-1].stream == 7
    assert [(c.name, c.bytes, c.stream) for c in library.runtime_calls] == [("cudaMemsetAsync", 1200, 7)]
    assert library.call("lowbit::scale", arguments, None) == 0  # what `address` declared stays known
    library.forget()
    with pytest.raises(MemoryFault, match="cudaMemsetAsync"):
        library.call("lowbit::scale", arguments, None)
    library.know(x)
    library.know(y)
    arguments.n = 385
    with pytest.raises(MemoryFault, match="cudaMemsetAsync of 1540 bytes at 0x[0-9a-f]+ leaves the memory"):
        library.call("lowbit::scale", arguments, None)


def test_numbers_that_look_like_a_pointer(library):
    """A scaling beside padding, which holds anything, would be replaced where both together are an address."""
    stranger = library.know(np.zeros(4096, np.uint8))
    factor, n = np.array([stranger.ctypes.data + 1024], np.uint64).view(np.uint32)
    factor = factor.view(np.float32)
    x, y = np.ones(n, np.float32), np.zeros(n, np.float32)
    assert library.call("lowbit::scale", ScaleArguments(library.address(x), library.address(y), factor, n), None) == 0
    np.testing.assert_array_equal(y, np.full(n, factor))


def test_memory_nobody_declared_is_an_error(library, x):
    """A dangling pointer, or a workspace the launcher was not given."""
    stranger = np.zeros(384, np.float32)
    arguments = ScaleArguments(library.address(x), stranger.ctypes.data, 3.0, 384)
    with pytest.raises(MemoryFault, match="cudaMemsetAsync"):
        library.call("lowbit::scale", arguments, None)
    with pytest.raises(MemoryFault, match="unmapped address"):
        library.call("reverse", x, ctypes.c_void_p(0x1234560), 384, PLAIN, 3, 128, 512, None)


def test_a_workspace_is_undefined_until_written(library, x):
    """What one kernel leaves in the workspace the next may read, and nothing else."""
    workspace, y = Uninitialized(np.zeros(384, np.float32)), np.zeros(384, np.float32)
    library.call("scale_twice", x, workspace, y, 3.0, 384, None)
    np.testing.assert_array_equal(y, 9 * x)
    assert len(library.launches) == 2 and workspace.all_written()
    cleared = Uninitialized(np.ones(384, np.float32))
    library.call("clear", cleared, 300, None)
    reverse(library, cleared, y, n=300, blocks=3)
    assert not y[:300].any()
    with pytest.raises(MemoryFault, match=r"read of memory never written.* arg0\+1200 "):
        reverse(library, cleared, y, n=301, blocks=3)
    with pytest.raises(MemoryFault, match="read of memory never written"):
        reverse(library, Uninitialized(np.zeros(384, np.float32)), y)


def test_allocations_and_synchronizations_are_seen(library, x):
    """Launchers must do neither, or they cannot be captured in a CUDA graph."""
    y = np.zeros(384, np.float32)
    assert library.call("allocates", x, y, 384) == 0
    np.testing.assert_array_equal(y, x)
    names = [call.name for call in library.runtime_calls]
    assert names == ["cudaMallocAsync", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaFreeAsync"]
    with pytest.raises(MemoryFault, match="cudaMemcpyAsync of 1540 bytes"):
        library.call("allocates", np.zeros(385, np.float32), y, 385)


def test_the_device_is_the_test_s_to_choose(library, x):
    """Configurations depend on the number of SMs and on the architecture; all of them can be tried."""
    y, described = np.zeros(32, np.float32), np.zeros(3, np.int32)
    assert library.call("on_device", 0, described, x, y) == 0
    assert described.tolist() == [108, 8, 163 * KIB]
    library.device = dataclasses.replace(Device.for_arch("sm_90"), sm_count=7)
    library.set_device_count(2)
    assert library.call("on_device", 1, described, x, y) == 0
    assert described.tolist() == [7, 9, 227 * KIB]
    assert library.launches[-1].device == 1 and library.current_device == 0
    assert library.call("on_device", 2, described, x, y) == 101  # cudaErrorInvalidDevice


def test_a_fault_does_not_stay(library, x):
    """One failing call must not make the next one fail."""
    y = np.zeros_like(x)
    with pytest.raises(MemoryFault):
        reverse(library, x, y, n=400, blocks=4)
    assert reverse(library, x, y) == 0


def test_options_reach_the_emulator(library, x):
    """The same launch code under another order of execution."""
    library.options = {"schedule": "reverse", "detect_global_waw": True}
    y = np.zeros_like(x)
    assert reverse(library, x, y) == 0
    np.testing.assert_array_equal(y.reshape(3, 128), x.reshape(3, 128)[:, ::-1])


def test_compile_errors_say_what_nvcc_said(tmp_path):
    """Otherwise a broken source is a riddle."""
    (tmp_path / "broken.cu").write_text("int f() { return undeclared; }\n")
    with pytest.raises(RuntimeError, match='identifier "undeclared" is undefined'):
        hostlaunch.build(tmp_path / "broken.cu", out=tmp_path)
