"""Compare the point that `dvit.tune` chooses with the fastest of an exhaustive grid, on the dense digits model.

    PYTHONPATH=.:kernels:bench/proof python bench/tune_grid.py [--images 1000] [--target 0.99] [--seconds 60] [--update]

Points are evaluated on the images that the search has, those of a family from the fewest MACs on, until `EACH` of them
meet the target: all others of that family take more MACs, and so more time. Those that meet it are timed interleaved
with the chosen one, and compared by the ratios of their times in each round, which a busy machine changes little. A few
minutes; --update puts the figures into bench/results/proof.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from cluttered_digits import test_set

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.points import Points
from dvit_infer.tuning.quality import Goal
from dvit_infer.tuning.sample import sample_of
from dvit_infer.tuning.search import evaluated
from dvit_infer.tuning.subject import Subject
from dvit_infer.utils.files import atomic_write_json

ROOT = Path(__file__).resolve().parent.parent
DENSE = ROOT / "bench" / "proof" / "dense.pth"
BATCH = 64
EACH = 2  # points of a family that are timed
AGAIN = 5  # the fastest of these, which are timed again


def grid(images: torch.Tensor, target: float, seconds: float) -> dict[str, Any]:
    """Return what tuning chose, what the grid has, and the times of both."""
    chosen = dvit.tune(DENSE, images, target, batch=BATCH)
    print(chosen, flush=True)
    subject = Subject(DENSE)
    points = Points(subject.config, subject.dense)
    dense = subject.engine(subject.dense, True)
    sample, goal = sample_of(images, dense), Goal("agreement", target)
    measure = Measure(subject.engine, dense, points.points, sample, goal.metric, BATCH)
    evaluations, leanest = 0, list[str]()
    for family in points.families.values():
        met = 0
        for point in family:
            tally = evaluated(point.name, measure, goal, sample.searched, lambda: False)
            evaluations += 1
            if tally is not None and tally.complete and tally.meets(goal):
                print(f"meets the target with {point.macs:.1%} of the MACs: {point.name}", flush=True)
                leanest.append(point.name)
                met += 1
            if met == EACH:
                break
    print(f"{evaluations} of {len(points.points)} points evaluated, {len(leanest)} timed", flush=True)
    own = chosen.chosen.name
    engines = {own: chosen.engine} | {name: measure.engine(name) for name in leanest if name != own}
    timings = measure.time(engines, seconds)
    leanest.sort(key=lambda name: timings[name].speedup_over(timings[own]), reverse=True)
    # The best of many noisy ratios is a lucky one: time the first few again, by themselves.
    timings = measure.time({name: engines[name] for name in dict.fromkeys([own, *leanest[:AGAIN]])}, seconds)
    ratios = {name: timing.speedup_over(timings[own]) for name, timing in timings.items() if name}
    for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        print(f"{ratio:.3f} x the chosen one's speed: {name}")
    fastest = max(ratios, key=lambda name: ratios[name])
    return {
        "environment": environment(),
        "images": len(images),
        "searched": sample.searched,
        "target": target,
        "batch": BATCH,
        "points": len(points.points),
        "evaluated": evaluations,
        "timed": len(engines),
        "rounds": len(timings[own].seconds),
        "searched_points": len(chosen.points),
        "chosen": own,
        "chosen_speedup": timings[own].speedup_over(timings[""]),
        "fastest": fastest,
        "chosen_time_over_fastest": ratios[fastest],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--seconds", type=float, default=60, help="of each of two timings")
    parser.add_argument("--update", action="store_true", help="put the figures into the repository")
    options = parser.parse_args()
    images = torch.from_numpy(test_set()[0][: options.images])
    found = grid(images, options.target, options.seconds)
    print(json.dumps(found, indent=1))
    if options.update:
        results = ROOT / "bench" / "results" / "proof.json"
        atomic_write_json(results, json.loads(results.read_text()) | {"grid": found})


if __name__ == "__main__":
    main()
