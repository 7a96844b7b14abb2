"""The contenders of bench_matmul: for each operation, the calls to time and what each reads, writes and computes."""

import functools
import importlib.util
import inspect
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field

import llama_cpp_product
import torch
import torch.nn.functional as F
from machine import place_of
from timing import Rotating, cuda_of

import lowbit
import lowbit.backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Error of the approximate product that fails the run, relative to the norm (its docstring says about 1%).
APPROXIMATE_LIMIT = 0.03
BITSANDBYTES, BITSANDBYTES_EVAL = "bitsandbytes", "bitsandbytes eval"


@dataclass
class Case:
    """One group of contenders that do the same work."""

    operation: str
    dtype: str
    n: int
    k: int
    m: int = 0
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)  # read and written by one call
    missing: dict[str, str] = field(default_factory=dict)  # contender: why it is not there
    error: dict[str, float] = field(default_factory=dict)  # of lowbit, against the fp32 reference
    limit: dict[str, float] = field(default_factory=dict)  # an error above it fails the run
    once: set[str] = field(default_factory=set)  # contenders too slow to time more than once
    calls_per_sample: int = 1
    by_host: bool = False  # timed by the host's clock on a GPU too

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def add(self, name: str, call: Callable[[], object], bytes: float) -> None:
        self.calls[name], self.bytes[name] = call, bytes


#: Contenders that use memory as fast as it goes. They take turns with the others, because the bandwidth that a shared
#: machine leaves changes while it is measured.
READ, COPY = "memory read", "memory copy"
_LARGE_NUMEL = 2**26  # 256 MiB


@functools.cache
def _large(device: str, quick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.ones(2**16 if quick else _LARGE_NUMEL, device=device)
    return source, torch.empty_like(source)


def add_memory(case: Case, o: "Operands", way: str) -> None:
    source, target = _large(o.place, o.cache_bytes < 2**20)
    if way == READ:
        case.add(READ, lambda: source.sum(), source.nbytes)
    else:
        case.add(COPY, lambda: target.copy_(source), 2 * source.nbytes)


class Operands:
    """The weights of one shape and dtype, in enough copies to exceed twice the cache."""

    def __init__(self, n, k, dtype, device, format, block_size, cache_bytes, memory_bytes):
        self.n, self.k, self.dtype_name, self.dtype, self.device = n, k, dtype, DTYPES[dtype], device
        self.place = place_of(device)
        self.format, self.block_size = format, block_size
        self.cache_bytes, self.memory_bytes = cache_bytes, memory_bytes
        generator = torch.Generator(self.place).manual_seed(0)
        self.weight = (torch.randn(n, k, generator=generator, device=self.place) * 0.02).to(self.dtype)
        self.q = self.quantize()
        self.decoded = lowbit.dequantize(self.q, torch.float32)
        self.bounded = False

    def copies(self, nbytes: int) -> int:
        """How many copies of ``nbytes`` exceed twice the last-level cache, as far as memory allows."""
        wanted = 2 * self.cache_bytes // nbytes + 2
        allowed = max(1, self.memory_bytes // nbytes)
        self.bounded |= wanted > allowed
        return min(wanted, allowed)

    def clones(self, tensor: torch.Tensor, rotate: bool) -> list[torch.Tensor]:
        return [tensor] + [tensor.clone() for _ in range(self.copies(tensor.nbytes) - 1 if rotate else 0)]

    def quantized(self, rotate: bool) -> list[lowbit.QuantizedTensor]:
        # Quantized again, not cloned: the system's pages under a clone may be smaller, and slower to look up.
        copies = self.copies(self.q.nbytes) if rotate else 1
        return [self.q, *(self.quantize() for _ in range(copies - 1))]

    def quantize(self) -> lowbit.QuantizedTensor:
        return lowbit.quantize(self.weight, format=self.format, block_size=self.block_size)

    def rows(self, m: int, width: int) -> torch.Tensor:
        generator = torch.Generator(self.place).manual_seed(1)
        return torch.randn(m, width, generator=generator, device=self.place).to(self.dtype)

    def rotates(self, m: int) -> bool:
        """Whether weights come from memory: on a CPU for one row, on a GPU always, since calls follow each other."""
        return m == 1 or self.on_gpu

    @property
    def on_gpu(self) -> bool:
        """Whether the contenders of a GPU take part."""
        return self.device != "cpu"

    def error(self, actual: torch.Tensor, exact: torch.Tensor) -> float:
        """Largest error relative to the largest value."""
        return float((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))

    def product_limit(self, terms: int, weight_error: float = 0.0) -> float:
        """The limit of `error` for a dot product of ``terms`` in fp32.

        Roundings grow as the root of their number (Higham), times 16 for the largest of many. The output's own rounding
        is added, and that of a bf16 codebook where bf16 activations may use one.
        """
        return 16 * terms**0.5 * 2.0**-24 + torch.finfo(self.dtype).eps + weight_error


def bitsandbytes_or_reason():
    if importlib.util.find_spec("bitsandbytes") is None:
        return None, "bitsandbytes is not installed"
    import bitsandbytes

    return bitsandbytes, ""


@functools.cache
def ggml_with(threads: int) -> llama_cpp_product.Ggml:
    return llama_cpp_product.Ggml(threads)


def torchao_linear(weight: torch.Tensor):
    """torchao's NF4 product as a function of x, or raises."""
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4
    except ImportError:  # before 0.18
        from torchao.dtypes.nf4tensor import linear_nf4, to_nf4

    nf4 = to_nf4(weight, 64, 256)
    return lambda x: linear_nf4(x, nf4)


def linear_case(o: Operands, m: int, with_reference: bool) -> Case:
    case = Case("linear", o.dtype_name, o.n, o.k, m)
    x, rotate = o.rows(m, o.k), o.rotates(m)
    io = x.nbytes + m * o.n * x.element_size()
    case.add("lowbit", Rotating([lambda q=q: lowbit.linear(x, q) for q in o.quantized(rotate)]), o.q.nbytes + io)
    if rotate and not o.on_gpu:  # shows how much of the time is not spent on memory
        case.add("lowbit, weight in cache", lambda: lowbit.linear(x, o.q), o.q.nbytes + io)
    exact = x.double() @ o.decoded.double().T
    case.error["lowbit"] = o.error(lowbit.linear(x, o.q), exact)
    case.limit["lowbit"] = o.product_limit(o.k, 2.0**-9 if m <= 4 and o.dtype == torch.bfloat16 else 0.0)
    if with_reference and not o.on_gpu:

        def reference():
            with lowbit.use_backend("reference"):
                return lowbit.linear(x, o.q)

        case.add("lowbit reference", reference, o.q.nbytes + io)
        case.once.add("lowbit reference")
    if o.on_gpu:
        add_gpu_paths(case, o, x, io)
    for name, dtype in (("dense fp32", torch.float32), ("dense bf16", torch.bfloat16), ("dense fp16", torch.float16)):
        if dtype == o.dtype or (not o.on_gpu and dtype in (torch.float32, torch.bfloat16)):
            xd, weights = x.to(dtype), o.clones(o.weight.to(dtype), rotate)
            calls = [lambda w=w, xd=xd: F.linear(xd, w) for w in weights]
            case.add(name, Rotating(calls), weights[0].nbytes + (m * (o.n + o.k)) * xd.element_size())
    add_bitsandbytes(case, o, lambda bnb, p, s: bnb.matmul_4bit(x, p.t(), s), io, rotate)
    add_bitsandbytes_eval(case, o, x, io, rotate)
    try:
        product = torchao_linear(o.weight)
        product(x)
        case.add("torchao", lambda: product(x), o.q.nbytes + io)
    except Exception as error:
        case.missing["torchao"] = f"{type(error).__name__}: {error}"
    if rotate:
        add_memory(case, o, READ)
    return case


def add_gpu_paths(case: Case, o: Operands, x: torch.Tensor, io: float) -> None:
    """Each of lowbit's ways to a product by name, and torch's product with 4-bit weights of a group each."""
    for backend in ("native", "triton"):
        if (reason := lowbit.backends.available().get(backend)) is not None and o.device != "stub":
            case.missing[f"lowbit {backend}"] = reason
            continue

        def call(q, backend="native" if o.device == "stub" else backend):
            with lowbit.use_backend(backend):
                return lowbit.linear(x, q)

        weights = o.quantized(True)
        case.add(f"lowbit {backend}", Rotating([lambda q=q, call=call: call(q) for q in weights]), o.q.nbytes + io)
    dense = torch.empty(o.n, o.k, dtype=o.dtype, device=o.place)

    def decode_first(q):
        return F.linear(x, lowbit.dequantize(q, o.dtype, out=dense))

    calls = [lambda q=q: decode_first(q) for q in o.quantized(True)]
    case.add("lowbit dequantize, then torch", Rotating(calls), o.q.nbytes + 2 * dense.nbytes + io)
    if o.dtype != torch.bfloat16 or o.device == "stub":
        case.missing["torch int4"] = "it takes bf16 on a GPU"
        return
    codes = torch.randint(0, 256, (o.n, o.k // 2), dtype=torch.uint8, device=o.place)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.ones(o.k // o.block_size, o.n, 2, dtype=o.dtype, device=o.place)
    calls = [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, o.block_size, scales) for w in o.clones(packed, True)]
    case.add("torch int4", Rotating(calls), o.q.nbytes + io)


def add_bitsandbytes(case: Case, o: Operands, call, io: float, rotate: bool = False) -> None:
    bnb, reason = bitsandbytes_or_reason()
    if bnb is None:
        case.missing[BITSANDBYTES] = reason
        return
    packed, state = bnb.functional.quantize_4bit(
        o.weight, quant_type=o.format, blocksize=o.block_size, compress_statistics=True
    )
    packs = o.clones(packed, rotate)
    case.add(BITSANDBYTES, Rotating([lambda p=p: call(bnb, p, state) for p in packs]), o.q.nbytes + io)


def add_bitsandbytes_eval(case: Case, o: Operands, x: torch.Tensor, io: float, rotate: bool) -> None:
    """bitsandbytes as its users run inference: eval mode, in which a layer repacks its weight for AVX512-BF16."""
    bnb, reason = bitsandbytes_or_reason()
    if o.on_gpu:
        return  # what it does there in eval mode is what it does always
    if bnb is not None and not bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu:
        bnb, reason = None, "it repacks weights only on CPUs with AVX512-BF16"
    if bnb is None:
        case.missing[BITSANDBYTES_EVAL] = reason
        return

    def layer():
        layer = bnb.nn.Linear4bit(o.k, o.n, bias=False, compute_dtype=o.dtype, quant_type=o.format)
        layer.weight = bnb.nn.Params4bit(
            o.weight, requires_grad=False, blocksize=o.block_size, quant_type=o.format, compress_statistics=True
        )
        return layer.to(o.place).eval()

    def call(layer):
        with torch.inference_mode():
            return layer(x)

    copies = o.copies(o.q.nbytes) if rotate else 1
    layers = [layer() for _ in range(copies)]
    for each in layers:
        call(each)  # repacks
    case.add(BITSANDBYTES_EVAL, Rotating([lambda each=each: call(each) for each in layers]), o.q.nbytes + io)


def add_llama_cpp(case: Case, o: Operands, x: torch.Tensor, io: float, rotate: bool) -> None:
    """llama.cpp's products, whose activations are in 8 bits as in lowbit's int8 mode."""
    try:
        ggml = ggml_with(torch.get_num_threads())
    except (ImportError, OSError) as error:
        for kind in llama_cpp_product.TYPES:
            case.missing[f"llama.cpp {kind}"] = str(error)
        return
    for kind in llama_cpp_product.TYPES:
        if o.k % 256:
            case.missing[f"llama.cpp {kind}"] = "its rows are multiples of 256"
            continue
        copies = o.copies(o.q.nbytes) if rotate else 1
        products = [llama_cpp_product.Product(ggml, kind, o.weight, x) for _ in range(copies)]
        case.add(f"llama.cpp {kind}", Rotating(products), products[0].nbytes + io)


def backward_case(o: Operands, m: int) -> Case:
    case = Case("backward dX", o.dtype_name, o.n, o.k, m)
    grad, op = o.rows(m, o.n), torch.ops.lowbit.linear_grad_input.default
    io = grad.nbytes + m * o.k * grad.element_size()
    rotate = o.rotates(m)
    calls = [lambda q=q: op(grad, *q.operands(), o.k) for q in o.quantized(rotate)]
    case.add("lowbit", Rotating(calls), o.q.nbytes + io)
    case.error["lowbit"] = o.error(calls[0](), grad.double() @ o.decoded.double())
    case.limit["lowbit"] = o.product_limit(o.n)
    name = {"float32": "dense fp32", "bfloat16": "dense bf16", "float16": "dense fp16"}[o.dtype_name]
    weights = o.clones(o.weight, rotate)
    case.add(name, Rotating([lambda w=w: grad @ w for w in weights]), o.weight.nbytes + io)
    if rotate:
        add_memory(case, o, READ)
    return case


def int8_case(o: Operands, m: int) -> Case:
    case = Case("linear, precision int8", o.dtype_name, o.n, o.k, m)
    x, rotate = o.rows(m, o.k), o.rotates(m)
    io = x.nbytes + m * o.n * x.element_size()

    calls = [lambda q=q: lowbit.linear(x, q, precision="int8") for q in o.quantized(rotate)]
    case.add("lowbit int8", Rotating(calls), o.q.nbytes + io)
    exact = x.double() @ o.decoded.double().T
    case.error["lowbit int8"] = float((calls[0]().double() - exact).norm() / exact.norm())
    case.limit["lowbit int8"] = APPROXIMATE_LIMIT
    weights = o.clones(o.weight.bfloat16(), rotate)
    xb = x.bfloat16()
    case.add("dense bf16", Rotating([lambda w=w: F.linear(xb, w) for w in weights]), weights[0].nbytes + io)
    add_llama_cpp(case, o, x, io, rotate)
    if rotate:
        add_memory(case, o, READ)
    return case


def quantized_unchecked(o: Operands, options: dict) -> lowbit.QuantizedTensor:
    """lowbit.quantize; on a GPU without its look for NaN, for which the host waits and no graph can be captured."""
    if not o.on_gpu:
        return lowbit.quantize(o.weight, **options)
    module = importlib.import_module("lowbit.quantizers.quantize")
    with unittest.mock.patch.object(module, "_check_finite", lambda summary, weight: None):
        return lowbit.quantize(o.weight, **options)


def quantize_case(o: Operands, scale: str) -> Case:
    case = Case("quantize" if scale == "absmax" else "quantize, search", o.dtype_name, o.n, o.k)
    options = {"format": o.format, "block_size": o.block_size, "scale": scale}
    case.add("lowbit", lambda: quantized_unchecked(o, options), o.weight.nbytes + o.q.nbytes)
    decoded = lowbit.quantize(o.weight, **options).dequantize(torch.float32).double()
    weight = o.weight.double()
    # Half the widest gap of a codebook is 0.167 of the block's scale; absmax times that bounds every element.
    case.error["lowbit"] = float((decoded - weight).abs().max() / weight.abs().max())
    case.limit["lowbit"] = 0.19
    add_bitsandbytes_quantize(case, o)
    add_memory(case, o, READ)
    return case


def add_bitsandbytes_quantize(case: Case, o: Operands) -> None:
    bnb, reason = bitsandbytes_or_reason()
    if bnb is None:
        case.missing[BITSANDBYTES] = reason
        return
    call = bnb.functional.quantize_4bit
    case.add(
        BITSANDBYTES,
        lambda: call(o.weight, quant_type=o.format, blocksize=o.block_size, compress_statistics=True),
        o.weight.nbytes + o.q.nbytes,
    )


def dequantize_case(o: Operands) -> Case:
    case = Case("dequantize into out", o.dtype_name, o.n, o.k)
    out = torch.empty(o.n, o.k, dtype=o.dtype, device=o.place)
    case.add("lowbit", lambda: lowbit.dequantize(o.q, o.dtype, out=out), o.q.nbytes + out.nbytes)
    with lowbit.use_backend("reference"):
        expected = lowbit.dequantize(o.q, o.dtype)
    case.error["lowbit"] = o.error(lowbit.dequantize(o.q, o.dtype), expected.double())
    case.limit["lowbit"] = 0.0
    add_bitsandbytes(case, o, lambda bnb, p, s: bnb.functional.dequantize_4bit(p, s), out.nbytes)  # its CPU has no out
    add_memory(case, o, COPY)
    return case


def overhead_case(recording: bool, dtype: str, device: str) -> Case:
    """One whole call of a 64 x 64 layer, as the host sees it. A sample is 200 calls."""
    from lowbit_lora import QLoRALinear

    case = Case("QLoRALinear call, " + ("recording gradients" if recording else "no_grad"), dtype, 64, 64, 1)
    case.calls_per_sample, case.by_host = 200, True
    place = place_of(device)
    layer, x = QLoRALinear(64, 64, dtype=DTYPES[dtype]).to(place), torch.randn(1, 64).to(place, DTYPES[dtype])

    def run():
        with torch.set_grad_enabled(recording):
            for _ in range(case.calls_per_sample):
                layer(x)
        if device != "cpu":
            cuda_of(device).synchronize()

    case.add("lowbit", run, 0.0)
    return case


def has_search() -> bool:
    """Whether this version's quantize implements scale="search"."""
    try:
        lowbit.quantize(torch.ones(1, 64), scale="search")
    except NotImplementedError:
        return False
    return True


def has_int8() -> bool:
    """Whether this version's linear has the approximate mode."""
    return "precision" in inspect.signature(lowbit.linear).parameters
