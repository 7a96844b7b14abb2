"""What instructions cost: cycles of the data path of L1 and shared memory, and products on tensor cores."""

from dataclasses import dataclass

from .machine_code import count

#: Bytes that a lane moves through the L1/shared data path, by the opcode's last number.
_WIDTHS = {"U8": 4, "S8": 4, "U16": 4, "S16": 4, "64": 8, "128": 16}
_MMA_MACS = {"HMMA.16816": 2048, "HMMA.1688": 1024}


@dataclass(frozen=True)
class Counted:
    """What a kernel costs per weight."""

    operation: str
    library: str
    kernel: str
    rows: int  # of x that one reading of W serves; 0: W is only decoded, or encoded
    instructions: float
    cycles: float  # of the L1/shared data path, for a lane's weight: 32 lanes share each
    macs: float  # of mma.sync
    peak_macs: float = 0.0  # of wgmma and tcgen05, which reach the peak
    columns: int = 0  # of the output in a block's tile; 0: not known
    splits_k: bool = True  # whether as many blocks share k as fill the GPU
    warps: int = 8  # of a block
    resident: int = 8  # blocks that the registers of a multiprocessor hold


def data_path_cycles(body: list[str]) -> float:
    """Cycles of L1 and shared memory for one execution by a warp, without bank conflicts."""
    cycles = 0.0
    for text in body:
        opcode, *suffixes = text.split()[0].split(".")
        if opcode in ("LDSM", "STSM"):
            cycles += 4 if suffixes[-1] == "4" else 2 if suffixes[-1] == "2" else 1
        elif opcode in ("LDS", "STS", "LDG", "STG", "LDGSTS", "SHFL"):
            width = max((_WIDTHS[suffix] for suffix in suffixes if suffix in _WIDTHS), default=4)
            cycles += 32 * width / 128
    return cycles


def mma_macs(body: list[str]) -> int:
    """Multiply-adds by mma.sync in one execution by a warp."""
    return sum(count(body, opcode) * each for opcode, each in _MMA_MACS.items())
