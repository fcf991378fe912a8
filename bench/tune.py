"""Every linear and attention of the models by each way there is: cuBLAS or SDPA, and the kernels with several tiles.

    PYTHONPATH=.:kernels python bench/tune.py --out rows.json --choices h200.json

Writes what was measured, and the choices that follow (dvit_infer/ops/choices.py): the fastest way of each shape, the
default's own unless another wins by more than `MARGIN`. Inputs are random and rotate among buffers larger than the L2
cache. On a CPU it runs tiny sizes in Triton's interpreter, which shows that it runs and says nothing about time.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from candidates import DRY, MODELS, PYTORCH, Linear, attention_tiles, by, linear_tiles, linear_ways, linears
from dvit_kernels.attention import AttentionTile, launch_attention
from dvit_kernels.linear import LinearTile
from launches import copies, microseconds

from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.ops.attention import attention
from dvit_infer.ops.choices import using
from dvit_infer.utils.tables import table

MARGIN = 1.03  # how much faster than the default another way must be to replace it
# Of the largest value: what bfloat16 rounds is well below, and the time of a wrong answer is no time.
TOLERANCE = 2**-5


def measure_linear(shape: Linear, dtype: torch.dtype, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    dry = device.type == "cpu"
    moved = shape.rows * (shape.dim_in + shape.dim_out * (2 if shape.residual else 1)) * dtype.itemsize
    count = copies(moved, device)
    tiles = linear_tiles(shape, dtype, dry)
    ways = linear_ways(shape, dtype, device, count, tiles)
    return timed(ways, tiles, shape.kind, shape.flops, device, seconds, lambda call: call()[0])


def timed(
    ways: Mapping[str, Sequence[Callable[[], Any]]],
    tiles: Sequence[LinearTile | AttentionTile],
    kind: Mapping[str, Any],
    flops: float,
    device: torch.device,
    seconds: float,
    answer: Callable[[Callable[[], Any]], torch.Tensor],
) -> list[dict[str, Any]]:
    """A row for every way, its error that against PyTorch."""
    times, failed = microseconds(ways, device, seconds, 8 + flops / 3e8)
    right = answer(ways["pytorch"][0]).float()
    numbers = {by(tile): dataclasses.astuple(tile) for tile in tiles}
    rows: list[dict[str, Any]] = []
    for name, us in times.items():
        error = (answer(ways[name][0]).float().view_as(right) - right).abs().max().item()
        if not error <= TOLERANCE * right.abs().max().item():  # NaN is wrong too
            failed[name] = f"wrong by {error:.1e}"
            continue
        measured = {"us": us, "tflops": flops / us / 1e6, "max_error": error}
        rows.append({**kind, "how": name, "tile": numbers.get(name), **measured})
    return rows + [{**kind, "how": name, "failed": why} for name, why in failed.items()]


def measure_attention(
    batch: int, n: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    dry = device.type == "cpu"
    qkv = [
        torch.randn(batch, n, 3, heads, head_dim, device=device, dtype=dtype)
        for _ in range(copies(batch * n * 4 * heads * head_dim * dtype.itemsize, device))
    ]
    scale = head_dim**-0.5

    def sdpa(one: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            q, k, v = (t.transpose(1, 2) for t in one.unbind(2))
            return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()

    def by_pytorch(one: torch.Tensor) -> torch.Tensor:
        with using(PYTORCH):
            return attention(*one.unbind(2), scale)

    ways: dict[str, list[Callable[[], Any]]] = {"pytorch": [functools.partial(by_pytorch, one) for one in qkv]}
    if not dry:
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items():
            ways[f"sdpa {name}"] = [functools.partial(sdpa, one, backend) for one in qkv]
        if varlen := _varlen(batch, n, device):
            ways["varlen"] = [functools.partial(varlen, one.flatten(0, 1)) for one in qkv]
    tiles = attention_tiles(n, head_dim, dtype)[: 2 if dry else None]
    for tile in tiles:
        ways[by(tile)] = [functools.partial(launch_attention, *one.unbind(2), scale, tile=tile) for one in qkv]
    kind = {"op": "attention", "size": batch * heads, "queries": n, "tokens": n, "head_dim": head_dim}
    flops = 4.0 * batch * heads * n * n * head_dim
    return timed(ways, tiles, kind, flops, device, seconds, lambda call: call())


def _varlen(batch: int, n: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torch's own attention for ragged batches, where it has one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    lengths = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device)

    def run(packed: torch.Tensor) -> torch.Tensor:
        q, k, v = packed.unbind(1)
        return varlen_attn(q, k, v, lengths, lengths, n, n)

    return run


def choose(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choice of each shape: the fastest, or the default where that is within the margin."""
    shapes: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "us" in row:
            shapes.setdefault(tuple(row[key] for key in _kind_keys(row)), []).append(row)
    chosen = []
    for found in shapes.values():
        usable = [row for row in found if row["how"] == "pytorch" or row["tile"]]
        best = min(usable, key=lambda row: row["us"])
        default = next((row for row in usable if row["tile"]), best)
        if default["us"] <= MARGIN * best["us"]:
            best = default
        way = "triton" if best["tile"] else "pytorch"
        kept = {key: best[key] for key in _kind_keys(best)}
        chosen.append({**kept, "by": way, "tile": best["tile"], "us": round(best["us"], 2)})
    return chosen


def _kind_keys(row: Mapping[str, Any]) -> tuple[str, ...]:
    shape = ("in", "out", "does") if row["op"] == "linear" else ("queries", "tokens", "head_dim")
    return ("op", "dtype", "size", *shape)


def compile_ahead(shapes: Sequence[Linear], lengths: Sequence[int], dtype: torch.dtype) -> None:
    """Compile every candidate once, in processes of their own: one by one would take most of the time there is."""
    # Neither rows nor heads are compiled in: a few of each are enough.
    linear_jobs = {
        (dataclasses.replace(one, rows=64), t): None for one in shapes for t in linear_tiles(one, dtype, False)
    }
    attention_jobs = {(n, t): None for n in lengths for t in attention_tiles(n, 64, dtype)}
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(_compile, [(*job, dtype) for job in (*linear_jobs, *attention_jobs)], chunksize=1)


def _compile(shape: Linear | int, tile: LinearTile | AttentionTile, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    with contextlib.suppress(Exception):  # what cannot be compiled is reported where it is measured
        if isinstance(shape, Linear):
            linear_ways(shape, dtype, device, 1, [tile])[by(tile)][0]()
        else:
            qkv = torch.randn(1, shape, 3, 1, 64, device=device, dtype=dtype)
            launch_attention(*qkv.unbind(2), 1.0, tile=tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of all rows, written again after every shape")
    parser.add_argument("--choices", type=Path, help="JSON of the choices that follow")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, default=240, help="seconds (default: %(default)s)")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dry, deadline = device.type == "cpu", time.monotonic() + given.budget
    plan = DRY if dry else MODELS
    dtype = torch.float32 if dry else getattr(torch, given.dtype)
    seconds = 0.0 if dry else 0.25
    jobs: dict[Any, Callable[[], list[dict[str, Any]]]] = {}  # by shape: models share some
    shapes = []
    for batch, (c, heads, hidden) in itertools.product(plan.batches, plan.models):
        for n in plan.tokens if batch == plan.batches[0] else plan.tokens[::2]:
            one = (batch, n, heads, c // heads)
            jobs.setdefault(one, functools.partial(measure_attention, *one, dtype, device, seconds))
            for shape in linears(batch * n, c, hidden, dtype):
                shapes.append(shape)
                jobs.setdefault(shape, functools.partial(measure_linear, shape, dtype, device, seconds))
    if given.choices:
        given.choices.unlink(missing_ok=True)  # an earlier run's are not this one's
    if not dry:
        compile_ahead(shapes, plan.tokens, dtype)
        print(f"compiled, {deadline - time.monotonic():.0f} s left", flush=True)
    rows: list[dict[str, Any]] = []
    where = environment()
    for done, job in enumerate(jobs.values()):
        if time.monotonic() > deadline:
            print(f"{len(jobs) - done} of {len(jobs)} shapes were not measured: no time left")
            break
        new = [{"dtype": str(dtype).removeprefix("torch."), **row} for row in job()]
        rows += new
        measured = sorted((row for row in new if "us" in row), key=lambda row: row["us"])
        cells = [
            (row["how"], f"{row['us']:.1f}", f"{row['tflops']:.0f}", f"{row['max_error']:.1e}") for row in measured
        ]
        title = ", ".join(f"{key} {measured[0][key]}" for key in _kind_keys(measured[0])) if measured else "nothing ran"
        print(table(("how", ">us", ">TFLOP/s", ">max error"), cells[:6], title=title), flush=True)
        write_json(given.out, {"environment": where, "rows": rows})
        if given.choices:
            content = {"environment": where, "rows": choose(rows), "programmatic": False, "two_branches_from": None}
            write_json(given.choices, content)


if __name__ == "__main__":
    main()
