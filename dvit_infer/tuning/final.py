"""The end of a search: which points are left, whether images held back agree, their times, and the result."""

import math
from collections.abc import Callable, Mapping

from dvit_infer.benchmark.timing import Row, Timing, noise
from dvit_infer.engine import Engine
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.points import Points
from dvit_infer.tuning.quality import Goal
from dvit_infer.tuning.result import HeldBack, TunedPoint, TuneResult
from dvit_infer.tuning.sample import Sample, distinct
from dvit_infer.tuning.search import WINDOW, Candidate, Found, accepted, evaluated, nearest

FINALISTS = 5  # families that are timed in the end
TRIES = 3  # points of a family whose answers on images held back are counted, if they rule the first ones out
APART = 1.03  # ratio of their MACs: a point that keeps one token more is no other point
# Images held back rule a point out where a one-sided test at 10% does. At 2.5% it would hardly ever: of 333 images,
# 98.2% pass for 99%.
RULES_OUT = 1.2816


class Final:
    """The end of one search.

    Args:
        points, found: what was searched, and what is known of it.
        measure, sample, goal, batch: what measures it, on which images, what is to be kept, images at a time.
    """

    def __init__(self, points: Points, found: Found, measure: Measure, sample: Sample, goal: Goal, batch: int) -> None:
        self._points, self._found, self._measure = points, found, measure
        self._sample, self._goal, self._batch = sample, goal, batch
        self._accepted = accepted(points.families, found, goal)
        self._held: dict[str, HeldBack] = {}
        self._meeting = {point.name for point in self._accepted}
        self._ruled_out: set[str] = set()
        self._engines: dict[str, Engine] = {}
        self._warnings: list[str] = []

    def result(self, out_of_time: Callable[[], bool], seconds: Callable[[], float]) -> TuneResult:
        """Choose among the best points of the families: by answers on images held back, then by time.

        Args:
            out_of_time: whether there is no time for more points.
            seconds: how long timing may take.
        """
        names = [name for first in self._fastest() if (name := self._first_not_ruled_out(first, out_of_time))]
        names += self._rounded(names[0], out_of_time) if names else []
        met = bool(names)
        self._meeting |= set(names)
        if not met:
            names = [self._nearest()]
        engines = {name: self._engines[name] for name in names}
        self._engines = engines  # the others can go
        timings = self._measure.time(engines, seconds())
        for name in names:  # the other points of these families are then predicted from this run
            self._found.timed(self._points.points[name].candidate, 1 / timings[name].speedup_over(timings[""]))
        chosen = max(names, key=lambda name: timings[name].speedup_over(timings[""]))
        rates = {name: timings[name].rates(self._batch)["images_per_s"] for name in (chosen, "")}
        tuned = self._all(timings)
        dense = self._measure.dense
        return TuneResult(
            engine=engines[chosen],
            goal=self._goal,
            met=met,
            chosen=next(point for point in tuned if point.name == chosen),
            held_back=self._held[chosen],
            speedup=timings[chosen].speedup_over(timings[""]),
            images_per_s=rates[chosen],
            dense_images_per_s=rates[""],
            batch=self._batch,
            searched=self._sample.searched,
            points=tuned,
            rows=tuple(self._row(each, timings[name], timings[""]) for name, each in {"": dense, **engines}.items()),
            finished=self._found.finished,
            warnings=(*self._sample.warnings, *self._warnings, *self._doubts(self._held[chosen], timings)),
        )

    def _fastest(self) -> list[Candidate]:
        """Return the fastest accepted point of each family that may hold the fastest of all."""
        first: dict[str, Candidate] = {}
        for point in self._accepted:
            if self._found.cost(point) <= self._found.cost(self._accepted[0]) * (1 + WINDOW):
                first.setdefault(point.family, point)
        return list(first.values())[:FINALISTS]

    def _first_not_ruled_out(self, first: Candidate, out_of_time: Callable[[], bool]) -> str | None:
        """Return a point or, if images held back rule it out, a gentler one of its family; None: they all are."""
        family = self._points.families[first.family]
        macs, tries = 0.0, 0
        for point in family[family.index(first) :]:
            if point.macs < APART * macs or not self._meets(point.name, out_of_time):
                continue
            if tries == TRIES:
                return None
            if not self._is_ruled_out(point.name):
                return point.name
            macs, tries = point.macs, tries + 1
        return None

    def _meets(self, name: str, out_of_time: Callable[[], bool]) -> bool:
        """Return whether a point meets the target on the images searched; evaluate it first if need be."""
        if name not in self._found.tallies:
            tally = evaluated(name, self._measure, self._goal, self._sample.searched, out_of_time)
            if tally is None:
                return False
            self._found.tallies[name] = tally
        tally = self._found.tallies[name]
        return tally.complete and tally.meets(self._goal)

    def _is_ruled_out(self, name: str) -> bool:
        """Return whether answers on images held back make it unlikely that a point meets the target."""
        self._count(name)
        if name not in self._ruled_out:
            return False
        held = self._held[name]
        rule = f"the {held.images} held back speak against that ({held.quality:.2%})"
        self._warnings.append(f"{name}: meets the target on the images searched, but {rule}")
        return True

    def _count(self, name: str) -> None:
        """Count what a point keeps on images held back."""
        self._engines[name] = self._measure.engine(name)
        tally = self._measure.held_back(self._engines[name])
        differ = distinct(self._sample.images[self._sample.searched :])
        low, high = tally.interval(self._goal, differ)
        top1 = dense = None
        if self._goal.metric == "top1":
            dense = 100 * self._measure.dense_answers(True).float().mean().item()
            top1 = dense - 100 * tally.loss / tally.images
        self._held[name] = HeldBack(tally.quality(self._goal), low, high, tally.images, differ, top1, dense)
        if tally.interval(self._goal, differ, RULES_OUT)[1] < self._goal.target:
            self._ruled_out.add(name)

    def _rounded(self, name: str, out_of_time: Callable[[], bool]) -> list[str]:
        """Return points beside one that meet the target too, with counts that suit tiles."""
        beside = [other.name for other in self._points.rounded(name)]
        return [one for one in beside if self._meets(one, out_of_time) and not self._is_ruled_out(one)]

    def _nearest(self) -> str:
        """Return the point that comes nearest to the target: on images held back, if these ruled some out."""
        if self._held:
            return max(self._held, key=lambda name: self._held[name].quality)
        point = nearest(self._points.families, self._found, self._goal)
        assert point is not None
        self._count(point.name)
        return point.name

    def _all(self, timings: Mapping[str, Timing]) -> tuple[TunedPoint, ...]:
        names = [name for name in self._found.tallies if name in self._points.points]
        names.sort(key=lambda name: self._points.points[name].candidate.macs)
        return tuple(self._tuned(name, timings) for name in names)

    def _tuned(self, name: str, timings: Mapping[str, Timing]) -> TunedPoint:
        point, tally, timing = self._points.points[name], self._found.tallies[name], timings.get(name)
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
            meets=name in self._meeting and name not in self._ruled_out,
            speedup=1 / self._found.cost(point.candidate) if timing is None else timing.speedup_over(timings[""]),
            images_per_s=None if timing is None else timing.rates(self._batch)["images_per_s"],
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

    def _doubts(self, held: HeldBack, timings: Mapping[str, Timing]) -> list[str]:
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
        if all(timing.speedup_over(timings[""]) <= 1 for name, timing in timings.items() if name):
            doubts.append("the dense model is at least as fast on this machine")
        if not self._found.finished:
            doubts.append("the budget ended before the search did; with more, there may be a faster one")
        if noisy := noise(timings.values()):
            doubts.append(noisy)
        return doubts
