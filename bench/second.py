"""Measure kernel changes that wait for a GPU, each beside the current version, in one interleaved run.

    PYTHONPATH=.:kernels python bench/second.py --out second.json [--dry]

They are: at most 128 registers per thread where 130 to 175 allow only one program per multiprocessor; the tile of the
first launch of prune_tokens; forms of GELU after fc1, and LV-ViT's stem with bias and ReLU in cuDNN (both in
bench/layers.py).
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from dvit_kernels.launch import Launch, collecting
from dvit_kernels.linear import LinearTile, launch_linear
from dvit_kernels.linear_tma import PAIRED
from dvit_kernels.patch_embedding import launch_patch_embedding
from dvit_kernels.prune_tokens import launch_prune_tokens
from launches import microseconds
from layers import DRY as DRY_LAYERS
from layers import Sizes as LayerSizes
from layers import activations, measured, stem
from rows import Part, Row, Rows, arguments, device_for
from triton import cdiv

REGISTERS = 128
STAGES = ((196, 137), (137, 96), (96, 67))
DRY_STAGES = ((4, 2),)
SECONDS = 0.5


class Sizes:
    """Batch, channels of DeiT-S and -B, pixels and stages; in a dry run small enough for the interpreter."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.batch, self.pixels = (1, 32) if dry else (256, 224)
        self.channels = {"S": 64, "B": 64} if dry else {"S": 384, "B": 768}
        self.stages = DRY_STAGES if dry else STAGES


def with_registers(launch: Launch, most: int | None) -> Callable[[], None]:
    """Return the launch with another register limit, or none."""
    options = {**launch.options, "maxnreg": most}  # None: the compiler's choice
    return lambda: launch.kernel[launch.grid](**launch.arguments, **options)


def compared(
    op: str, candidates: dict[str, tuple[Launch, int | None]], output: str, device: torch.device, sizes: Sizes
) -> Iterator[Row]:
    """Yield rows for launches that write equal values to the argument `output`; the first is the baseline."""
    calls = {name: [with_registers(launch, most)] for name, (launch, most) in candidates.items()}
    times, failed = microseconds(calls, device, 0.0 if sizes.dry else SECONDS, 60)
    baseline = next(iter(candidates))
    expected: torch.Tensor | None = None
    for name, us in times.items():
        filled = candidates[name][0].arguments[output]
        filled.zero_()
        calls[name][0]()
        found = filled.float().clone()
        expected = found if expected is None else expected
        row = {"op": op, "runtime": "triton", "variant": name, "us": us, "baseline": baseline}
        yield row | {"speedup": times.get(baseline, us) / us, "max_error": (found - expected).abs().max().item()}
    for name, why in failed.items():
        yield {"op": op, "runtime": "triton", "variant": name, "failed": why}


def linears(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Linears with a residual by TMA, with two programs per multiprocessor; 132 registers allow only one."""
    rows = sizes.batch * (1 + (sizes.pixels // 16) ** 2)
    tile = LinearTile(16, 32, 16, 4, 2, 0) if sizes.dry else LinearTile(128, 128, 64, 8, 3, PAIRED)
    for (name, c), (layer, wide) in itertools.product(sizes.channels.items(), (("proj", 1), ("fc2", 4))):
        x, residual = (torch.randn(rows, size, device=device).to(sizes.dtype) for size in (wide * c, c))
        weight = (torch.randn(c, wide * c, device=device) * (wide * c) ** -0.5).to(sizes.dtype)
        with collecting() as launches:
            launch_linear(x, weight, weight[:, 0].clone(), residual, stats_block=tile.block_n, tile=tile)
        yield from by_registers(
            f"{layer} of DeiT-{name}, two programs a multiprocessor", launches[0], "y_ptr", device, sizes
        )


def by_registers(op: str, launch: Launch, output: str, device: torch.device, sizes: Sizes) -> Iterator[Row]:
    candidates = {"registers as they come": (launch, None), f"at most {REGISTERS} registers": (launch, REGISTERS)}
    yield from compared(op, candidates, output, device, sizes)


def predictor(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The projection and the scores of prune_tokens, stage by stage: tiles of both, registers of the scores."""
    for (name, c), (n, keep) in itertools.product(sizes.channels.items(), sizes.stages):
        weights = packed(c, device, sizes.dtype)
        for batch in dict.fromkeys((sizes.batch, 1)):
            x = torch.randn(batch, n + 1, c, device=device).to(sizes.dtype)
            with collecting() as launches:
                launch_prune_tokens(x, weights, keep, 1, 1e-5)
            *before, project, score, _ = launches
            for launch in before:
                launch.run()
            where = f"of DeiT-{name}, {n} tokens, batch {batch}"
            if batch > 1:
                tiles = {"128x128, 8 warps": (128, 128, 8), "64x128, 4 warps": (64, 128, 4)}
                candidates = {tile: (with_tile(project, *blocks), None) for tile, blocks in tiles.items()}
                yield from compared(f"projection {where}", candidates, "hidden_ptr", device, sizes)
            project.run()
            if batch > 1 or sizes.dry:
                yield from by_registers(f"score {where}", score, "score_ptr", device, sizes)
            else:
                tiles = {"64 tokens a program": (64, 64, 64), "16 tokens a program": (16, 32, 64)}
                candidates = {tile: (with_blocks(score, *blocks), None) for tile, blocks in tiles.items()}
                yield from compared(f"score {where}", candidates, "score_ptr", device, sizes)


def with_blocks(score: Launch, tokens: int, hidden: int, inner: int) -> Launch:
    """Return the second launch of prune_tokens with blocks of these numbers of tokens, hidden and inner channels."""
    given = score.arguments
    images = score.grid[0] // cdiv(given["n_tokens"], given["BLOCK_M"])
    blocks = {"BLOCK_M": tokens, "BLOCK_H": hidden, "BLOCK_K": min(inner, given["DIM"] // 2)}
    return replace(score, grid=(images * cdiv(given["n_tokens"], tokens),), arguments={**given, **blocks}, maxnreg=0)


def packed(c: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return random predictor weights in the order of `pack_predictor`."""
    half, quarter = c // 2, c // 4
    matrices = {0: (c, c), 3: (half, half), 4: (half, half), 6: (quarter, half)}
    vectors = {1: c, 2: c, 5: half, 7: quarter, 8: quarter, 9: 1}
    found = []
    for i in range(10):
        if i in matrices:
            found.append((torch.randn(matrices[i], device=device) * matrices[i][1] ** -0.5).to(dtype))
        else:
            found.append(torch.randn(vectors[i], device=device) * 0.1)
    found[1] = found[0].float().sum(dim=1)
    return found


def with_tile(project: Launch, block_m: int, block_n: int, warps: int) -> Launch:
    """Return the first launch of prune_tokens with another tile, and its sums."""
    given = project.arguments
    batch, n, c = given["batch"], given["n_tokens"], given["DIM"]
    tiles, segments = cdiv(batch * n, block_m), min(block_m, (block_m - 2) // n + 2)
    sums = given["sums_ptr"].new_empty(tiles, segments, c // 2)
    blocks = {"sums_ptr": sums, "SEGMENTS": segments, "BLOCK_M": block_m, "BLOCK_N": block_n}
    grid = (tiles * cdiv(c, block_n),)
    return replace(project, grid=grid, arguments={**given, **blocks}, num_warps=warps, num_stages=3)


def patch_embedding(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Patch embedding from float32 images, whose 138 registers allow only one program per multiprocessor."""
    c, tokens = sizes.channels["S"], 1 + (sizes.pixels // 16) ** 2
    images = torch.randn(sizes.batch, 3, sizes.pixels, sizes.pixels, device=device)
    weight = (torch.randn(c, 768, device=device) * 0.03).to(sizes.dtype)
    table = torch.randn(tokens, c, device=device)
    with collecting() as launches:
        launch_patch_embedding(images, weight, table, 16)
    yield from by_registers("patch embedding of DeiT-S from float32", launches[0], "out_ptr", device, sizes)


def main() -> int:
    given = arguments(__doc__, 120).parse_args()
    device, sizes = device_for(given.dry), Sizes(given.dry)
    layers = DRY_LAYERS if given.dry else LayerSizes()
    jobs: dict[str, Callable[[], Any]] = {
        "linears": lambda: linears(device, sizes),
        "predictor": lambda: predictor(device, sizes),
        "patch embedding": lambda: patch_embedding(device, sizes),
        "forms of GELU behind fc1": lambda: measured(activations, device, layers),
        "LV-ViT's stem": lambda: measured(stem, device, layers),
    }
    return Part(Rows(given.out, given.add), device, given.budget).run(jobs.items())


if __name__ == "__main__":
    sys.exit(main())
