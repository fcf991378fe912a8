"""Compile the candidates' kernels in many processes before timing; one by one it would take most of the time."""

import contextlib
import dataclasses
import multiprocessing.pool
from collections.abc import Callable, Sequence

import torch
from candidates import Attention, Linear, Shape, Tile, tiles_of
from dvit_kernels.attention import launch_attention
from dvit_kernels.launch import Launch, collecting
from dvit_kernels.linear import launch_linear


def compile_ahead(pool: multiprocessing.pool.Pool, shapes: Sequence[Shape], dtype: torch.dtype) -> Callable[[], None]:
    """Start compiling the shapes' kernels in separate processes; return a call that waits for them."""
    # Rows are not compiled in: linears that differ only in rows share their kernels.
    jobs = {
        (dataclasses.replace(shape, batch=1, rows=64) if isinstance(shape, Linear) else shape, tile): None
        for shape in shapes
        for tile in tiles_of(shape, dtype, False)
    }
    done = pool.starmap_async(compile_only, [(*job, dtype) for job in jobs], chunksize=1)
    return done.wait


def compile_only(shape: Shape, tile: Tile, dtype: torch.dtype) -> None:
    """Compile a candidate's kernel for this GPU, without launching it, which would disturb timings."""
    with contextlib.suppress(Exception):  # a compile error is reported when the candidate is measured
        launch = launch_of(shape, tile, dtype)
        compile_launch(launch, *torch.cuda.get_device_capability())


def compile_launch(launch: Launch, major: int, minor: int) -> None:
    """Compile a launch for Triton's active driver and this compute capability, or find it in Triton's cache."""
    options = launch.options_for(10 * major + minor)
    launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **options)


def launch_of(shape: Shape, tile: Tile, dtype: torch.dtype) -> Launch:
    """Return the candidate's launch, on meta tensors."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    with collecting() as launches:
        if isinstance(shape, Attention):
            qkv = empty(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
            launch_attention(*qkv.unbind(2), shape.head_dim**-0.5, tile=tile)
        else:
            parts = shape.dim_in // (128 if shape.dim_in % 128 == 0 else 32)
            launch_linear(
                empty(shape.rows, shape.dim_in),
                empty(shape.dim_out, shape.dim_in),
                empty(shape.dim_out),
                empty(shape.rows, shape.dim_out) if shape.residual else None,
                empty(shape.dim_out, dtype=torch.float32) if shape.norm else None,
                empty(shape.rows, parts, 2, dtype=torch.float32) if shape.norm else None,
                1e-6,
                shape.activation,
                stats_block=tile.block_n if shape.residual else 0,
                tile=tile,
            )
    return launches[0]
