"""Images to tokens in one launch: cut into patches, multiply, add the position embedding, prepend prefix tokens.

Patches are never copied: the product reads them directly from the images, with any strides.
"""

import torch
import triton
import triton.language as tl

from dvit_kernels.launch import Launch, run, wait_for_inputs
from dvit_kernels.linear import ENOUGH_PROGRAMS, LinearTile


@triton.jit
def _as_operand(x, dtype: tl.constexpr):
    """Convert pixels for the product: cast floats; bytes minus 128, which float16 and bfloat16 represent exactly."""
    if x.dtype == tl.uint8:
        # As the low bits of the float 2^23: byte conversions run at an eighth of the rate of additions.
        x = (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    return x.to(dtype)


# Largest first; none spills registers (AOT.md); none has been timed. Converted images enter Hopper's product from
# registers, which Triton's pipeline overwrites while a product still reads them (triton-lang/triton issue 9433): such
# tiles have one stage, and two or more programs per multiprocessor fill each other's waits. The smallest tile is too
# small for Hopper's asynchronous product.
_SMALL = LinearTile(32, 32, 128, 4, 3)
TILES = (LinearTile(128, 128, 64, 8, 3), LinearTile(128, 64, 64, 8, 3), LinearTile(64, 64, 64, 8, 3), _SMALL)
BYTE_TILES = (LinearTile(128, 128, 64, 8, 1), LinearTile(128, 64, 64, 8, 1), LinearTile(64, 64, 64, 8, 1), _SMALL)
FLOAT32_IMAGE_TILES = (
    LinearTile(128, 128, 32, 8, 1, maxnreg=128),
    LinearTile(128, 64, 64, 8, 1),
    LinearTile(64, 64, 64, 8, 1),
    _SMALL,
)
FLOAT32_TILE = LinearTile(64, 64, 16, 8, 3)  # without tensor cores, operands in registers


@triton.jit
def _add_table(acc, table, out, col, live, DIM_OUT: tl.constexpr):
    """Add the rows at `table` to `acc` and store the sum at `out`."""
    inside = live[:, None] & (col < DIM_OUT)[None, :]
    acc += tl.load(table[:, None] + col[None, :], mask=inside, other=0.0)
    tl.store(out[:, None] + col[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "n_patches", "patches_x", "num_prefix"])
def _patch_embedding_kernel(
    images_ptr,  # B images
    w_ptr,  # (C, K)
    table_ptr,  # (P+N, C) float32
    out_ptr,  # out (B, P+N, C)
    stride_ib,
    stride_iy,
    stride_ix,
    stride_k0,
    stride_k1,
    stride_k2,
    rows,  # B*N
    n_patches,  # N
    patches_x,
    num_prefix,
    PATCH: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    DIM_IN: tl.constexpr,
    DIM_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Embed a tile of patches. An index in a patch has three digits, the last two below SIZE_1, SIZE_2."""
    wait_for_inputs(PDL)
    blocks_n: tl.constexpr = (DIM_OUT + BLOCK_N - 1) // BLOCK_N
    # Rows are the patches of all images in order: only the last tile of the batch has padding. Blocks of one
    # tile of rows are adjacent: the images are read from memory once, and all of w stays in the L2 cache.
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < rows
    image, patch = (row // n_patches).to(tl.int64), row % n_patches
    y, x = (patch // patches_x).to(tl.int64), (patch % patches_x).to(tl.int64)
    # Offsets within a patch, below, fit in 32 bits: the launcher ensures it.
    corner = image * stride_ib + y * PATCH * stride_iy + x * PATCH * stride_ix

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DIM_IN, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        digit_0, digit_1, digit_2 = inner // (SIZE_1 * SIZE_2), inner // SIZE_2 % SIZE_1, inner % SIZE_2
        at = digit_0 * stride_k0 + digit_1 * stride_k1 + digit_2 * stride_k2
        x_mask, w_mask = live[:, None], (col < DIM_OUT)[None, :]
        if DIM_IN % BLOCK_K:
            x_mask, w_mask = x_mask & (inner < DIM_IN)[None, :], w_mask & (inner < DIM_IN)[:, None]
        pixels = tl.load(images_ptr + corner[:, None] + at[None, :], mask=x_mask, other=0)
        w = tl.load(w_ptr + col[None, :] * DIM_IN + inner[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(_as_operand(pixels, w_ptr.dtype.element_ty), w, acc, input_precision="ieee")

    out = out_ptr + (image * (num_prefix + n_patches)) * DIM_OUT + (num_prefix + patch) * DIM_OUT
    table = table_ptr + (num_prefix + patch) * DIM_OUT
    # In two halves: all table values at once, beside the sums, would leave registers for only one program.
    half: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1)))
    left_col = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, half)
    _add_table(left, table, out, left_col, live, DIM_OUT)
    _add_table(right, table, out, left_col + half, live, DIM_OUT)

    # An image's prefix rows are written by the tile that holds its first patch.
    first = tl.program_id(0) // blocks_n * BLOCK_M
    begun = tl.cdiv(first, n_patches)
    while begun * n_patches < tl.minimum(first + BLOCK_M, rows):
        start = out_ptr + begun.to(tl.int64) * (num_prefix + n_patches) * DIM_OUT
        token = 0
        while token < num_prefix:
            at = token * DIM_OUT + col
            prefix = tl.load(table_ptr + at, mask=col < DIM_OUT, other=0.0)
            tl.store(start + at, prefix.to(out_ptr.dtype.element_ty), mask=col < DIM_OUT)
            token += 1
        begun += 1


def supports(channels: int, height: int, width: int) -> bool:
    """Return whether the kernel supports images of that size: below 2^31 elements each."""
    return channels * height * width < 2**31


def _tile(rows: int, c: int, given: torch.dtype, dtype: torch.dtype) -> LinearTile:
    """Return the largest tile with enough programs for the GPU."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    converted = FLOAT32_IMAGE_TILES if given == torch.float32 else BYTE_TILES
    tiles: tuple[LinearTile, ...] = TILES if given == dtype else converted
    tiles = tiles if c >= 256 else tiles[1:]  # for narrow models half of the widest tile would be padding
    enough = (t for t in tiles if triton.cdiv(rows, t.block_m) * triton.cdiv(c, t.block_n) >= ENOUGH_PROGRAMS)
    return next(enough, tiles[-1])


def launch_patch_embedding(
    images: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    patch_size: int,
    channels_last: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `dvit::patch_embedding` as one Triton launch on the images' device and its current stream.

    Args:
        images: (B, channels, H, W) in uint8, float32, float16 or bfloat16, any strides.
        weight, table: the result of `pack_patch_embedding`, on the images' device.
        patch_size: p, which divides H and W.
        channels_last: as for packing the weight; meant for images whose channel stride is 1.
        out: a contiguous tensor for the result; None: a new one.

    Returns:
        (B, P+N, C) in the weight's dtype, as `dvit::patch_embedding`.

    Raises:
        ValueError: a size is not supported.
    """
    b, channels, height, width = images.shape
    p = patch_size
    if p < 1 or height < p or width < p or height % p or width % p:
        raise ValueError(f"launch_patch_embedding: patch_size {p} does not divide images of {height} x {width}")
    if not supports(channels, height, width):
        raise ValueError(f"launch_patch_embedding: images have {channels} x {height} x {width} elements, 2^31 or more")
    k = channels * p * p
    if weight.ndim != 2 or weight.shape[1] != k:
        raise ValueError(f"launch_patch_embedding: weight has shape {tuple(weight.shape)}, (C, {k}) fits")
    patches_x = width // p
    n = height // p * patches_x
    if table.ndim != 2 or table.shape[0] < n or table.shape[1] != weight.shape[0]:
        fits = f"at least {n} rows of {weight.shape[0]} fit"
        raise ValueError(f"launch_patch_embedding: table has shape {tuple(table.shape)}, {fits}")
    c, tokens = weight.shape[0], table.shape[0]
    out = weight.new_empty(b, tokens, c) if out is None else out

    if sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True)) >= 2**31:
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    stride_b, stride_c, stride_y, stride_x = images.stride()
    if not channels_last:
        sizes, strides = (p, p), (stride_c, stride_y, stride_x)
    elif stride_x == channels * stride_c:  # a row of a patch is contiguous
        sizes, strides = (p, p * channels), (0, stride_y, stride_c)
    else:
        sizes, strides = (p, channels), (stride_y, stride_x, stride_c)

    tile = _tile(b * n, c, images.dtype, weight.dtype)
    launch = Launch.of(
        _patch_embedding_kernel,
        (triton.cdiv(b * n, tile.block_m) * triton.cdiv(c, tile.block_n),),
        images_ptr=images,
        w_ptr=weight.contiguous(),
        table_ptr=table.contiguous(),
        out_ptr=out,
        stride_ib=stride_b,
        stride_iy=stride_y,
        stride_ix=stride_x,
        stride_k0=strides[0],
        stride_k1=strides[1],
        stride_k2=strides[2],
        rows=b * n,
        n_patches=n,
        patches_x=patches_x,
        num_prefix=tokens - n,
        PATCH=p,
        SIZE_1=sizes[0],
        SIZE_2=sizes[1],
        DIM_IN=k,
        DIM_OUT=c,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )
    run([launch], images.device)
    return out
