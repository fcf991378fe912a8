"""The CPU engine against the reference, in float32 and bfloat16, all in one interleaved run.

    python bench/cpu.py        # writes bench/results/<machine>/cpu.json

The bfloat16 reference runs in the two variants in common use: under autocast, and cast as a whole.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.benchmark.timing import Row, interleave
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.registry import build_graph
from dvit_infer.utils.tables import table

ARCH = "dynamicvit-deit-s"


class Candidate(NamedTuple):
    """One way to run the model, its baseline, and a call that gives the expected logits."""

    runtime: str
    variant: str | None
    dtype: str
    call: Callable[[torch.Tensor], torch.Tensor]
    gmacs: float
    params: int
    held_mib: Callable[[], float]
    baseline: str
    expected: Callable[[torch.Tensor], torch.Tensor]

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.runtime, self.variant, self.dtype)))


def candidates() -> Iterator[Candidate]:
    checkpoint = example_checkpoint(ARCH)
    reference = dvit.load_reference(checkpoint)
    cast = dvit.load_reference(checkpoint).to(torch.bfloat16)
    engines = {
        (runtime, dtype): dvit.convert(checkpoint, device="cpu", dtype=dtype, method=method)
        for dtype in ("float32", "bfloat16")
        for runtime, method in (("dense", "none"), ("engine", None))
    }
    gmacs = build_graph(reference, engines["engine", "float32"].config).gmacs

    def eager(images: torch.Tensor) -> torch.Tensor:
        return reference.evaluate(images).logits

    def autocast(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return reference.evaluate(images).logits

    def as_cast(images: torch.Tensor) -> torch.Tensor:
        return cast.evaluate(images.to(torch.bfloat16)).logits

    float32, bfloat16 = "reference float32", "reference autocast bfloat16"
    params = sum(p.numel() for p in reference.parameters())
    dense_params = params - sum(p.numel() for p in reference.score_predictor.parameters())
    for variant, dtype, call, itemsize in (
        (None, "float32", eager, 4),
        ("autocast", "bfloat16", autocast, 4),
        ("cast", "bfloat16", as_cast, 2),
    ):
        against = float32 if dtype == "float32" else bfloat16
        mib = params * itemsize / 2**20
        yield Candidate("reference", variant, dtype, call, gmacs, params, lambda mib=mib: mib, against, eager)
    for (runtime, dtype), engine in engines.items():
        print(f"{runtime}, {dtype}: {engine.runner.runtime}")
        expected = eager if runtime == "engine" else engines["dense", "float32"]
        against = float32 if dtype == "float32" else bfloat16
        own = dense_params if runtime == "dense" else params
        runs = engine.runner.runtime
        variant = "openvino" if "OpenVINO" in runs else None if f"in {dtype}" in runs else "float32 arithmetic"
        held = functools.partial(held_mib, engine)
        yield Candidate(runtime, variant, dtype, engine, engine.outline.gmacs, own, held, against, expected)


def held_mib(engine: dvit.Engine) -> float:
    return (engine.weight_bytes + engine.runner.buffer_bytes) / 2**20


@torch.no_grad()
def rows(all_candidates: list[Candidate], batch: int, seconds: float) -> Iterator[Row]:
    images = sample_images(batch, (224, 224), seed=2)
    calls = {candidate.name: (lambda call=candidate.call: call(images)) for candidate in all_candidates}
    timings = interleave(calls, torch.device("cpu"), seconds)
    for candidate in all_candidates:
        timing, logits, expected = timings[candidate.name], candidate.call(images).float(), candidate.expected(images)
        yield Row(
            model=ARCH,
            keep_rate=1.0 if candidate.runtime == "dense" else 0.7,
            runtime=candidate.runtime,
            variant=candidate.variant,
            device="cpu",
            dtype=candidate.dtype,
            batch=batch,
            **timing.rates(batch),
            gmacs=candidate.gmacs,
            params=candidate.params,
            peak_mib=None if timing.peak_mib is None else timing.peak_mib + candidate.held_mib(),
            max_logit_error=(logits - expected).abs().max().item(),
            top1_agreement=(logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item(),
            baseline=candidate.baseline,
            speedup=timing.speedup_over(timings[candidate.baseline]),
        )
    ours = {(one.runtime, one.dtype): one for one in all_candidates if one.runtime != "reference"}
    for dtype in ("float32", "bfloat16"):
        pruned, dense = ours["engine", dtype], ours["dense", dtype]
        ratio, ceiling = timings[pruned.name].speedup_over(timings[dense.name]), dense.gmacs / pruned.gmacs
        print(f"batch {batch}, {dtype}: pruned over dense {ratio:.3f} x, {ratio / ceiling:.1%} of the {ceiling:.3f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8,32", help="batch sizes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90, help="for each batch size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    all_candidates = list(candidates())
    found = [row for batch in given.batch.split(",") for row in rows(all_candidates, int(batch), given.seconds)]
    columns = (">batch", "runtime", "dtype", ">images/s", ">p20", ">p80", ">speed-up", "over", ">max error")
    cells = [
        (
            *(str(row.batch), " ".join(filter(None, (row.runtime, row.variant))), row.dtype, f"{row.images_per_s:.1f}"),
            *(f"{row.p20_images_per_s:.1f}", f"{row.p80_images_per_s:.1f}", f"{row.speedup:.2f} x", row.baseline),
            f"{row.max_logit_error:.1e}",
        )
        for row in found
    ]
    print(table(columns, cells))
    where = environment()
    out = Path(__file__).parent / "results" / str(where["machine"]) / "cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"environment": where, "rows": [asdict(row) for row in found]})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
