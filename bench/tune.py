"""Time every linear and attention of the models with each candidate: cuBLAS or SDPA, and kernels with several tiles.

    PYTHONPATH=.:kernels python bench/tune.py --out tune.json --choices choices.json [--budget 110] [--dry]

It writes the rows, and the resulting choices (dvit_infer/ops/choices.py): the fastest candidate of each shape, or the
default unless another wins by more than `MARGIN`. A kind of launch gets choices only if its batch 1 has been measured
too. Inputs are random and rotate among buffers larger than the L2 cache. A dry run uses tiny sizes in Triton's
interpreter; its times mean nothing.
"""

import dataclasses
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_candidates import attention_candidates
from candidates import (
    DRY_PLAN,
    PLAN,
    Linear,
    Shape,
    by,
    linear_candidates,
    shapes_of,
    tiles_of,
)
from compile_ahead import compile_ahead
from launches import copies, microseconds
from rows import Job, Part, Row, Rows, arguments, device_for

from dvit_infer.benchmark.results import environment, write_json

MARGIN = 1.03  # how much faster than the default another candidate must be to replace it
# Largest error, relative to the largest value; bfloat16 rounding is well below. Wrong outputs are not timed.
TOLERANCE = 2**-5
SECONDS = 0.25  # for each shape
SHOWN = 4  # fastest candidates of a shape that are printed
WRONG = "wrong"
WORKERS = 12  # processes that compile ahead

Candidates = Mapping[str, Sequence[Callable[[], Any]]]


def measure(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Yield a row for every candidate, with its error against PyTorch."""
    dry = device.type == "cpu"
    tiles = tiles_of(shape, dtype, dry)
    if isinstance(shape, Linear):
        moved = shape.rows * (shape.dim_in + shape.dim_out * (2 if shape.residual else 1)) * dtype.itemsize
        candidates: Candidates = linear_candidates(shape, dtype, device, copies(moved, device), tiles)
    else:
        candidates = attention_candidates(shape, dtype, device, tiles)
    times, failed = microseconds(candidates, device, 0.0 if dry else SECONDS, 8 + shape.flops / 3e8)
    expected = answer(candidates["pytorch"]).float()
    numbers = {by(tile): dataclasses.astuple(tile) for tile in tiles}
    rows: list[dict[str, Any]] = []
    same = {"dtype": str(dtype).removeprefix("torch."), **shape.kind}
    for name, us in times.items():
        error = (answer(candidates[name]).float().view_as(expected) - expected).abs().max().item()
        if not error <= TOLERANCE * expected.abs().max().item():  # also catches NaN
            failed[name] = f"{WRONG} by {error:.1e}"
            continue
        figures = {"us": us, "tflops": shape.flops / us / 1e6, "max_error": error}
        rows.append({**same, **named(name), "tile": numbers.get(name), **figures})
    print("\n".join(map(shown, sorted(rows, key=lambda row: row["us"])[:SHOWN])), flush=True)
    yield from rows  # the default tile first, as `choose` requires
    for name, why in failed.items():
        print(f"  {name}: not measured, {why}", flush=True)
        yield {**same, **named(name), ("failed" if why.startswith(WRONG) else "not_run"): why}


def named(candidate: str) -> dict[str, str | None]:
    """Return the fields of a row for a name such as 'triton 128x128x64'."""
    runtime, _, variant = candidate.partition(" ")
    return {"runtime": runtime, "variant": variant or None}


def answer(calls: Sequence[Callable[[], Any]]) -> torch.Tensor:
    """Return the output of a candidate, without the statistics that linears also return."""
    found = calls[0]()
    return found[0] if isinstance(found, tuple) else found


def choose(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the choice of each shape, and the kinds of launches without choices because batch 1 was not measured.

    A choice is the fastest candidate, or the default if that is within the margin.
    """
    shapes: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "us" in row and (row["runtime"] == "pytorch" or row["tile"]):
            shapes.setdefault((_kind(row), row["size"]), []).append(row)
    with_batch_1 = {_kind(row) for found in shapes.values() for row in found if row["batch"] == 1}
    chosen, without = [], {}
    for (kind, size), found in shapes.items():
        if kind not in with_batch_1:
            without[" ".join(f"{value}" for _, value in kind)] = None
            continue
        best = min(found, key=lambda row: row["us"])
        default = next((row for row in found if row["tile"]), best)
        if default["us"] <= MARGIN * best["us"]:
            best = default
        by_what = "triton" if best["tile"] else "pytorch"
        chosen.append({**dict(kind), "size": size, "by": by_what, "tile": best["tile"], "us": round(best["us"], 2)})
    return chosen, list(without)


def _kind(row: Row) -> tuple[tuple[str, Any], ...]:
    """Return the key by which a choice is looked up, without its size."""
    keys = ("in", "out", "does") if row["op"] == "linear" else ("queries", "tokens", "head_dim")
    return tuple((key, row[key]) for key in ("op", "dtype", *keys))


def shown(row: Row) -> str:
    name = f"{row['runtime']} {row['variant'] or ''}"
    return f"  {name:32} {row['us']:8.1f} us {row['tflops']:6.0f} TFLOP/s  max error {row['max_error']:.1e}"


def main() -> int:
    parser = arguments(__doc__, 110)
    parser.add_argument("--choices", type=Path, help="JSON file for the resulting choices")
    given = parser.parse_args()
    device, dtype = device_for(given.dry), torch.float32 if given.dry else torch.bfloat16
    part = Part(Rows(given.out, given.add), device, given.budget)
    groups = [
        (f"{model.name}, batch {batch}", list(shapes_of(model, batch, dtype)))
        for model, batch in (DRY_PLAN if given.dry else PLAN)
    ]
    where, seen = environment(), set()

    def jobs() -> Iterator[tuple[str, Job]]:
        for (name, shapes), ready in zip(groups, compiled, strict=True):
            if time.monotonic() < part.end:
                ready()
            for shape in shapes:
                if shape not in seen:  # models share some
                    seen.add(shape)
                    words = " ".join(map(str, (shape.kind["op"], *shape.kind["shape"])))
                    yield f"{name}: {words}", functools.partial(measure, shape, dtype, device)
            _write_choices(given.choices, part.rows.rows, where)

    if given.dry:
        compiled: list[Callable[[], None]] = [lambda: None for _ in groups]
        return part.run(jobs(), lambda row: "")
    workers = max(1, min(WORKERS, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        compiled = [compile_ahead(pool, shapes, dtype) for _, shapes in groups]
        return part.run(jobs(), lambda row: "")


def _write_choices(path: Path | None, rows: Sequence[Row], where: Mapping[str, str | None]) -> None:
    chosen, without = choose(rows)
    if without:
        print(f"no choices without a measurement of batch 1: {'; '.join(without)}", flush=True)
    if path and chosen:
        capture = {"programmatic": False, "two_branches_from": None}
        write_json(path, {"environment": where, "rows": chosen, **capture})


if __name__ == "__main__":
    sys.exit(main())
