"""Test the claim end to end on a small trained model (`make proof`): two thirds of the tokens dropped, equal accuracy.

A dense ViT learns cluttered digits (dense.py), dvit-train fine-tunes it at keep rate 0.7 three times with different
seeds, dvit-convert verifies, and all are evaluated on the 10,000 test images, also with as many patches kept at random.
EViT, ToMe and random pruning of the dense model are compared with that at equal MACs, and dvit-tune tunes it
(methods.py).
Finished steps stay in build/proof, so that an interrupted run resumes; if the recipe changed, it starts over. --update
copies the two checkpoints, proof.json and the image into the repository.
"""

import argparse
import ast
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cluttered_digits import test_set
from methods import compare, draw_chart, training_images, tuned
from pictures import write

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment, read_results
from dvit_infer.evaluate.accuracy import measure_accuracy
from dvit_infer.images.classes import LabelledFolder, labelled_folder
from dvit_infer.images.stream import Entry, batches, decode, pixels
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.training import saving
from dvit_infer.utils.files import atomic_write_json

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "proof"
SEEDS = (0, 1, 2)
FINE_TUNING = (
    *("--keep-rate", "0.7", "--prune-at", "2,3,4", "--epochs", "4", "--freeze-epochs", "0", "--warmup-epochs", "0.5"),
    *("--lr", "1e-3", "--backbone-lr-scale", "0.1", "--batch", "128", "--smoothing", "0", "--dtype", "bfloat16"),
    *("--scale", "1", "--flip", "0", "--mixup", "0", "--cutmix", "0", "--randaugment", "0", "--erase", "0"),
)
SHOWN = (0, 3, 4)  # indices of test images, not chosen by the model's results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="copy the results into the repository")
    update = parser.parse_args().update
    # The scripts without comments.
    recipe = [ast.dump(ast.parse(path.read_text())) for path in sorted(Path(__file__).parent.glob("*.py"))]
    begun = json.loads(_text(BUILD / "begun.json") or "{}")
    if begun.get("recipe") != recipe:
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
        begun = {"commit": environment()["commit"], "recipe": recipe}
        atomic_write_json(BUILD / "begun.json", begun)
    seconds: dict[str, float] = json.loads(_text(BUILD / "seconds.json") or "{}")

    def stage(name: str, result: Path, work: Callable[[], object]) -> None:
        if not (result.exists() and name in seconds):
            print(f"== {name}", flush=True)
            start = time.perf_counter()
            work()
            seconds[name] = time.perf_counter() - start
            atomic_write_json(BUILD / "seconds.json", seconds)

    dense, train, test = BUILD / "dense.pth", BUILD / "train", BUILD / "test"
    fine_tuned = [BUILD / f"digits-0.7-{seed}.pth" for seed in SEEDS]
    stage("dense", dense, lambda: _run("bench/proof/dense.py", dense))
    stage("pictures", test, lambda: (write(train, *training_images()), write(test, *test_set())))
    for seed, out in zip(SEEDS, fine_tuned, strict=True):
        stage(f"dvit-train, seed {seed}", out, lambda seed=seed, out=out: _fine_tune(dense, train, out, seed))
    saved, bench = BUILD / "digits-0.7.dvit.safetensors", BUILD / "bench.json"
    stage("dvit-convert", saved, lambda: _run("-m", "dvit_infer.cli.convert", fine_tuned[0], "-o", saved))
    batch = "256" if torch.cuda.is_available() else "64"
    arguments = ("-m", "dvit_infer.cli.bench", saved, "--batch", batch, "--json", bench)
    stage("dvit-bench", bench, lambda: _run(*arguments, "--compare", "reference,dense"))
    found: dict[str, Any] = {}
    stage("counting", BUILD / "nothing", lambda: found.update(_counted(dense, fine_tuned, test)))
    stage("methods", BUILD / "nothing", lambda: found.update(methods=compare(dense, fine_tuned[0])))
    stage("dvit-tune", BUILD / "nothing", lambda: found.update(tune=tuned(dense)))
    rows = read_results(bench)["rows"]
    content = {
        "environment": environment(),
        "begun_at_commit": begun["commit"],
        **found,
        **_costs(rows),
        "seconds": seconds,
    }
    atomic_write_json(BUILD / "proof.json", content)
    shown = [path for i, path in enumerate(sorted(test.glob("*/*.png"), key=lambda path: path.name)) if i in SHOWN]
    dvit.draw_kept(dvit.load(saved), [str(path) for path in shown]).save(BUILD / "kept.png")
    draw_chart(content["methods"], BUILD / "methods.png")
    print(json.dumps(content, indent=1))
    if update:
        _keep(dense, fine_tuned[0])


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _run(*command: object) -> None:
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the command received it too, and finishes its step
        process.wait()
        raise
    if status:
        raise SystemExit(status)


def _fine_tune(dense: Path, train: Path, out: Path, seed: int) -> None:
    part = out.with_suffix(".part.pth")
    resuming = part.exists() and saving.unfinished(part) is not None
    if resuming or not part.exists():
        arguments = ("-o", part, *FINE_TUNING, "--seed", seed, *(["--resume"] if resuming else []))
        _run("-m", "dvit_infer.cli.train", dense, train, *arguments)
    part.rename(out)


def _counted(dense: Path, tuned: list[Path], test: Path) -> dict[str, Any]:
    folder = labelled_folder(test, 10)
    top1 = [measure_accuracy(_engine(path), folder, batch=100).top1 for path in (dense, *tuned)]
    engine = _engine(tuned[0])
    kept = engine.config.num_keep
    return {
        "pictures": 10_000,
        "dense_top1": top1[0],
        "pruned_top1": top1[1],
        "random_top1": _random_top1(engine, folder),
        "tokens_dropped": 1 - kept[-1] / engine.config.num_patches,
        "kept": list(kept),
        "seeds": {
            "top1": top1[1:],
            "mean": statistics.mean(top1[1:]),
            "spread": max(top1[1:]) - min(top1[1:]),
        },
    }


def _engine(path: Path) -> dvit.Engine:
    return dvit.convert(path, dtype="float32")


def _random_top1(engine: dvit.Engine, folder: LabelledFolder) -> float:
    """Evaluate the same weights and counts, but with randomly chosen patches at every stage."""
    rng = np.random.default_rng(0)
    stream = decode((Entry(path, label) for path, label in folder.entries()), preprocess_for(engine.config))
    correct = total = 0
    for group in batches(stream, 100):
        images = pixels(group)
        assert images is not None
        order = rng.random((len(images), engine.config.num_patches)).argsort(axis=1)
        kept = [torch.from_numpy(np.sort(order[:, :count], axis=1)) for count in engine.config.num_keep]
        found = engine(images, kept=kept).argmax(dim=1).cpu()
        correct += int((found == torch.tensor([entry.label for entry in group])).sum())
        total += len(images)
    return 100 * correct / total


def _costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return GMACs (`gflops` in proof.json) and images/s of both, from one interleaved run."""
    by = {row["runtime"]: row for row in rows if row.get("runtime") in ("engine", "dense")}
    pruned, dense = by["engine"], by["dense"]
    return {
        "batch": pruned["batch"],
        "dtype": pruned["dtype"],
        "dense_gflops": dense["gmacs"],
        "pruned_gflops": pruned["gmacs"],
        "dense_images_per_s": dense["images_per_s"],
        "pruned_images_per_s": pruned["images_per_s"],
    }


def _keep(dense: Path, tuned: Path) -> None:
    shutil.copy(dense, ROOT / "bench" / "proof" / "dense.pth")
    shutil.copy(tuned, ROOT / "bench" / "proof" / "digits-0.7.pth")
    shutil.copy(BUILD / "proof.json", ROOT / "bench" / "results" / "proof.json")
    for chart in ("kept.png", "methods.png"):
        shutil.copy(BUILD / chart, ROOT / "docs" / chart)


if __name__ == "__main__":
    main()
