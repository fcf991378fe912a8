"""`dvit.tune`: find the fastest reduction that keeps a model's answers, on this machine and on given images."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.errors import InputError
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import batch_size, check_fits
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.header import header_text
from dvit_infer.tuning.final import Final
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.points import Points
from dvit_infer.tuning.quality import Goal, check_goal
from dvit_infer.tuning.result import TuneResult
from dvit_infer.tuning.resume import SearchFile, key_of
from dvit_infer.tuning.sample import SEED, digest, sample_of
from dvit_infer.tuning.search import Found, search
from dvit_infer.tuning.subject import Subject

BUDGET = 720.0  # seconds
FOR_SEARCH, FOR_PREDICTION = 0.75, 0.25  # shares of it: until the search ends, and until it begins at the latest

Progress = Callable[[str, float, float], None]  # what is done, the share of the budget used, seconds left at most


def tune(
    source: Source,
    images: str | Path | Sequence[str] | torch.Tensor,
    target: float = 0.99,
    *,
    metric: str | None = None,
    methods: Sequence[str] | None = None,
    budget: float = BUDGET,
    labels: str | Path | torch.Tensor | None = None,
    batch: int | None = None,
    arch: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    calibrate: str | Path | torch.Tensor | None = None,
    backend: str | None = None,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
    seed: int = SEED,
    search_file: Path | None = None,
    progress: Progress = lambda what, share, left: None,
) -> TuneResult:
    """Find the fastest reduction that keeps a model's answers on these images.

    Two thirds of the images are searched; a third is held back, and the quality of what was chosen is counted on it.
    The same seed, images and options search the same points, but which one is the fastest is measured.

    Args:
        source: as for `convert`.
        images: a folder, files or patterns, or (n, 3, H, W) images as an engine takes them. At most 2,000 are used.
        target: the quality to keep, above 0, at most 1.
        metric: "agreement": the share of images that get the dense model's class; "cosine": the mean cosine of features
            with the dense model's; "top1": the top-1 accuracy as a share of the dense model's, which needs classes.
            None: agreement, or cosine for a model without classifier.
        methods: those to search; None: evit, tome and predictor, as far as they fit.
        budget: seconds that it may take, but for what a single call takes.
        labels: for top1, if the images are in no class folders: a file, or (n,) classes of images that are given.
        batch: images at a time; None: 256 on CUDA, 16 on a CPU.
        arch, image_size, assume, device, dtype, calibrate, backend: as for `convert`.
        preprocess, workers: as for `measure_accuracy`.
        seed: of the order of the images.
        search_file: keeps what was found, so that the same call resumes where this one was interrupted; None: a file in
            the user's cache folder, if that can be written, which is deleted in the end.
        progress: called often.

    Raises:
        InputError: an argument is invalid, no method fits the model, or there are too few images or too little time.
    """
    start = time.monotonic()
    goal = check_goal("agreement" if metric is None else metric, target)
    _check_budget(budget)
    subject = Subject(source, arch, image_size, assume, device, dtype, calibrate, backend)
    goal = _checked_for(goal, metric, subject)
    batch = batch_size(batch, subject.device)
    check_fits(batch, subject.dense.image_size)
    points = Points(subject.config, subject.dense, methods)
    dense = subject.engine(subject.dense, True)

    def tell(what: str) -> None:
        spent = time.monotonic() - start
        progress(what, min(1.0, spent / budget), max(0.0, budget - spent))

    with_labels = goal.metric == "top1"
    reading = lambda share: tell("reading images")  # noqa: E731
    sample = sample_of(images, dense, labels, with_labels, preprocess, workers, seed, reading)
    what = ["the dense model"]
    measure = Measure(subject.engine, dense, points.points, sample, goal.metric, batch, lambda: tell(what[0]))
    goal = _scaled(goal, measure)
    settings = (
        repr(goal),
        repr(methods),
        dense.precision,
        dense.runner.runtime.partition(",")[0],  # which linear is the fastest is measured anew in each run
        str(batch),
        str(torch.get_num_threads()),
    )
    key = key_of((subject.digest, header_text(subject.dense), digest(sample), *settings))
    file = SearchFile(search_file, key)

    def save(found: Found) -> None:
        file.save(found)
        what[0] = f"searching, {len(found.tallies)} points" if found.tallies else "timing families of points"

    def used(share: float) -> bool:
        return time.monotonic() - start > share * budget

    out_of_time, in_a_hurry = functools.partial(used, FOR_SEARCH), functools.partial(used, FOR_PREDICTION)
    what[0] = "searching"
    found = search(points.families, measure, goal, sample.searched, file.read(), out_of_time, in_a_hurry, save)
    if not found.tallies:
        raise InputError(f"budget: {budget:g} seconds are too few to measure a single point; take more")
    what[0] = "the best ones"
    left = lambda: budget - (time.monotonic() - start)  # noqa: E731
    result = Final(points, found, measure, sample, goal, batch, out_of_time, left).result()
    file.remove()
    return result


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1e7:
        raise InputError(f"budget: {str(budget)[:40]} is not a number of seconds, such as {BUDGET:g}")


def _checked_for(goal: Goal, metric: str | None, subject: Subject) -> Goal:
    if subject.dense.num_classes or goal.metric == "cosine":
        return goal
    if metric is None:
        return Goal("cosine", goal.target)
    raise InputError(f"metric: {subject.dense.arch} has no classifier, and so no classes; metric cosine fits it")


def _scaled(goal: Goal, measure: Measure) -> Goal:
    if goal.metric != "top1":
        return goal
    scale = measure.dense_answers(False).float().mean().item()
    if not scale:
        raise InputError("labels: the dense model is right for none of these images; are these the model's classes?")
    return Goal("top1", goal.target, scale)
