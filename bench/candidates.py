"""What `tune.py` measures: shapes of the models, and the ways to run each, the kernels with many tiles among them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from dvit_kernels.activations import CHEAPEST_GELU
from dvit_kernels.attention import AttentionTile
from dvit_kernels.attention import default_tile as default_attention_tile
from dvit_kernels.linear import TILES, LinearTile, default_stats_block, default_tile, launch_linear
from dvit_kernels.linear_tma import PAIRED, PREFETCHING

from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.linear import does_what, linear, row_sums

PYTORCH = Choices(otherwise="pytorch")
MORE_TILES = (
    LinearTile(128, 256, 64, 8, 3),
    LinearTile(256, 128, 64, 8, 3),
    LinearTile(128, 128, 64, 8, 4),
    LinearTile(128, 128, 32, 8, 4),
    LinearTile(128, 64, 64, 4, 4),
    LinearTile(64, 256, 64, 8, 3),
    LinearTile(16, 64, 128, 4, 4),
    LinearTile(32, 32, 128, 4, 4),
    LinearTile(128, 128, 64, 8, 3, PREFETCHING),
    LinearTile(128, 128, 64, 8, 4, PREFETCHING),
    LinearTile(128, 256, 64, 8, 3, PREFETCHING),
    LinearTile(128, 128, 64, 8, 3, PAIRED),
)
MANY_ROWS = 4096  # from here on programs may stay for several tiles


class Plan(NamedTuple):
    """What to measure, in the order of its value, should the time run out.

    Attributes:
        models: channels, heads and hidden channels.
        tokens: of the stages, with the class token.
        batches: of pictures; but of the first, every other number of tokens.
    """

    models: tuple[tuple[int, int, int], ...]
    tokens: tuple[int, ...]
    batches: tuple[int, ...]


DEIT_S, DEIT_B, LVVIT_S = (384, 6, 1536), (768, 12, 3072), (384, 6, 1152)
MODELS = Plan((DEIT_S, DEIT_B, LVVIT_S), (197, 138, 97, 68), (256, 1, 32))
DRY = Plan(((64, 1, 128),), (5,), (2,))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear of a block."""

    rows: int
    dim_in: int
    dim_out: int
    norm: bool
    activation: str
    residual: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.dim_in * self.dim_out

    @property
    def kind(self) -> dict[str, Any]:
        does = does_what(self.norm, self.residual, self.activation)
        return {"op": "linear", "size": self.rows, "in": self.dim_in, "out": self.dim_out, "does": does}


def linears(rows: int, c: int, hidden: int, dtype: torch.dtype) -> tuple[Linear, ...]:
    """Those of a block."""
    return (
        Linear(rows, c, 3 * c, True, "none", False),
        Linear(rows, c, c, False, "none", True),
        Linear(rows, c, hidden, True, CHEAPEST_GELU[dtype], False),
        Linear(rows, hidden, c, False, "none", True),
    )


def linear_tiles(shape: Linear, dtype: torch.dtype, dry: bool) -> list[LinearTile]:
    """The default's first; no tile that would mostly be empty, none by TMA where the plain kernel would stand in."""
    by_tma = shape.rows >= MANY_ROWS and dtype != torch.float32
    first = default_tile(shape.rows, shape.dim_out, dtype)
    if shape.residual and shape.dim_out % first.block_n:
        first = default_tile(shape.rows, shape.dim_out, dtype, default_stats_block(shape.rows, shape.dim_out, dtype))
    others = [t for t in (*TILES, *MORE_TILES) if t != first and t.block_m <= 2 * shape.rows and (by_tma or not t.tma)]
    return [first, *(t for t in others[: 1 if dry else None] if shape.dim_out % t.block_n == 0)]


def linear_ways(
    shape: Linear, dtype: torch.dtype, device: torch.device, count: int, tiles: Sequence[LinearTile]
) -> dict[str, list[Callable[[], Any]]]:
    """Calls of every way, by name, over `count` buffers."""

    def buffers(dim: int) -> list[torch.Tensor]:
        return [torch.randn(shape.rows, dim, device=device, dtype=dtype) for _ in range(count)]

    x, residual = buffers(shape.dim_in), buffers(shape.dim_out) if shape.residual else [None] * count
    weight = (torch.randn(shape.dim_out, shape.dim_in, device=device) / shape.dim_in**0.5).to(dtype)
    bias = torch.randn(shape.dim_out, device=device, dtype=dtype)
    sums = row_sums(weight) if shape.norm else None
    parts = 128 if shape.dim_in % 128 == 0 else 32
    stats = [torch.stack(_stats(one, parts), dim=2) for one in x] if shape.norm else [None] * count

    def call(run: Callable[..., Any], i: int, **more: Any) -> Callable[[], Any]:
        return functools.partial(run, x[i], weight, bias, residual[i], sums, stats[i], 1e-6, shape.activation, **more)

    def by_pytorch(*given: Any) -> Any:
        with using(PYTORCH):
            return linear(*given)

    ways = {"pytorch": [call(by_pytorch, i) for i in range(count)]}
    for tile in tiles:
        block = tile.block_n if shape.residual else 0
        ways[by(tile)] = [call(launch_linear, i, stats_block=block, tile=tile) for i in range(count)]
    return ways


def by(tile: LinearTile | AttentionTile) -> str:
    """What a way is called."""
    return "triton " + "x".join(map(str, dataclasses.astuple(tile)))


def _stats(x: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.float().view(len(x), -1, parts)
    return blocks.mean(dim=2), blocks.var(dim=2, unbiased=False) * parts


def attention_tiles(n: int, head_dim: int, dtype: torch.dtype) -> list[AttentionTile]:
    first = default_attention_tile(n, n, head_dim, dtype)
    found = [first]
    sums = {197: ((128, 64, 16), (256,), (128, 128)), 138: ((128, 16), (256,)), 97: ((64, 32, 16), (128,), (64, 64))}
    for chunks in sums.get(n, ((64, 16), (128,))):
        for block_m, warps in ((64, 4), (128, 8), (128, 4)):
            for programs in (0, 1):
                found.append(AttentionTile(block_m, *chunks, num_warps=warps, programs=programs))
    found += [AttentionTile(64, 64, num_warps=4, num_stages=2), AttentionTile(128, 64, num_warps=8, num_stages=2)]
    return list(dict.fromkeys(found))
