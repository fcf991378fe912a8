"""Compare methods on the trained models, at equal MACs, and tune the dense one; `make proof` runs this too.

python bench/proof/methods.py [--update]: on the checkpoints of this folder, without training them again; --update puts
the figures into bench/results/proof.json and the chart into docs/.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chart import draw_lines
from cluttered_digits import draw, test_set
from dense import turned
from pictures import write

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment
from dvit_infer.models.registry import outline, outliner
from dvit_infer.tuning.interval import wilson
from dvit_infer.tuning.subject import Subject
from dvit_infer.utils.files import atomic_write_json

ROOT = Path(__file__).resolve().parent.parent.parent
RATES = (0.9, 0.7, 0.5)  # of the predictor, which was trained at 0.7; the others get as many MACs
PRUNE_AT = (2, 3, 4)  # as it was trained
TUNE_WITH, TARGET = 1_000, 0.99
TRAINING_IMAGES, TRAINING_SEED = 16_000, 7
BATCH = 500
MOST_LOST = 2.5  # points of top-1 below the dense model's that the chart shows

Settings = dict[str, Any]


def training_images() -> tuple[np.ndarray, np.ndarray]:
    """Return training images (n, 3, H, W) uint8: slightly distorted digits with clutter, and their classes (n,)."""
    images, labels = draw(TRAINING_IMAGES, "train", TRAINING_SEED)
    rng = np.random.default_rng(TRAINING_SEED)
    parts = [turned(torch.from_numpy(part).float(), rng) for part in np.array_split(images, 24)]
    return torch.cat(parts).round().to(torch.uint8).numpy(), labels


def compare(dense: Path, predictor: Path) -> dict[str, Any]:
    """Return the top-1 of each method on the test images, at the MACs of the predictor at each of `RATES`."""
    images, labels = (torch.from_numpy(array) for array in test_set())
    plain = _engine(dense, method="none")
    found: dict[str, list[dict[str, Any]]] = {}
    subject = Subject(dense)
    for rate in RATES:
        trained = _engine(predictor, keep_rate=rate)
        macs = outline(trained.config).macs
        engines = {"predictor": trained}
        engines |= {name: _engine(dense, **_nearest(subject, each(), macs)) for name, each in SETTINGS.items()}
        for name, engine in engines.items():
            row = {"reduction": str(engine.config.reduction), "gmacs": engine.outline.gmacs}
            found.setdefault(name, []).append(row | {"top1": _top1(engine, images, labels)})
            print(name, found[name][-1], flush=True)
    return {"images": len(images), "dense_top1": _top1(plain, images, labels)} | {
        "dense_gmacs": plain.outline.gmacs,
        "rates": list(RATES),
        "methods": found,
    }


def _evit() -> Iterator[Settings]:
    yield from ({"method": "evit", "keep_rate": r / 100, "prune_at": PRUNE_AT} for r in range(30, 100))


def _random() -> Iterator[Settings]:
    yield from ({"method": "random", "keep_rate": r / 100, "prune_at": PRUNE_AT} for r in range(30, 100))


def _tome() -> Iterator[Settings]:
    """Yield settings that merge 1 to 60 of 64 patches, spread evenly over the blocks."""
    for count in range(1, 61):
        yield {"method": "tome", "merge": [count * (i + 1) // 6 - count * i // 6 for i in range(6)]}


SETTINGS: dict[str, Callable[[], Iterator[Settings]]] = {"evit": _evit, "tome": _tome, "random": _random}


def _nearest(subject: Subject, settings: Iterator[Settings], macs: int) -> Settings:
    """Return the settings whose MACs are nearest."""
    outlined = outliner(subject.dense)

    def apart(one: Settings) -> int:
        rest = {name: value for name, value in one.items() if name != "method"}
        return abs(outlined(subject.config(one["method"], rest)).macs - macs)

    return min(settings, key=apart)


def _engine(path: Path, **settings: Any) -> dvit.Engine:
    return dvit.convert(path, dtype="float32", backend=None if torch.cuda.is_available() else "torch", **settings)


def _top1(engine: dvit.Engine, images: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * int((_classes(engine, images) == labels).sum()) / len(labels)


def _classes(engine: dvit.Engine, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([engine(part).argmax(dim=1).cpu() for part in images.split(BATCH)])


def tuned(dense: Path, batch: int = 64) -> dict[str, Any]:
    """Tune on unlabelled training images, and count on the test images what that keeps."""
    images, labels = training_images()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "unlabelled"
        write(folder, images[:TUNE_WITH], labels[:TUNE_WITH])  # class folders, of which nothing is read but images
        result = dvit.tune(dense, folder, TARGET, dtype="float32", batch=batch, search_file=Path(name) / "search.json")
    test, classes = (torch.from_numpy(array) for array in test_set())
    expected = _classes(_engine(dense, method="none"), test)
    found = _classes(result.engine, test)
    same = int((found == expected).sum())
    low, high = wilson(same, len(test))
    return {
        "won": str(result),
        "met": result.met,
        "options": result.chosen.name,
        "reduction": result.chosen.label,
        "searched": result.searched,
        "points": len(result.points),
        "held_back": {
            "agreement": result.held_back.quality,
            "low": result.held_back.low,
            "high": result.held_back.high,
        },
        "test_agreement": same / len(test),
        "test_interval": [low, high],
        "test_top1": 100 * int((found == classes).sum()) / len(test),
        "speedup": result.speedup,
        "images_per_s": result.images_per_s,
        "dense_images_per_s": result.dense_images_per_s,
        "batch": result.batch,
    }


def draw_chart(found: dict[str, Any], path: Path) -> None:
    """Draw top-1 against MACs, a line a method; what loses over `MOST_LOST` points is not to scale."""
    lines = {
        name: [(row["gmacs"] * 1e3, row["top1"]) for row in sorted(rows, key=lambda row: row["gmacs"])]
        for name, rows in found["methods"].items()
    }
    lines["dense"] = [(found["dense_gmacs"] * 1e3, found["dense_top1"])]
    draw_lines(lines, "10^6 MACs for an image", "top-1, %", found["dense_top1"] - MOST_LOST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="put the results into the repository")
    update = parser.parse_args().update
    here = Path(__file__).parent
    content = {
        "methods": compare(here / "dense.pth", here / "digits-0.7.pth"),
        "tune": {"environment": environment(), **tuned(here / "dense.pth")},
    }
    print(json.dumps(content, indent=1))
    if update:
        results = ROOT / "bench" / "results" / "proof.json"
        atomic_write_json(results, json.loads(results.read_text()) | content)
        draw_chart(content["methods"], ROOT / "docs" / "methods.png")


if __name__ == "__main__":
    main()
