"""Measure what Ray costs on one node: dvit-predict's stream by a local cluster over that of one process.

    PYTHONPATH=.:kernels python bench/ray_overhead.py [--images 2000] [--rounds 3] [--models deit-s,digits]

Rounds alternate; the ratio is of one round. Where other work shares the machine, CPU time, of all processes together,
says more. Both streams begin with the list of files and end with the last prediction, on the same CPUs, with the same
batches; loading the engine and starting Ray are told apart. DeiT-S/0.7 (random weights) reads JPEG files of 500 x 375,
the digits model PNG files of 64 x 64.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from PIL import Image

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.evaluate.predictions import Prediction, model_id, predict
from dvit_infer.images.entry import Entry
from dvit_infer.images.find import find_images
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.serve.ray_cluster import LOCAL, cluster, decoders_for, engines_for
from dvit_infer.serve.ray_stream import EngineStream
from dvit_infer.utils.threads import describe_threads

sys.path.append(str(Path(__file__).parent / "proof"))
from embed import write_images

PROOF = Path(__file__).parent / "proof"
CONTENTS = 200  # files that differ; the others are links to them


def write_digits(folder: Path, count: int) -> None:
    """Write images of the digits model as PNG files."""
    from cluttered_digits import draw

    folder.mkdir()
    for number, pixels in enumerate(draw(count, "test", 1)[0]):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:05}.png", compress_level=1)


def linked(folder: Path, count: int) -> None:
    """Add links to the files of a folder until there are so many."""
    files = sorted(folder.iterdir())
    for number in range(len(files), count):
        file = files[number % len(files)]
        os.link(file, folder / f"{number:05}{file.suffix}")


@contextlib.contextmanager
def on_ray(model: str) -> Iterator[EngineStream[list[Prediction]]]:
    """Start Ray here, and the engines of a model, as dvit-predict --ray does."""
    with cluster(LOCAL):
        needs = engines_for(ray.nodes(), None)
        stream: EngineStream[list[Prediction]] = EngineStream(
            functools.partial(dvit.ray.Classify, model), needs, decoders_for(ray.nodes(), needs, None), 0
        )
        stream.start(lambda: None)
        yield stream


class Cost(NamedTuple):
    """What a stream took: seconds, and seconds of CPUs by all processes."""

    wall_s: float
    cpu_s: float


def timed(groups: Iterator[list[Prediction]]) -> tuple[Cost, list[Prediction]]:
    """Return what a stream took, and its predictions."""
    start, before = time.perf_counter(), cpu_seconds()
    found = [one for group in groups for one in group]
    return Cost(time.perf_counter() - start, cpu_seconds() - before), found


def cpu_seconds() -> float:
    """Return the CPU time so far of this process and all below it, with those that they have waited for."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            times[int(path.parent.name)] = sum(map(int, fields[11:15]))
    total = 0
    for one, ticks in times.items():
        above = one
        while above in parents and above != os.getpid():
            above = parents[above]
        total += ticks if above == os.getpid() else 0
    return total / os.sysconf("SC_CLK_TCK")


def check_same(alone: list[Prediction], by_ray: list[Prediction]) -> float:
    """Return the largest difference of a probability.

    Raises:
        SystemExit: An image is missing, or another is its place, or it is of another class.
    """
    if [(one.image, one.top[0][0]) for one in alone] != [(one.image, one.top[0][0]) for one in by_ray]:
        raise SystemExit("the predictions differ")
    shares = [np.array([[share for _, share in one.top] for one in found]) for found in (alone, by_ray)]
    return float(np.abs(shares[0] - shares[1]).max())


def measure(name: str, model: str, folder: Path, rounds: int) -> dict[str, Any]:
    entries = [Entry(path) for path in find_images([str(folder)])]
    pairs, starts, error = [], [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        engine = dvit.convert(model)
        model_id(engine, model, preprocess_for(engine.config))
        loaded = time.perf_counter() - start
        list(predict(engine, entries[:32]))  # compiled, as an engine on Ray is by the time that its first group is
        alone, expected = timed(predict(engine, entries))
        del engine
        start = time.perf_counter()
        with on_ray(model) as stream:
            started = time.perf_counter() - start
            list(stream(entries[:32]))
            by_ray, found = timed(stream(entries))
            engines, decoders = stream.engines, stream.decoders
        error = max(error, check_same(expected, found))
        pairs.append((alone, by_ray))
        starts.append((loaded, started))
        for how, cost in (("alone", alone), ("by Ray", by_ray)):
            print(f"{name}: {len(entries) / cost.wall_s:.1f} images/s {how}, {cost.cpu_s:.1f} s of CPU", flush=True)
    return {
        "model": name,
        "what": f"{len(entries)} images by Ray on one node, start apart",
        "engines": engines,
        "decoders": decoders,
        "images_per_s": len(entries) / statistics.median(by_ray.wall_s for _, by_ray in pairs),
        "alone_images_per_s": len(entries) / statistics.median(alone.wall_s for alone, _ in pairs),
        "overhead": statistics.median(by_ray.wall_s / alone.wall_s for alone, by_ray in pairs) - 1,
        "overheads": [by_ray.wall_s / alone.wall_s - 1 for alone, by_ray in pairs],
        "cpu_overhead": statistics.median(by_ray.cpu_s / alone.cpu_s for alone, by_ray in pairs) - 1,
        "start_s": statistics.median(started for _, started in starts),
        "alone_start_s": statistics.median(loaded for loaded, _ in starts),
        "max_probability_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="deit-s,digits")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        deit = Path(folder, "deit-s.pth")
        torch.save(example_checkpoint("dynamicvit-deit-s"), deit)
        models = {"deit-s": (str(deit), write_images), "digits": (str(PROOF / "digits-0.7.pth"), write_digits)}
        for name in given.models.split(","):
            model, write = models[name]
            write(images := Path(folder, name), min(CONTENTS, given.images))
            linked(images, given.images)
            rows.append(measure(name, model, images, given.rounds))
            row = rows[-1]
            print(
                f"{name}: overhead {row['overhead']:.1%} ({min(row['overheads']):.1%} to {max(row['overheads']):.1%}), "
                f"of CPU time {row['cpu_overhead']:.1%}, "
                f"start {row['start_s']:.1f} s for {row['alone_start_s']:.1f}; {describe_threads()}, "
                f"ray {ray.__version__}",
                flush=True,
            )
    if given.json is not None:
        facts = environment() | {"ray": ray.__version__, "threads": describe_threads()}
        write_json(given.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
