"""A linear layer on Hopper and later: persistent programs that loop over tiles of the result, operands by TMA.

Rows and columns past the end are read as zeros and not stored. Descriptors are created on the host, and a captured
launch keeps them among its arguments. Triton's automatic warp specialisation does not work with them on Hopper: it
splits the blocks of rows between two groups of warps, but not the descriptor (3.6.0 compiles a kernel that waits for a
wrong number of bytes, later versions refuse).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dvit_kernels.launch import wait_for_inputs
from dvit_kernels.linear_epilogue import columns, finish, load_residual, load_stats

MULTIPROCESSORS = 132  # of an H100 SXM or an H200; used ahead of time and in the interpreter
# Values of `LinearTile.tma`. One program per multiprocessor, which prefetches its next tile while it finishes one; two
# programs per multiprocessor, which fill each other's gaps.
PREFETCHING, PAIRED = 1, 2


@triton.jit(do_not_specialize=["rows", "residual_tokens"])
def _linear_tma_kernel(
    x,  # (rows, K): descriptor of blocks of (BLOCK_M, BLOCK_K)
    w,  # (N, K): descriptor of blocks of (BLOCK_N, BLOCK_K)
    bias_ptr,  # from here as in _linear_kernel
    w_sum_ptr,
    stats_ptr,  # never None with w_sum_ptr
    residual_ptr,
    y_ptr,
    y_stats_ptr,
    stride_rb,
    stride_rn,
    rows,
    residual_tokens,
    eps,
    DIM_IN: tl.constexpr,  # a multiple of BLOCK_K
    DIM_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,  # one loop over tiles and their inner blocks
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    # Starting from the residual saves registers; in a flattened loop it would need a second accumulator.
    residual_first: tl.constexpr = (
        residual_ptr is not None and w_sum_ptr is None and ACTIVATION == "none" and not FLATTEN
    )
    blocks_n: tl.constexpr = (DIM_OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(rows, BLOCK_M) * blocks_n
    # Adjacent programs share a tile of rows: x is read from memory once, and all of w stays in the L2 cache.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first, block_n = tile // blocks_n * BLOCK_M, tile % blocks_n
        row = first + tl.arange(0, BLOCK_M)
        if residual_first:
            col, there = columns(block_n, DIM_OUT, BLOCK_N)
            mask = (row < rows)[:, None] & there[None, :]
            acc = load_residual(residual_ptr, row, col, mask, residual_tokens, stride_rb, stride_rn, DIM_OUT)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, DIM_IN, BLOCK_K):
            acc = tl.dot(x.load([first, k]), w.load([block_n * BLOCK_N, k]).T, acc)
        mean, squares = None, None
        if w_sum_ptr is not None:
            mean, squares = load_stats(stats_ptr, row, row < rows, PARTS, DIM_IN // PARTS)
        finish(
            acc,
            mean,
            squares,
            None,
            None,
            None,
            row,
            block_n,
            bias_ptr,
            w_sum_ptr,
            None if residual_first else residual_ptr,
            y_ptr,
            y_stats_ptr,
            stride_rb,
            stride_rn,
            rows,
            residual_tokens,
            eps,
            DIM_IN,
            DIM_OUT,
            ACTIVATION,
            BLOCK_N,
            None,
        )


def can_describe(x: torch.Tensor, weight: torch.Tensor, row_stride: int, block_k: int) -> bool:
    """Return whether TMA can read blocks of (., block_k) of x, with rows `row_stride` apart, and of the weight."""
    if x.dtype == torch.float32 or x.numel() == 0 or weight.shape[1] % block_k or row_stride < weight.shape[1]:
        return False
    sizes = row_stride, weight.shape[1]
    return all(n * x.itemsize % 16 == 0 for n in sizes) and not (x.data_ptr() % 16 or weight.data_ptr() % 16)


def operands(
    x: torch.Tensor, weight: torch.Tensor, rows: int, row_stride: int, blocks: tuple[int, int, int], tma: int
) -> dict[str, Any]:
    """Return the kernel's first two arguments and its settings; `weight` must be contiguous."""
    (dim_out, dim_in), (block_m, block_n, block_k) = weight.shape, blocks
    return {
        "x": TensorDescriptor(x, [rows, dim_in], [row_stride, 1], [block_m, block_k]),
        "w": TensorDescriptor(weight, [dim_out, dim_in], [dim_in, 1], [block_n, block_k]),
        "FLATTEN": tma == PREFETCHING,
    }


def programs(device: torch.device, tma: int) -> int:
    """Return how many programs the device runs at a time."""
    here = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if here else MULTIPROCESSORS
    return count * (2 if tma == PAIRED else 1)
