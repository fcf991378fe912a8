"""dvit::routed_mlp against what its parts cost, and dvit::route_tokens, as in DynamicSwin and DynamicConvNeXt.

    PYTHONPATH=.:kernels python bench/routing.py --out routing.json [--dry]

Beside the op, with each of several tiles, stand: both branches on contiguous rows of their own, which routing cannot
beat; a permuted copy of the map around them, which the op spares; the reference in PyTorch, which gathers and adds; the
dense MLP, which routing has to beat. `max_error` is the largest difference from the reference.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from dvit_kernels.activations import CHEAPEST_GELU
from dvit_kernels.linear import FLOAT32_TILE, TILES, LinearTile, default_tile, launch_linear
from dvit_kernels.route_tokens import launch_route_tokens
from dvit_kernels.routed_mlp import WIDE_TILE, launch_routed_mlp
from launches import copies, microseconds
from rows import Part, Row, Rows, arguments, device_for
from second import packed
from torch.nn import functional as F

from dvit_infer.ops.linear import row_sums
from dvit_infer.ops.prune_tokens import score_tokens_ref
from dvit_infer.ops.route_tokens import branch_rows, order_tokens_ref
from dvit_infer.ops.routed_mlp import routed_mlp_ref

KEPT = (137, 97, 58)  # of 196, at a keep rate of 0.7
EPS = 1e-5
Call = Callable[[], torch.Tensor]


class Block:
    """One block's inputs and weights, with statistics of its rows."""

    def __init__(self, batch: int, n: int, c: int, device: torch.device, dtype: torch.dtype) -> None:
        def drawn(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

        self.x = torch.randn(batch, n, c, device=device).to(dtype)
        w1, w2, w = drawn(4 * c, c), drawn(c, 4 * c), drawn(c, c)
        self.mlp, self.fast = [w1, drawn(4 * c), row_sums(w1), w2, drawn(c)], [w, drawn(c), row_sums(w)]
        flat = self.x.float()
        mean = flat.mean(dim=2)
        squares = (flat - mean[..., None]).square().sum(dim=2)
        self.stats = torch.stack([mean, squares], dim=2).view(-1, 1, 2)
        self.act = CHEAPEST_GELU[dtype]

    def order(self, k: int) -> torch.Tensor:
        return order_tokens_ref(self.x[..., 0].float(), k)

    def slow(self, x: torch.Tensor, stats: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        w1, b1, sums, w2, b2 = self.mlp
        return launch_linear(launch_linear(x, w1, b1, None, sums, stats, EPS, self.act)[0], w2, b2, residual)[0]

    def quick(self, x: torch.Tensor, stats: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        w, b, sums = self.fast
        return launch_linear(x, w, b, residual, sums, stats, EPS)[0]

    def apart(self, k: int) -> Call:
        """Both branches on rows that are where they are needed: no routing."""
        x, stats, chosen = self.x.flatten(0, 1), self.stats, len(self.x) * k

        def run() -> torch.Tensor:
            self.slow(x[:chosen], stats[:chosen], x[:chosen])
            return self.quick(x[chosen:], stats[chosen:], x[chosen:])

        return run

    def permuted(self, k: int) -> Call:
        """Rows in the order of branches in a buffer, and the results back to their places."""
        order, x = self.order(k), self.x.flatten(0, 1)
        rows, chosen = torch.cat(branch_rows(order, k)), len(self.x) * k

        def run() -> torch.Tensor:
            y, stats = F.embedding(rows, x), self.stats[rows]
            done = self.slow(y[:chosen], stats[:chosen], y[:chosen]), self.quick(y[chosen:], stats[chosen:], y[chosen:])
            return torch.empty_like(x).index_copy_(0, rows[:chosen], done[0]).index_copy_(0, rows[chosen:], done[1])

        return run

    def routed(self, k: int, tiles: tuple[LinearTile, LinearTile]) -> Call:
        order = self.order(k)
        given = self.mlp, self.fast, self.stats, EPS, self.act
        return lambda: launch_routed_mlp(self.x, self.x, order, k, *given, tiles=tiles)[0]

    def reference(self, k: int) -> Call:
        order, act = self.order(k), "gelu" if self.act == "gelu_poly" else self.act
        return lambda: routed_mlp_ref(self.x, self.x, order, k, self.mlp, self.fast, None, EPS, act)[0]

    def dense(self) -> Call:
        return lambda: self.slow(self.x, self.stats, self.x)


def blocks(device: torch.device, dry: bool, batch: int, c: int, dtype: torch.dtype) -> Iterator[Row]:
    n, kept, seconds = (3, (2,), 0.0) if dry else (196, KEPT, 0.5)
    moved = batch * n * c * dtype.itemsize * 6.0
    several = [Block(batch, n, c, device, dtype) for _ in range(copies(moved, device))]
    for k in kept:
        tiles = (FLOAT32_TILE,) if dtype == torch.float32 else (WIDE_TILE, *TILES)
        first = default_tile(batch * k, 4 * c, dtype)
        calls: dict[str, list[Call]] = {
            f"tiles of {tile.block_m}x{tile.block_n} by {tile.block_k} in the second launch": [
                b.routed(k, (first, tile)) for b in several
            ]
            for tile in tiles
        }
        calls |= {
            "branches apart, nothing routed": [b.apart(k) for b in several],
            "a permuted copy": [b.permuted(k) for b in several],
            "reference": [b.reference(k) for b in several],
            "dense MLP": [b.dense() for b in several],
        }
        times, failed = microseconds(calls, device, seconds, 4 * moved / 4e6)
        expected = calls["reference"][0]().flatten(0, 1).float()
        for name, us in times.items():
            row = {"op": "routed_mlp", "variant": name, "batch": batch, "shape": [n, c, k], "us": us}
            if "tiles" in name or name == "a permuted copy":
                found = calls[name][0]().reshape(expected.shape).float()
                row["max_error"] = (found - expected).abs().max().item()
            yield row | {"dtype": str(dtype).removeprefix("torch."), "device": device.type}
        yield from ({"op": "routed_mlp", "variant": name, "failed": why} for name, why in failed.items())


def choices(device: torch.device, dry: bool, batch: int, c: int, dtype: torch.dtype) -> Iterator[Row]:
    n, k, seconds = (3, 2, 0.0) if dry else (196, 137, 0.5)
    weights = packed(c, device, dtype)
    moved = batch * n * c * dtype.itemsize * 2.0
    inputs = [torch.randn(batch, n, c, device=device).to(dtype) for _ in range(copies(moved, device))]
    calls = {
        "kernels": [lambda x=x: launch_route_tokens(x, weights, k, EPS) for x in inputs],
        "reference": [lambda x=x: order_tokens_ref(score_tokens_ref(x, weights, EPS), k) for x in inputs],
    }
    times, failed = microseconds(calls, device, seconds, 2 * moved / 4e6)
    for name, us in times.items():
        row = {"op": "route_tokens", "variant": name, "batch": batch, "shape": [n, c, k], "us": us}
        yield row | {"dtype": str(dtype).removeprefix("torch."), "device": device.type}
    yield from ({"op": "route_tokens", "variant": name, "failed": why} for name, why in failed.items())


def main() -> int:
    given = arguments(__doc__, 40).parse_args()
    device = device_for(given.dry)
    sizes, dtype = (((1,), (64,)), torch.float32) if given.dry else (((256, 1), (384, 512)), torch.bfloat16)
    jobs = [
        (
            f"{part.__name__}, batch {batch}, {c} channels",
            lambda p=part, b=batch, c=c: p(device, given.dry, b, c, dtype),
        )
        for batch, c in itertools.product(*sizes)
        for part in (blocks, choices)
    ]
    with torch.no_grad():
        return Part(Rows(given.out, given.add), device, given.budget).run(jobs)


if __name__ == "__main__":
    sys.exit(main())
