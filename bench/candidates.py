"""The launches that `tune.py` measures: shapes of the models, and candidates for each, with many tiles."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from dvit_kernels.activations import CHEAPEST_GELU
from dvit_kernels.attention import AttentionTile
from dvit_kernels.attention import default_tile as default_attention_tile
from dvit_kernels.linear import TILES, LinearTile, default_stats_block, default_tile, launch_linear
from dvit_kernels.linear_tma import PAIRED, PREFETCHING

from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.layer_norm import row_stats
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
    LinearTile(64, 64, 64, 4, 4),
    LinearTile(32, 64, 64, 4, 4),
    LinearTile(32, 32, 64, 4, 4),
    LinearTile(128, 128, 64, 8, 3, PREFETCHING),
    LinearTile(128, 128, 64, 8, 4, PREFETCHING),
    LinearTile(128, 256, 64, 8, 3, PREFETCHING),
    LinearTile(128, 128, 64, 8, 3, PAIRED),
    LinearTile(128, 128, 64, 8, 3, PAIRED, maxnreg=128),  # with 132 registers only one program would fit
)
MANY_ROWS = 4096  # from here on a program may compute several tiles
SPILLING = ((128, 64, 16), (128, 128), (256,))  # chunks of keys: with 128 queries and 4 warps 80 to 576 bytes on sm_90


class Model(NamedTuple):
    """Channels, heads and hidden channels of a block; tokens of each stage, including the class token."""

    name: str
    channels: int
    heads: int
    hidden: int
    tokens: tuple[int, ...] = (197, 138, 97, 68)


DEIT_S, DEIT_B = Model("DeiT-S", 384, 6, 1536), Model("DeiT-B", 768, 12, 3072)
LVVIT_S = Model("LV-ViT-S", 384, 6, 1152)
# Most valuable first, in case time runs out. Choices need both the large batch and batch 1 of a model.
PLAN = (
    *((model, batch) for model in (DEIT_S, DEIT_B, LVVIT_S) for batch in (256, 1)),
    *((model._replace(tokens=model.tokens[::2]), 32) for model in (DEIT_S, DEIT_B, LVVIT_S)),
)
DRY_PLAN = tuple((Model("tiny", 64, 1, 128, (5,)), batch) for batch in (2, 1))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear of a block, over all rows of a batch."""

    batch: int
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
        """The fields of its row: the keys of a choice, and `shape` as in every result file."""
        does = does_what(self.norm, self.residual, self.activation)
        kind = {"op": "linear", "batch": self.batch, "size": self.rows, "in": self.dim_in, "out": self.dim_out}
        return {**kind, "does": does, "shape": [self.rows, self.dim_in, self.dim_out, does]}


@dataclasses.dataclass(frozen=True)
class Attention:
    """Self-attention over all tokens."""

    batch: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    @property
    def kind(self) -> dict[str, Any]:
        size, n, dim = self.batch * self.heads, self.tokens, self.head_dim
        kind = {"op": "attention", "batch": self.batch, "size": size, "queries": n, "tokens": n, "head_dim": dim}
        return {**kind, "shape": [size, n, dim]}


Shape = Linear | Attention
Tile = LinearTile | AttentionTile


def shapes_of(model: Model, batch: int, dtype: torch.dtype) -> Iterator[Shape]:
    """Yield the launches of a model's blocks."""
    for n in model.tokens:
        yield Attention(batch, n, model.heads, model.channels // model.heads)
        yield from linears(batch, n, model.channels, model.hidden, dtype)


def linears(batch: int, n: int, c: int, hidden: int, dtype: torch.dtype) -> tuple[Linear, ...]:
    """Return the linears of a block."""
    rows = batch * n
    return (
        Linear(batch, rows, c, 3 * c, True, "none", False),
        Linear(batch, rows, c, c, False, "none", True),
        Linear(batch, rows, c, hidden, True, CHEAPEST_GELU[dtype], False),
        Linear(batch, rows, hidden, c, False, "none", True),
    )


def linear_tiles(shape: Linear, dtype: torch.dtype, dry: bool) -> list[LinearTile]:
    """Return the tiles, the default first; without mostly empty ones, and TMA only where it would really be used.

    For many rows, tiles have at least 64 rows: smaller ones use smaller instructions, in tens of thousands of programs.
    """
    many = shape.rows >= MANY_ROWS
    first = default_tile(shape.rows, shape.dim_out, dtype)
    if shape.residual and shape.dim_out % first.block_n:
        first = default_tile(shape.rows, shape.dim_out, dtype, default_stats_block(shape.rows, shape.dim_out, dtype))
    least, most = (64 if many else 0), 2 * shape.rows
    by_tma = many and dtype != torch.float32
    others = [
        t
        for t in dict.fromkeys((*TILES, *MORE_TILES))
        if t != first and least <= t.block_m <= most and (by_tma or not t.tma)
    ]
    return [first, *(t for t in others[: 1 if dry else None] if shape.dim_out % t.block_n == 0)]


def linear_candidates(
    shape: Linear, dtype: torch.dtype, device: torch.device, count: int, tiles: Sequence[LinearTile]
) -> dict[str, list[Callable[[], Any]]]:
    """Return the calls of every candidate by name, over `count` buffers."""

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
            y, _ = linear(*given)
        # The kernels also write the next LayerNorm's statistics; PyTorch needs a launch for them.
        return y, row_stats(y) if shape.residual else None

    candidates = {"pytorch": [call(by_pytorch, i) for i in range(count)]}
    for tile in tiles:
        block = tile.block_n if shape.residual else 0
        candidates[by(tile)] = [call(launch_linear, i, stats_block=block, tile=tile) for i in range(count)]
    return candidates


def by(tile: LinearTile | AttentionTile) -> str:
    """Return the name of a candidate."""
    return "triton " + "x".join(map(str, dataclasses.astuple(tile)))


def _stats(x: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.float().view(len(x), -1, parts)
    return blocks.mean(dim=2), blocks.var(dim=2, unbiased=False) * parts


def attention_tiles(n: int, head_dim: int, dtype: torch.dtype) -> list[AttentionTile]:
    """Return the tiles, the default first; none that spills registers on Hopper."""
    first = default_attention_tile(n, n, head_dim, dtype)
    found = [first]
    sums = {197: ((128, 64, 16), (256,), (128, 128)), 138: ((128, 16), (256,)), 97: ((64, 32, 16), (128,), (64, 64))}
    for chunks in sums.get(n, ((64, 16), (128,))):
        for block_m, warps in ((64, 4), (128, 8), (128, 4)):
            if (block_m, warps) == (128, 4) and chunks in SPILLING:
                continue
            for programs in (0, 1):
                found.append(AttentionTile(block_m, *chunks, num_warps=warps, programs=programs))
    found += [AttentionTile(64, 64, num_warps=4, num_stages=2), AttentionTile(128, 64, num_warps=8, num_stages=2)]
    return list(dict.fromkeys(found))


def tiles_of(shape: Shape, dtype: torch.dtype, dry: bool) -> Sequence[Tile]:
    if isinstance(shape, Linear):
        return linear_tiles(shape, dtype, dry)
    return attention_tiles(shape.tokens, shape.head_dim, dtype)[: 2 if dry else None]
