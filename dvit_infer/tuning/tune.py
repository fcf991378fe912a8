"""`dvit.tune`: find the fastest reduction that keeps a model's answers, on this machine and on given images."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.benchmark.timing import Row, Timing, noise
from dvit_infer.classifier import Source
from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import batch_size, check_fits
from dvit_infer.models.header import header_text
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.points import Points
from dvit_infer.tuning.quality import Goal, Tally, check_goal
from dvit_infer.tuning.result import HeldBack, TunedPoint, TuneResult
from dvit_infer.tuning.resume import SearchFile, key_of
from dvit_infer.tuning.sample import SEED, Sample, digest, distinct, sample_of
from dvit_infer.tuning.search import WINDOW, Found, accepted, evaluated, nearest, search
from dvit_infer.tuning.subject import Subject

BUDGET = 720.0  # seconds
FOR_SEARCH = 0.75  # of it; the rest is for timing those that are left, and for the images held back
FINALISTS = 5  # points that are timed in the end
TIMING_S = (1.0, 30.0)  # of each comparison: the least and the most

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
        search_file: keeps what was found if the search is interrupted, so that the same call resumes, and is deleted in
            the end; None: a file in the user's cache folder.
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
        dense.runner.runtime,
        str(batch),
        str(torch.get_num_threads()),
    )
    key = key_of((subject.digest, header_text(subject.dense), digest(sample), *settings))
    file = SearchFile(search_file, key)

    def save(found: Found) -> None:
        file.save(found)
        what[0] = f"searching, {len(found.tallies)} points"

    def out_of_time() -> bool:
        return time.monotonic() - start > FOR_SEARCH * budget

    what[0] = "searching"
    found = search(points.families, measure, goal, sample.searched, file.read(), out_of_time, save)
    if not found.tallies:
        raise InputError(f"budget: {budget:g} seconds are too few to measure a single point; take more")
    what[0] = "timing"
    names = _finalists(points, measure, goal, sample, found, out_of_time)
    met = bool(names)
    names = names or [_nearest(points, found, goal)]
    left = budget - (time.monotonic() - start)
    engines = {name: measure.engine(name) for name in names}
    timings = measure.time(engines, min(max(TIMING_S[0], left / 3), TIMING_S[1]))
    for name in names:  # the other points of these families are then predicted from this run
        found.timed(points.points[name].candidate, 1 / timings[name].speedup_over(timings[""]))
    what[0] = "images held back"
    names.sort(key=lambda name: -timings[name].speedup_over(timings[""]))
    chosen, held, not_ruled_out, warnings = _chosen(names, engines, measure, goal, sample)
    timing = timings[chosen]
    rows = tuple(_row(engine, timings[name], timings[""], batch) for name, engine in {"": dense, **engines}.items())
    met = met and not_ruled_out
    result = TuneResult(
        engine=engines[chosen],
        goal=goal,
        met=met,
        chosen=_tuned(chosen, points, found, goal, timings, batch, met),
        held_back=held,
        speedup=timing.speedup_over(timings[""]),
        images_per_s=timing.rates(batch)["images_per_s"],
        dense_images_per_s=timings[""].rates(batch)["images_per_s"],
        batch=batch,
        searched=sample.searched,
        points=_all(points, found, goal, timings, batch),
        rows=rows,
        finished=found.finished,
        warnings=(*sample.warnings, *warnings, *_doubts(goal, sample, held, found, timings)),
    )
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


def _finalists(
    points: Points, measure: Measure, goal: Goal, sample: Sample, found: Found, out_of_time: Callable[[], bool]
) -> list[str]:
    """Return the points to be timed: the fastest ones by prediction, and one with counts that suit tiles."""
    met = accepted(points.families, found, goal)
    near = [point for point in met if found.cost(point) <= found.cost(met[0]) * (1 + WINDOW)]
    first: dict[str, str] = {}
    for point in near:  # the best of each family: its others are slower
        first.setdefault(point.family, point.name)
    names = list(first.values())[:FINALISTS]
    for other in points.rounded(names[0]) if names else ():
        if other.name not in found.tallies:
            tally = evaluated(other.name, measure, goal, sample.searched, out_of_time)
            if tally is None:
                break
            found.tallies[other.name] = tally
        if found.tallies[other.name].complete and found.tallies[other.name].meets(goal):
            names.append(other.name)
    return names


def _nearest(points: Points, found: Found, goal: Goal) -> str:
    point = nearest(points.families, found, goal)
    assert point is not None
    return point.name


def _chosen(
    names: Sequence[str], engines: Mapping[str, Engine], measure: Measure, goal: Goal, sample: Sample
) -> tuple[str, HeldBack, bool, list[str]]:
    """Return the first point that the images held back do not rule out; if there is none, the best on these."""
    differ = distinct(sample.images[sample.searched :])
    warnings: list[str] = []
    found = []
    for name in names:
        tally = measure.held_back(engines[name])
        held = _held(tally, goal, differ, measure)
        if held.high >= goal.target:
            return name, held, True, warnings
        found.append((name, held))
        if len(names) > 1:
            rule = f"but the {held.images} held back rule that out ({held.low:.1%} to {held.high:.1%})"
            warnings.append(f"{name}: meets the target on the images searched, {rule}")
    name, held = max(found, key=lambda one: one[1].quality)
    return name, held, False, warnings


def _held(tally: Tally, goal: Goal, differ: int, measure: Measure) -> HeldBack:
    low, high = tally.interval(goal, differ)
    top1 = dense = None
    if goal.metric == "top1":
        dense = 100 * measure.dense_answers(True).float().mean().item()
        top1 = dense - 100 * tally.loss / tally.images
    return HeldBack(tally.quality(goal), low, high, tally.images, differ, top1, dense)


def _tuned(
    name: str, points: Points, found: Found, goal: Goal, timings: Mapping[str, Timing], batch: int, meets: bool
) -> TunedPoint:
    point, tally = points.points[name], found.tallies[name]
    low, high = tally.interval(goal)
    timing = timings.get(name)
    return TunedPoint(
        name=name,
        label=str(point.config.reduction),
        method=point.method,
        settings=dict(point.settings),
        macs=point.candidate.macs,
        quality=tally.quality(goal),
        low=low,
        high=high,
        images=tally.images,
        meets=meets,
        speedup=1 / found.cost(point.candidate) if timing is None else timing.speedup_over(timings[""]),
        images_per_s=None if timing is None else timing.rates(batch)["images_per_s"],
    )


def _all(points: Points, found: Found, goal: Goal, timings: Mapping[str, Timing], batch: int) -> tuple[TunedPoint, ...]:
    meet = {point.name for point in accepted(points.families, found, goal)}
    meet |= {name for name in timings if name and found.tallies[name].complete and found.tallies[name].meets(goal)}
    names = sorted(
        (name for name in found.tallies if name in points.points), key=lambda n: points.points[n].candidate.macs
    )
    return tuple(_tuned(name, points, found, goal, timings, batch, name in meet) for name in names)


def _row(engine: Engine, timing: Timing, dense: Timing, batch: int) -> Row:
    reduction = engine.config.reduction
    peak = None if timing.peak_mib is None else engine.weight_bytes / 2**20 + timing.peak_mib
    return Row(
        model=engine.config.arch,
        keep_rate=reduction.keep_rate,
        runtime="engine" if reduction.stages else "dense",
        variant=str(reduction) if reduction.stages else None,
        device=engine.device.type,
        dtype=engine.precision,
        batch=batch,
        gmacs=engine.outline.gmacs,
        params=engine.params,
        peak_mib=peak,
        baseline="dense",
        speedup=timing.speedup_over(dense),
        **timing.rates(batch),
    )


def _doubts(goal: Goal, sample: Sample, held: HeldBack, found: Found, timings: Mapping[str, Timing]) -> list[str]:
    """Return warnings about what the result does not say."""
    doubts = []
    if goal.metric == "agreement" and goal.allowed * sample.searched < 1:
        needed = f"{math.ceil(1 / goal.allowed)} are needed" if goal.allowed else "no number of images would do"
        doubts.append(
            f"target {goal.target:g} of {sample.searched} searched images allows not one to differ; to tell it from 1, "
            f"{needed}"
        )
    if held.distinct < held.images:
        doubts.append(
            f"only {held.distinct} of {held.images} images held back differ by more than noise; the interval counts "
            "those alone"
        )
    if all(timing.speedup_over(timings[""]) <= 1 for name, timing in timings.items() if name):
        doubts.append("the dense model is at least as fast on this machine")
    if not found.finished:
        doubts.append("the budget ended before the search did; with more, there may be a faster one")
    if noisy := noise(timings.values()):
        doubts.append(noisy)
    return doubts
