"""Which points may be chosen: the best of each family, as far as images held back do not speak against them."""

from collections.abc import Callable, Iterator

from dvit_infer.engine import Engine
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.points import Points
from dvit_infer.tuning.quality import Goal
from dvit_infer.tuning.result import HeldBack
from dvit_infer.tuning.sample import Sample, distinct
from dvit_infer.tuning.search import WINDOW, Candidate, Found, accepted, evaluated, nearest

FAMILIES = 5  # of which the best points are timed in the end
TRIES = 3  # points of a family whose answers on images held back are counted, if they rule the first ones out
APART = 1.03  # ratio of their MACs: a point that keeps one token more is no other point
# Images held back rule a point out where a one-sided test at 10% does. At 2.5% it would hardly ever: of 333 images,
# 98.2% pass for 99%.
RULES_OUT = 1.2816

Finalist = tuple[str, Engine]  # the name of a point, and its engine, of which no other reference is kept


class Finalists:
    """The finalists of one search. Each is made when it is asked for, so that few engines are alive at once.

    Args:
        points, found: what was searched, and what is known of it.
        measure, sample, goal: what measures it, on which images, and what is to be kept.
        out_of_time: whether there is no time to evaluate more points.

    Attributes:
        held: the quality on images held back of all that were counted, by name.
        warnings: one line for each that these ruled out.
    """

    def __init__(
        self,
        points: Points,
        found: Found,
        measure: Measure,
        sample: Sample,
        goal: Goal,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._points, self._found, self._measure, self._goal = points, found, measure, goal
        self._searched, self._out_of_time = sample.searched, out_of_time
        self._distinct = distinct(sample.images[sample.searched :])
        self._ruled_out: set[str] = set()
        self._rounded: set[str] = set()
        self.held: dict[str, HeldBack] = {}
        self.warnings: list[str] = []

    def fastest(self) -> Iterator[Finalist]:
        """Yield, of each family that may hold the fastest point of all, the fastest one that is accepted."""
        met, first = self._accepted(), dict[str, Candidate]()
        for point in met:
            if self._found.cost(point) <= self._found.cost(met[0]) * (1 + WINDOW):
                first.setdefault(point.family, point)
        yield from filter(None, map(self._of_family, list(first.values())[:FAMILIES]))

    def rounded(self, name: str) -> Iterator[Finalist]:
        """Yield points beside one that meet the target too, with counts that suit tiles."""
        beside = [point.name for point in self._points.rounded(name) if self._meets(point.name)]
        self._rounded |= set(beside)
        yield from filter(None, map(self._not_ruled_out, beside))

    def nearest(self) -> Finalist:
        """Return the point that comes nearest to the target: on images held back, if these ruled some out."""
        if self.held:
            name = max(self.held, key=lambda name: self.held[name].quality)
            return name, self._measure.engine(name)
        point = nearest(self._points.families, self._found, self._goal)
        assert point is not None
        return point.name, self._counted(point.name)

    def meeting(self) -> set[str]:
        """Return the points that meet the target, and are not ruled out."""
        return ({point.name for point in self._accepted()} | self._rounded) - self._ruled_out

    def _accepted(self) -> list[Candidate]:
        return accepted(self._points.families, self._found, self._goal)

    def _of_family(self, first: Candidate) -> Finalist | None:
        """Return a point or, if images held back rule it out, a gentler one of its family; None: they all are."""
        family = self._points.families[first.family]
        macs, tries = 0.0, 0
        for point in family[family.index(first) :]:
            if point.macs < APART * macs or not self._meets(point.name):
                continue
            if tries == TRIES:
                return None
            if finalist := self._not_ruled_out(point.name):
                return finalist
            macs, tries = point.macs, tries + 1
        return None

    def _meets(self, name: str) -> bool:
        """Return whether a point meets the target on the images searched; evaluate it first if need be."""
        if name not in self._found.tallies:
            tally = evaluated(name, self._measure, self._goal, self._searched, self._out_of_time)
            if tally is None:
                return False
            self._found.tallies[name] = tally
        tally = self._found.tallies[name]
        return tally.complete and tally.meets(self._goal)

    def _not_ruled_out(self, name: str) -> Finalist | None:
        """Return a point, or None if answers on images held back make it unlikely that it meets the target."""
        engine = self._counted(name)
        if name not in self._ruled_out:
            return name, engine
        held = self.held[name]
        rule = f"the {held.images} held back speak against that ({held.quality:.2%})"
        self.warnings.append(f"{name}: meets the target on the images searched, but {rule}")
        return None

    def _counted(self, name: str) -> Engine:
        """Return the engine of a point, after counting what it keeps on images held back."""
        engine = self._measure.engine(name)
        tally = self._measure.held_back(engine)
        low, high = tally.interval(self._goal, self._distinct)
        top1 = dense = None
        if self._goal.metric == "top1":
            dense = 100 * self._measure.dense_answers(True).float().mean().item()
            top1 = dense - 100 * tally.loss / tally.images
        self.held[name] = HeldBack(tally.quality(self._goal), low, high, tally.images, self._distinct, top1, dense)
        if tally.interval(self._goal, self._distinct, RULES_OUT)[1] < self._goal.target:
            self._ruled_out.add(name)
        return engine
