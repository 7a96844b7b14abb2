"""One product of llama.cpp, through the ggml library that llama-cpp-python brings.

ggml is called through ctypes: the package's own bindings have no single products. The weights are Q4_0 (blocks of 32,
an fp16 scale) or Q4_K (super-blocks of 256). ggml rounds the rows of x to 8 bits, so that its products compare with
lowbit's int8 mode.
"""

import ctypes
import importlib.util
from pathlib import Path

import torch

#: ggml's numbers of its types.
TYPES = {"Q4_0": 2, "Q4_K": 12}
_F32 = 0
_MOST_THREADS = 512  # GGML_MAX_N_THREADS


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", ctypes.c_bool * _MOST_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]


class Ggml:
    """The library, and a pool of ``threads`` threads. Raises ImportError where llama-cpp-python is not installed."""

    def __init__(self, threads: int):
        found = importlib.util.find_spec("llama_cpp")
        if found is None:
            raise ImportError("llama-cpp-python is not installed")
        folder = Path(found.origin).parent / "lib"
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, size, whole = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64

        def function(library, name, result, *arguments):
            found = getattr(library, name)
            found.restype, found.argtypes = result, arguments
            return found

        self.init = function(base, "ggml_init", pointer, _InitParams)
        self.new_tensor_2d = function(base, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, whole, whole)
        self.mul_mat = function(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.new_graph = function(base, "ggml_new_graph", pointer, pointer)
        self.build_forward = function(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.get_data = function(base, "ggml_get_data", pointer, pointer)
        self.quantize = function(
            base, "ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, whole, whole, whole, pointer
        )
        self.row_size = function(base, "ggml_row_size", size, ctypes.c_int, whole)
        self.plan = function(cpu, "ggml_graph_plan", _Plan, pointer, ctypes.c_int, pointer)
        self.compute = function(cpu, "ggml_graph_compute", ctypes.c_int, pointer, ctypes.POINTER(_Plan))
        function(cpu, "ggml_cpu_init", None)()
        params = function(base, "ggml_threadpool_params_default", _ThreadpoolParams, ctypes.c_int)(threads)
        new_pool = function(cpu, "ggml_threadpool_new", pointer, ctypes.POINTER(_ThreadpoolParams))
        self.threads, self.threadpool = threads, new_pool(ctypes.byref(params))


class Product:
    """x W^T with W [n, k] quantized to a type of ggml. The result of a call is y [m, n] in fp32."""

    def __init__(self, ggml: Ggml, kind: str, weight: torch.Tensor, x: torch.Tensor):
        (n, k), m = weight.shape, len(x)
        weight, x = weight.float().contiguous(), x.float().contiguous()
        self.nbytes = n * ggml.row_size(TYPES[kind], k)
        context = ggml.init(_InitParams(self.nbytes + 4 * m * (n + k) + 2**20, None, False))
        matrix = ggml.new_tensor_2d(context, TYPES[kind], k, n)
        rows = ggml.new_tensor_2d(context, _F32, k, m)
        product = ggml.mul_mat(context, matrix, rows)
        ggml.quantize(TYPES[kind], weight.data_ptr(), ggml.get_data(matrix), 0, n, k, None)
        ctypes.memmove(ggml.get_data(rows), x.data_ptr(), x.nbytes)
        self._ggml, self._graph = ggml, ggml.new_graph(context)
        ggml.build_forward(self._graph, product)
        self._plan = ggml.plan(self._graph, ggml.threads, ggml.threadpool)
        self._work = torch.empty(max(self._plan.work_size, 1), dtype=torch.uint8)
        self._plan.work_data = self._work.data_ptr()
        y = (ctypes.c_float * (m * n)).from_address(ggml.get_data(product))
        self._y = torch.frombuffer(y, dtype=torch.float32).view(m, n)

    def __call__(self) -> torch.Tensor:
        self._ggml.compute(self._graph, ctypes.byref(self._plan))
        return self._y
