"""A Triton product, for the emulator's tests: c[M, N] = a[M, K] @ b[K, N]."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, m_size, n_size, k_size, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)[:, None]
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)[None, :]
    accumulator = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, k_size, TILE_K):
        k = start + tl.arange(0, TILE_K)
        a = tl.load(a_ptr + m * k_size + k[None, :], mask=(m < m_size) & (k[None, :] < k_size), other=0.0)
        b = tl.load(b_ptr + k[:, None] * n_size + n, mask=(k[:, None] < k_size) & (n < n_size), other=0.0)
        accumulator = tl.dot(a, b, accumulator)
    tl.store(c_ptr + m * n_size + n, accumulator, mask=(m < m_size) & (n < n_size))


def compile_ptx(capability, tile_m, tile_n, tile_k, warps, stages):
    """-> (PTX, metadata) for bf16 operands; no GPU needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
    sizes = dict.fromkeys(("m_size", "n_size", "k_size"), "i32")
    tiles = {"TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k}
    source = ASTSource(
        fn=matmul,
        signature={**pointers, **sizes, **dict.fromkeys(tiles, "constexpr")},
        constexprs=tiles,
        attrs={(position,): [["tt.divisibility", 16]] for position in (0, 1, 2, 4, 5)},
    )
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel.asm["ptx"], kernel.metadata
