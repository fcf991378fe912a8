"""Whole models: the engine, its dense counterpart and the reference, each group in one interleaved run.

    PYTHONPATH=.:kernels python bench/models.py --part models --out models.json [--budget 60] [--dry]

Random weights, keep rate 0.7, bfloat16. Parts: `models`, the main figures, by the default choices; `capture`, variants
of capturing a forward beside the plain one; `choices`, the choices of bench/tune.py beside the defaults; `lvvit`,
LV-ViT-S and the share of its stem; `more`, other batches and torch.compile, which takes minutes.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from forwards import (
    PLAIN,
    Call,
    Expected,
    Forward,
    checkpoint,
    chosen,
    engine_under,
    forward_of,
    with_programmatic,
    with_two_branches,
)
from rows import Job, Part, Row, Rows, arguments, device_for

from dvit_infer.backends.torch import TorchRunner
from dvit_infer.benchmark.compare import Comparison
from dvit_infer.benchmark.timing import interleave
from dvit_infer.images.synthetic import sample_images
from dvit_infer.ops.choices import Choices, read_choices

DEIT_S, DEIT_B, LVVIT_S = "dynamicvit-deit-s", "dynamicvit-deit-b", "dynamicvit-lvvit-s"
TABLES = {
    "models": ((DEIT_S, (256, 1), ("reference", "dense")), (DEIT_B, (256,), ("reference", "dense"))),
    "lvvit": ((LVVIT_S, (256,), ("reference", "dense")),),
    "more": (
        (DEIT_B, (1,), ("reference", "dense")),
        (DEIT_S, (32, 64, 128, 512), ("reference", "dense")),
        (DEIT_S, (256,), ("reference", "compile")),
    ),
}


class Models:
    """Jobs of the parts; sizes are tiny in a dry run.

    Args:
        seconds: for each interleaved run.
        choices: the file that bench/tune.py wrote, if any.
    """

    def __init__(self, device: torch.device, dry: bool, seconds: float, choices: Path | None) -> None:
        self.device, self.dry, self.seconds, self.choices = device, dry, 0.0 if dry else seconds, choices
        self.dtype = torch.float32 if dry else torch.bfloat16

    def batch(self, batch: int) -> int:
        return min(batch, 2) if self.dry else batch

    def jobs(self, part: str) -> Iterator[tuple[str, Job]]:
        for arch, batches, names in TABLES.get(part, ()):
            if "compile" not in names or not self.dry:
                yield f"{arch}, {' and '.join(names)}", lambda row=(arch, batches, names): self.compared(*row)
        if part == "lvvit":
            yield "LV-ViT-S, its stem", self.share_of_stem
        for batch in (256, 1):
            if part == "capture":
                yield f"capture, batch {batch}", lambda b=batch: self.capture_variants(self.batch(b))
            if part == "choices":
                yield f"measured choices, batch {batch}", lambda b=batch: self.by_choices(DEIT_S, self.batch(b))
        if part == "choices":
            yield "measured choices, DeiT-B", lambda: self.by_choices(DEIT_B, self.batch(256))

    def compared(self, arch: str, batches: tuple[int, ...], names: tuple[str, ...]) -> Iterator[Row]:
        """Yield rows as dvit-bench writes them, by the default choices."""
        with chosen(PLAIN):
            comparison = Comparison(checkpoint(arch, self.dry), names, str(self.device))
            for batch in map(self.batch, batches):
                outcome = comparison.measure(batch, self.seconds)
                yield from (asdict(row) for row in outcome.rows)
                print(f"  {comparison.runs}", flush=True)
                for line in filter(None, (*map(str, outcome.pruning_speedups), outcome.verdict, outcome.noise)):
                    print(f"  {arch}, batch {batch}: {line}", flush=True)
                if outcome.mismatches:
                    raise RuntimeError(f"{arch}, batch {batch}: {outcome.verdict}")

    def capture_variants(self, batch: int) -> Iterator[Row]:
        """Time the engine captured in each variant, and from uint8 images, beside the plain one."""
        source = checkpoint(DEIT_S, self.dry)
        expected = Expected.of(source, batch, self.device, self.dtype)
        variants = {
            "programmatic": with_programmatic(PLAIN),
            "two branches": with_two_branches(PLAIN),
            "programmatic, two branches": with_programmatic(with_two_branches(PLAIN)),
            "cuBLAS and SDPA": Choices(otherwise="pytorch"),
        }
        plain, images = forward_of(source, PLAIN, expected), expected.images
        forwards = [plain, plain.beside("not captured", lambda: plain.engine.runner.runner.run(images).x)]
        for variant, choices in variants.items():
            if batch > 1 or "branches" not in variant:
                forwards.append(forward_of(source, choices, expected, variant=variant))
        pixels = (images.float() * 40 + 120).clamp(0, 255).byte()
        from_uint8 = plain.beside("uint8 images", lambda: plain.engine(pixels))
        yield from self.interleaved("forward, captured", forwards, expected, plain, unchecked=[from_uint8])

    def by_choices(self, arch: str, batch: int) -> Iterator[Row]:
        """Time engine and dense counterpart by the choices measured on this GPU, beside the defaults."""
        if self.choices is None or not self.choices.exists():
            print("  no choices were measured: nothing to compare", flush=True)
            return
        source, measured = checkpoint(arch, self.dry), read_choices(self.choices)
        expected = Expected.of(source, batch, self.device, self.dtype)
        variants = {None: PLAIN, "measured choices": measured}
        engines = [forward_of(source, choices, expected, variant=variant) for variant, choices in variants.items()]
        dense = [forward_of(source, choices, expected, "dense", variant) for variant, choices in variants.items()]
        yield from self.interleaved("forward, choices", engines, expected, engines[0], unchecked=dense)

    def interleaved(
        self, op: str, forwards: list[Forward], expected: Expected, baseline: Forward, unchecked: list[Forward]
    ) -> Iterator[Row]:
        """Time the forwards whose outputs are correct, and `unchecked`, which compute another function, interleaved."""
        batch, logits = len(expected.images), {}
        for forward in forwards:
            found = forward.call()
            if why := expected.disagreement(found, forward.given() if forward.given else None):
                yield {**forward.identity(batch), "op": op, "failed": why}
            else:
                logits[forward.name] = found
        timed = [f for f in forwards if f.name in logits] + list(unchecked)
        timings = interleave(
            {f.name: f.call for f in timed}, self.device, self.seconds, warm_up=0.0 if self.dry else 0.5
        )
        for forward in timed:
            row = forward.row(batch, timings[forward.name], logits.get(forward.name, expected.logits), expected)
            row["op"] = op
            if forward.name not in logits:
                row |= {"max_logit_error": None, "top1_agreement": None}
            if baseline.name in timings:
                row |= {
                    "baseline": baseline.name,
                    "speedup": timings[forward.name].speedup_over(timings[baseline.name]),
                }
            yield row

    def share_of_stem(self) -> Iterator[Row]:
        """Time LV-ViT-S, and its convolutions and patch embedding alone, both launched one by one."""
        batch = self.batch(256)
        engine = engine_under(PLAIN, checkpoint(LVVIT_S, self.dry), self.device, dtype=self.dtype)
        images = sample_images(batch, engine.config.image_size).to(self.device, self.dtype)
        with chosen(PLAIN):
            whole = engine.runner.runner
            count = next(i for i, node in enumerate(engine.graph.nodes) if node.kind == "attention")
            stem: TorchRunner = type(whole)(replace(engine.graph, nodes=engine.graph.nodes[:count]))
            calls: dict[str, Call] = {"whole": lambda: whole.run(images).x, "stem": lambda: stem.run(images).x}
            timings = interleave(calls, self.device, self.seconds, warm_up=0.0 if self.dry else 0.5)
        share = 1 / timings["stem"].speedup_over(timings["whole"])
        for name, timing in timings.items():
            row: dict[str, Any] = {"op": f"LV-ViT-S, {name}", "runtime": "engine", "variant": "not captured"}
            row |= {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch."), "batch": batch}
            yield {**row, **timing.rates(batch), "share": share if name == "stem" else 1.0}


def main() -> int:
    parser = arguments(__doc__, 60)
    parser.add_argument("--part", choices=("models", "capture", "choices", "lvvit", "more"), default="models")
    parser.add_argument("--choices", type=Path, help="output of bench/tune.py, for the part choices")
    parser.add_argument("--seconds", type=float, default=3, help="for each interleaved run (default: %(default)s)")
    given = parser.parse_args()
    device = device_for(given.dry)
    models = Models(device, given.dry, given.seconds, given.choices)
    return Part(Rows(given.out, given.add), device, given.budget).run(models.jobs(given.part))


if __name__ == "__main__":
    sys.exit(main())
