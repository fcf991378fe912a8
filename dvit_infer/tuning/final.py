"""The end of a search: the finalists are timed beside the dense model, and the fastest one is the result."""

import itertools
import math
from collections.abc import Callable, Iterator

from dvit_infer.benchmark.timing import Row, Timing, noise
from dvit_infer.engine import Engine
from dvit_infer.tuning.finalists import Finalist, Finalists
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.points import Points
from dvit_infer.tuning.quality import Goal
from dvit_infer.tuning.result import HeldBack, TunedPoint, TuneResult
from dvit_infer.tuning.sample import Sample
from dvit_infer.tuning.search import Found

AT_ONCE = 3  # engines that are timed together and so alive, beside the dense one; one of DeiT-B takes 350 MB in float32
TIMING_S = (1.0, 20.0)  # of each such comparison: the least and the most


class Final:
    """The end of one search.

    Args:
        points, found: what was searched, and what is known of it.
        measure, sample, goal, batch: what measures it, on which images, what is to be kept, images at a time.
        out_of_time: whether there is no time to evaluate more points.
        left: seconds that are left to time them; the first ones are timed in any case.
    """

    def __init__(
        self,
        points: Points,
        found: Found,
        measure: Measure,
        sample: Sample,
        goal: Goal,
        batch: int,
        out_of_time: Callable[[], bool],
        left: Callable[[], float],
    ) -> None:
        self._points, self._found, self._measure = points, found, measure
        self._sample, self._goal, self._batch, self._left = sample, goal, batch, left
        self._finalists = Finalists(points, found, measure, sample, goal, out_of_time)
        self._best: dict[str, Engine] = {}  # the fastest so far, if any
        self._timings: dict[str, tuple[Timing, Timing]] = {}  # of a point, and of the dense model in the same run
        self._rows: dict[str, Row] = {}

    def result(self) -> TuneResult:
        """Choose among the best points of the families and those beside the best of them, by time."""
        self._compete(self._finalists.fastest())
        for name in list(self._best):
            self._compete(self._finalists.rounded(name))
        met = bool(self._best)
        if not met:
            self._compete(iter([self._finalists.nearest()]))
        [(name, engine)] = self._best.items()
        timing, dense = self._timings[name]
        tuned = self._all()
        return TuneResult(
            engine=engine,
            goal=self._goal,
            met=met,
            chosen=next(point for point in tuned if point.name == name),
            held_back=self._finalists.held[name],
            speedup=timing.speedup_over(dense),
            images_per_s=timing.rates(self._batch)["images_per_s"],
            dense_images_per_s=dense.rates(self._batch)["images_per_s"],
            batch=self._batch,
            searched=self._sample.searched,
            points=tuned,
            rows=(self._row(self._measure.dense, dense, dense), *self._rows.values()),
            finished=self._found.finished,
            warnings=(*self._sample.warnings, *self._finalists.warnings, *self._doubts(self._finalists.held[name])),
        )

    def _compete(self, challengers: Iterator[Finalist]) -> None:
        """Time all of them, beside the best so far, and keep only the best."""
        while (self._left() > 0 or not self._best) and self._next(challengers):
            pass

    def _next(self, challengers: Iterator[Finalist]) -> bool:
        """Time the next ones, as many as may be alive; return whether there was one. Engines that lose go on return."""
        engines = self._best | dict(itertools.islice(challengers, AT_ONCE - len(self._best)))
        if len(engines) == len(self._best):
            return False
        timings = self._measure.time(engines, min(max(TIMING_S[0], self._left() / 3), TIMING_S[1]))
        dense = timings.pop("")
        for name, timing in timings.items():
            self._timings[name] = timing, dense
            self._rows[name] = self._row(engines[name], timing, dense)
            # The other points of its family are predicted from this run.
            self._found.timed(self._points.points[name].candidate, 1 / timing.speedup_over(dense))
        fastest = max(timings, key=lambda name: timings[name].speedup_over(dense))
        self._best = {fastest: engines[fastest]}
        return True

    def _all(self) -> tuple[TunedPoint, ...]:
        names = [name for name in self._found.tallies if name in self._points.points]
        names.sort(key=lambda name: self._points.points[name].candidate.macs)
        meeting = self._finalists.meeting()
        return tuple(self._tuned(name, name in meeting) for name in names)

    def _tuned(self, name: str, meets: bool) -> TunedPoint:
        point, tally, row = self._points.points[name], self._found.tallies[name], self._rows.get(name)
        low, high = tally.interval(self._goal)
        return TunedPoint(
            name=name,
            label=str(point.config.reduction),
            method=point.method,
            settings=dict(point.settings),
            macs=point.candidate.macs,
            quality=tally.quality(self._goal),
            low=low,
            high=high,
            images=tally.images,
            meets=meets,
            speedup=1 / self._found.cost(point.candidate) if row is None else row.speedup,
            images_per_s=None if row is None else row.images_per_s,
        )

    def _row(self, engine: Engine, timing: Timing, dense: Timing) -> Row:
        reduction = engine.config.reduction
        peak = None if timing.peak_mib is None else engine.weight_bytes / 2**20 + timing.peak_mib
        return Row(
            model=engine.config.arch,
            keep_rate=reduction.keep_rate,
            runtime="engine" if reduction.stages else "dense",
            variant=str(reduction) if reduction.stages else None,
            device=engine.device.type,
            dtype=engine.precision,
            batch=self._batch,
            gmacs=engine.outline.gmacs,
            params=engine.params,
            peak_mib=peak,
            baseline="dense",
            speedup=timing.speedup_over(dense),
            **timing.rates(self._batch),
        )

    def _doubts(self, held: HeldBack) -> list[str]:
        """Return warnings about what the result does not say."""
        doubts, goal, searched = [], self._goal, self._sample.searched
        if goal.metric == "agreement" and goal.allowed * searched < 1:
            more = f"it takes {math.ceil(1 / goal.allowed)}" if goal.target < 1 else "no number of images would do"
            doubts.append(
                f"target: of {searched} images searched not one may differ to keep {goal.target:g}; to tell it from 1, "
                f"{more}"
            )
        if held.distinct < held.images:
            doubts.append(
                f"only {held.distinct} of {held.images} images held back differ by more than noise; the interval "
                "counts those alone"
            )
        if all(row.speedup <= 1 for row in self._rows.values()):
            doubts.append("the dense model is at least as fast on this machine")
        if not self._found.finished:
            doubts.append("the budget ended before the search did; with more, there may be a faster one")
        if noisy := noise(itertools.chain(*self._timings.values())):
            doubts.append(noisy)
        return doubts
