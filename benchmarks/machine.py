"""What the machine can do, measured in the same run as the contenders. The tables show shares of these values."""

import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import cuda_of, interleaved


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB if the system does not tell."""
    sizes = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)\s*", size.read_text()).groups()
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20}[unit])
    return max(sizes) or 32 * 2**20


def place_of(device: str) -> str:
    """Where tensors are."""
    return "cpu" if device == "stub" else device


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be used without swapping; 4 GiB if the system does not tell. Of a GPU, what is free."""
    if device != "cpu":
        return cuda_of(device).mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else 4 * 2**30


@dataclass
class Machine:
    """Names, and measured limits: read and copy bandwidth in GB/s, fp32 peak in GFLOP/s."""

    device: str
    name: str
    threads: int
    lowbit_isa: str
    torch_capability: str
    torch_version: str
    cache_bytes: int
    read_bandwidth: float
    copy_bandwidth: float
    peak: float

    def as_dict(self) -> dict:
        return asdict(self)


def copy_bandwidth(device: str, numel: int) -> float:
    """GB/s of copying ``numel`` floats (read + written)."""
    source = torch.ones(numel, device=place_of(device))
    target = torch.empty_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, rounds=5, device=device)["copy"]
    return 2 * numel * 4 / min(copy.times) / 1e6


def read_bandwidth(device: str, numel: int) -> float:
    """GB/s of reading ``numel`` floats, the best of several ways."""
    source = torch.ones(numel, device=place_of(device))
    integers = source.view(torch.int32)
    reads = interleaved(
        {
            "sum": lambda: source.sum(),
            "sum of int32": lambda: integers.sum(dtype=torch.int32),
            "amax": lambda: source.amax(),
            "dot": lambda: torch.dot(source, source),
        },
        rounds=5,
        device=device,
    )
    read = min(min(sample.times) for sample in reads.values() if not isinstance(sample, Exception))
    return numel * 4 / read / 1e6


def measure(device: str, quick: bool) -> Machine:
    """Measure the bandwidths on a gigabyte, and the peak of a large fp32 F.linear."""
    numel = 2**22 if quick else 2**28
    read, copy = read_bandwidth(device, numel), copy_bandwidth(device, numel)
    size = 256 if quick else 2048
    x, weight = (torch.randn(size, size, device=place_of(device)) for _ in range(2))
    product = interleaved({"linear": lambda: F.linear(x, weight)}, rounds=7, device=device)["linear"]
    on_cpu = device == "cpu"
    return Machine(
        device=device,
        name=cpu_name() if on_cpu else cuda_of(device).get_device_name(),
        threads=torch.get_num_threads(),
        lowbit_isa=torch.ops.lowbit.cpu_isa() if on_cpu else "",
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        torch_version=torch.__version__,
        cache_bytes=last_level_cache() if on_cpu else cuda_of(device).get_device_properties(0).L2_cache_size,
        read_bandwidth=read,
        copy_bandwidth=copy,
        peak=2 * size**3 / min(product.times) / 1e6,
    )
