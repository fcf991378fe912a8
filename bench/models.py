"""Whole models: the engine, its dense twin, the reference eager and under torch.compile, in one interleaved run each.

    PYTHONPATH=.:kernels python bench/models.py --out models.json [--choices h200.json] [--budget 240]

DynamicViT-DeiT-S, -DeiT-B and -LV-ViT-S at keep rate 0.7 with random weights, the targets' table; then the ways of
capturing a forward (programmatic dependent launch, two branches) against the plain one, the stem's share of LV-ViT, and
uint8 pictures against bfloat16 ones.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import dvit_infer as dvit
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.benchmark.compare import Comparison
from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.benchmark.timing import interleave
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.example import example_checkpoint
from dvit_infer.ops.choices import Choices, choices_for, read_choices, using
from dvit_infer.utils.tables import table

# In the order of their value, should the time run out; what has to be compiled for minutes, late.
TABLE = (
    ("dynamicvit-deit-s", (256, 1), ("reference", "dense")),
    ("dynamicvit-deit-b", (256,), ("reference", "dense")),
    ("dynamicvit-lvvit-s", (256,), ("reference", "dense")),
    ("dynamicvit-deit-s", (256,), ("reference", "compile")),
    ("dynamicvit-deit-b", (1,), ("reference", "dense")),
    ("dynamicvit-deit-s", (32, 64, 128, 512), ("reference", "dense")),
)


def compared(arch: str, batches: tuple[int, ...], names: tuple[str, ...], seconds: float) -> Iterator[dict[str, Any]]:
    comparison = Comparison(example_checkpoint(arch), names)
    for batch in batches:
        outcome = comparison.measure(batch, seconds)
        for line in filter(None, (*map(str, outcome.gains), outcome.verdict, outcome.noise)):
            print(f"{arch}, batch {batch}: {line}", flush=True)
        yield from (asdict(row) for row in outcome.rows)


def ways_to_capture(arch: str, batch: int, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """The engine with each way of capturing, and from uint8 pictures, against the plain one."""
    usual = choices_for(device)
    ways = {
        "plain": Choices(usual.rows),
        "programmatic": Choices(usual.rows, programmatic=True),
        "two branches": Choices(usual.rows, two_branches_from=2),
        "programmatic, two branches": Choices(usual.rows, programmatic=True, two_branches_from=2),
        "defaults, nothing tuned": Choices(),
        "cuBLAS and SDPA": Choices(otherwise="pytorch"),
    }
    images = sample_images(batch, (224, 224)).to(device, torch.bfloat16)
    pixels = (images.float() * 40 + 120).clamp(0, 255).byte()
    calls: dict[str, Callable[[], object]] = {}
    answers = {}
    for name, choices in ways.items():
        if name.endswith("branches") and batch < 2:
            continue
        with using(choices):
            engine = dvit.convert(example_checkpoint(arch), device=device)
            answers[name] = engine(images)  # captured with these choices, and kept
        calls[name] = lambda engine=engine: engine(images)
        if name == "plain":
            with using(choices):
                engine(pixels)
            calls["uint8 pictures"] = lambda engine=engine: engine(pixels)
            calls["not captured"] = lambda engine=engine: engine.runner.runner(images)
    timings = interleave(calls, device, seconds)
    for name, timing in timings.items():
        error = (answers[name] - answers["plain"]).abs().max().item() if name in answers else None
        yield {
            **{"op": "forward", "model": arch, "how": name, "dtype": "bfloat16", "batch": batch, "max_error": error},
            **timing.rates(batch),
            "speedup": timing.speedup_over(timings["plain"]),
        }


def share_of_stem(device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """LV-ViT-S at batch 256, and its convolutions and patch embedding alone, both uncaptured."""
    engine = dvit.convert(example_checkpoint("dynamicvit-lvvit-s"), device=device)
    images = sample_images(256, (224, 224)).to(device, torch.bfloat16)
    whole = engine.runner.runner if hasattr(engine.runner, "runner") else engine.runner
    count = next(i for i, node in enumerate(engine.graph.nodes) if node.kind == "attention")
    stem: TorchRunner = type(whole)(replace(engine.graph, nodes=engine.graph.nodes[:count]))
    calls = {"whole": lambda: whole(images), "stem": lambda: stem(images)}
    timings = interleave(calls, device, seconds)
    share = 1 / timings["stem"].speedup_over(timings["whole"])
    for name, timing in timings.items():
        how = {"op": f"LV-ViT-S, {name}", "how": "not captured", "batch": 256, "dtype": "bfloat16"}
        yield {**how, **timing.rates(256), "share": share if name == "stem" else 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON, written again after every model")
    parser.add_argument("--choices", type=Path, help="choices to measure with; default: those of this GPU")
    parser.add_argument("--budget", type=float, default=240, help="seconds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="for each run (default: %(default)s)")
    given = parser.parse_args()
    device, deadline = torch.device("cuda", 0), time.monotonic() + given.budget
    choices = read_choices(given.choices) if given.choices and given.choices.exists() else choices_for(device)
    where = environment()
    rows: list[dict[str, Any]] = []
    capture = [
        ("ways to capture", lambda b=b: ways_to_capture("dynamicvit-deit-s", b, device, given.seconds))
        for b in (256, 1)
    ]
    parts: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        (f"{arch} {batches}", lambda row=(arch, batches, names): compared(*row, given.seconds))
        for arch, batches, names in TABLE
    ]
    parts = [*parts[:3], *capture, ("stem", lambda: share_of_stem(device, given.seconds)), *parts[3:]]
    failed = 0
    with using(choices):
        for name, part in parts:
            if time.monotonic() > deadline:
                print(f"{name}: not measured, no time left", flush=True)
                continue
            try:
                new = list(part())
            except Exception:  # the others are still worth having
                traceback.print_exc()
                print(f"{name}: FAILED", flush=True)
                failed += 1
                continue
            rows += new
            write_json(given.out, {"environment": where, "rows": rows})
            print(_shown(new), flush=True)
    return 1 if failed else 0


def _shown(rows: list[dict[str, Any]]) -> str:
    columns = ("model", "how", "batch", "images_per_s", "p50_ms", "p99_ms", "gflops", "max_logit_error", "max_error")
    columns = (*columns, "top1_agreement", "speedup", "share", "peak_mib")
    there = [c for c in columns if any(row.get(c) is not None for row in rows)]
    cells = [tuple(_cell(row.get(column)) for column in there) for row in rows]
    return table(tuple(there), cells)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else json.dumps(value).strip('"')


if __name__ == "__main__":
    sys.exit(main())
