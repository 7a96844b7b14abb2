"""What lowbit's Triton backend would launch on GPUs that are not here, and the machine code of it.

Nothing runs. ``launches`` collects what calls of the backend's functions pass to ``launch``. ``compiled`` makes machine
code of such a launch for any GPU, specialized as Triton would. Benchmarks and tests count with the same code.
"""

import contextlib
import dataclasses
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from lowbit import format as fmt
from lowbit.backends import triton as backend

from .machine_code import Kernel, disassemble


@dataclasses.dataclass
class Launch:
    """What a function of lowbit.backends.triton passed to ``launch``; ``values`` has one per parameter of the kernel.

    ``together`` holds all launches that were collected with this one, itself included.
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    options: dict
    together: list["Launch"] = dataclasses.field(default_factory=list, repr=False)
    compiled: dict[str, tuple] = dataclasses.field(default_factory=dict, repr=False)  # by target

    def __post_init__(self):
        names = [parameter.name for parameter in self.kernel.params]
        self.compiler_options = {name: value for name, value in self.options.items() if name not in names}
        self.values = dict(zip(names, self.arguments, strict=False))
        self.values.update({name: value for name, value in self.options.items() if name in names})


def _modules() -> list[ModuleType]:
    """Every module of the backend that its ops use."""
    for name in set(backend.MODULES.values()):
        importlib.import_module(f"{backend.__name__}.{name}")
    return [module for name, module in sys.modules.items() if name.startswith(f"{backend.__name__}.")]


def _of_gpu(target: str, processors: int) -> dict[str, object]:
    """What the backend asks about the GPU, by the backend's names: whether it runs NVIDIA's assembly, and its size."""
    from lowbit.backends.triton.shapes import Gpu

    is_nvidia = target.startswith("sm_")
    gpu = Gpu(int(target.removeprefix("sm_")) if is_nvidia else 0, processors, gpu_target(target).warp_size)
    return {"PORTABLE": not is_nvidia, "gpu_of": lambda device: gpu}


def function(op: str):
    """The backend's function of an op."""
    return getattr(importlib.import_module(f"{backend.__name__}.{backend.MODULES[op]}"), op)


def tensor(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """A tensor without memory, so that shapes may be those of real models."""
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(shape: tuple[int, ...], format: str, block_size: int = 64, double_quant: bool = True) -> tuple:
    """The arguments of an op from packed to spec."""
    spec = fmt.WeightSpec(format, block_size, double_quant)
    packed = tensor(spec.packed_size(math.prod(shape)), dtype=torch.uint8)
    scales = spec.scale_count(shape)
    if not spec.double_quant:
        return packed, tensor(scales), None, None, str(spec)
    group_scales = tensor(fmt.block_count(scales, fmt.GROUP_SIZE))
    return packed, tensor(scales, dtype=torch.uint8), group_scales, tensor(), str(spec)


@contextlib.contextmanager
def launches(target: str | None = None, processors: int = 108):
    """A context that gives the list of the launches made in it; none runs.

    With a ``target``, such as "sm_90" or "gfx942", they are those for its GPU with so many multiprocessors (by default
    an A100's). Uninitialized memory has the same contents each time, so that equal launches have equal arguments.
    """
    collected = []
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def collect(kernel, grid, *arguments, **options):
        if 0 not in grid:
            collected.append(Launch(kernel, (*grid, 1, 1)[:3], arguments, options, collected))

    replaced = {"launch": collect} | (_of_gpu(target, processors) if target is not None else {})
    with contextlib.ExitStack() as patches:
        for module in _modules():
            for name in replaced.keys() & vars(module).keys():
                patches.enter_context(mock.patch.object(module, name, replaced[name]))
        patches.callback(torch.use_deterministic_algorithms, deterministic[0], warn_only=deterministic[1])
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield collected


def gpu_target(name: str):
    """Triton's description of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def specialized(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict]:
    """(signature, constants, attributes) with which Triton would compile a launch's kernel at run time."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.values.get(parameter.name, parameter.default)
        name = parameter.name
        may_specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and may_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and may_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _source(launch: Launch):
    """(Triton's source of a launch, its options, the signature)."""
    from triton.compiler import ASTSource

    signature, constants, attributes = specialized(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, {"enable_fp_fusion": False, **launch.compiler_options}, signature


def key_of(launch: Launch, target: str) -> str:
    """Triton's own key for a compiled kernel. Equal keys mean equal PTX and equal machine code.

    It covers the sources of the kernel and of all that it calls, what it is specialized on, the target, the options,
    and the contents of Triton and of ptxas.
    """
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    source, options, _ = _source(launch)
    backend_of_target = make_backend(gpu_target(target))
    return get_cache_key(source, backend_of_target, backend_of_target.parse_options(options), env_vars={})


def compiled(launch: Launch, target: str):
    """The compiled kernel of a launch for ``target``, and its signature."""
    import triton

    if target not in launch.compiled:
        source, options, signature = _source(launch)
        launch.compiled[target] = triton.compile(source, target=gpu_target(target), options=options), signature
    return launch.compiled[target]


def machine_code(kernel, target: str, folder: Path) -> Kernel:
    """The only kernel of what was compiled for an NVIDIA target. Its cubin is written to ``folder``."""
    cubin = folder / f"{kernel.metadata.name}.{target}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (found,) = disassemble(cubin, target)
    return found
