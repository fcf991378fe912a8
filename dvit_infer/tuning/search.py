"""The search: best-first over families of points, by predicted time. It knows no model; an `Evaluate` does the work.

Within a family, points differ in how many tokens stay, and fewer tokens are faster and keep fewer answers. Each family
is walked from its fastest point towards gentler ones, in steps that grow with the distance from the target, and then by
bisection between the last point that missed it and the first that met it. Of all families' next points the one with the
least predicted time goes first, and the search ends when that is over the time of what was found. A point leaves as
soon as it cannot meet the target any more, so that fast and bad ones cost few images.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dvit_infer.tuning.quality import Goal, Tally

WINDOW = 0.10  # by how much predicted times may be wrong: points up to that much slower than the best are searched too
SMALLEST_GAIN = 0.01  # of the time: points nearer to one another are not told apart
LEAST_TIME = 0.02  # of the dense model's, whatever a prediction says


@dataclass(frozen=True)
class Candidate:
    """A point to search: its name, the family it belongs to, and its MACs as a share of the dense model's."""

    name: str
    family: str
    macs: float


class Evaluate(Protocol):
    """What measures points by their names."""

    def losses(self, name: str) -> Iterable[Sequence[float]]:
        """Yield the losses of the searched images, in batches, always in the same order."""

    def relative_time(self, name: str) -> float:
        """Return the time of a point over that of the dense model, here, from a few calls."""


@dataclass
class Found:
    """What a search knows; it can be saved and resumed.

    Attributes:
        tallies: of every point that was evaluated.
        times: of the points that were timed, over that of the dense model, from a few calls.
        offsets: of every family, the last of these times less what MACs predict.
        finished: whether time was left for all of it.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    finished: bool = True

    def cost(self, point: Candidate) -> float:
        """Return the predicted time, as a share of the dense model's."""
        usual = sum(self.offsets.values()) / max(1, len(self.offsets))  # if time was not enough for its family
        return max(LEAST_TIME, point.macs + self.offsets.get(point.family, usual))

    def timed(self, point: Candidate, time: float) -> None:
        """Note the time of a point, by which those of its family are predicted from now on."""
        self.times[point.name] = time
        self.offsets[point.family] = time - point.macs


@dataclass
class _Walk:
    """The state of one family: the last place that missed the target, and the first one that met it, if any."""

    points: Sequence[Candidate]
    missed: int = -1
    met: int | None = None
    step: int = 0

    def next(self, found: Found) -> Candidate | None:
        last = len(self.points) - 1
        if self.met is None:
            return None if self.missed == last else self.points[min(last, max(self.missed + self.step, 0))]
        fastest = self.points[self.missed + 1]
        if self.met - self.missed > 1 and self._gain(fastest, found) >= SMALLEST_GAIN:
            return self.points[(self.missed + self.met) // 2]
        # Of many points, the one that met the target may have been lucky: a gentler one has to meet it too.
        witness = self.points[min(last, self.met + max(1, len(self.points) // 16))]
        return None if self._is_confirmed(found) or witness.name in found.tallies else witness

    def _gain(self, fastest: Candidate, found: Found) -> float:
        assert self.met is not None
        slow = found.cost(self.points[self.met])
        return (slow - found.cost(fastest)) / slow

    def _is_confirmed(self, found: Found) -> bool:
        assert self.met is not None
        return any(found.tallies[p.name].complete for p in self.points[self.met + 1 :] if p.name in found.tallies)

    def note(self, place: int, tally: Tally, goal: Goal) -> None:
        if tally.complete and tally.meets(goal):
            self.met = place if self.met is None else min(self.met, place)
        elif place > self.missed:  # whatever is faster than a point that missed the target was lucky
            self.missed = place
            self.met = None if self.met is not None and self.met < place else self.met
            ratio = tally.loss / max(1, tally.images) / max(goal.allowed, 1e-3)
            self.step = min(max(1, round(len(self.points) / 8 * math.log2(max(ratio, 1.0)))), len(self.points) // 3 + 1)


def search(
    families: Mapping[str, Sequence[Candidate]],
    evaluate: Evaluate,
    goal: Goal,
    images: int,
    found: Found | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    in_a_hurry: Callable[[], bool] = lambda: False,
    save: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Search families of points, each in order of MACs, fewest first.

    Args:
        families: the points.
        evaluate: measures them.
        goal: the quality to keep.
        images: how many images are searched.
        found: what an earlier, interrupted search of the same knew; it is not measured again.
        out_of_time: asked after each batch of images; once it is true, the search ends.
        in_a_hurry: once it is true, no more families are timed before the search begins.
        save: called after each measurement.
    """
    found = found or Found()
    found.finished = True

    def predict_by(point: Candidate) -> None:
        known = found.times.get(point.name)
        if known is None and not out_of_time():
            known = evaluate.relative_time(point.name)
            found.timed(point, known)
            save(found)
        elif known is not None:
            found.timed(point, known)

    for points in families.values():
        if not in_a_hurry() or points[len(points) // 2].name in found.times:
            predict_by(points[len(points) // 2])
    walks = [_Walk(points) for points in families.values()]
    best = math.inf
    while True:
        ahead = [(found.cost(point), i, point) for i, walk in enumerate(walks) if (point := walk.next(found))]
        if not ahead:
            return found
        cost, i, point = min(ahead)
        if cost > best * (1 + WINDOW):
            return found
        if point.name not in found.tallies:
            tally = evaluated(point.name, evaluate, goal, images, out_of_time)
            if tally is None:
                found.finished = False
                return found
            found.tallies[point.name] = tally
            save(found)
        first = walks[i].met is None
        walks[i].note(walks[i].points.index(point), found.tallies[point.name], goal)
        if first and walks[i].met is not None:  # the time that counts is that of the points about here
            predict_by(point)
        best = min((found.cost(walk.points[walk.met]) for walk in walks if walk.met is not None), default=math.inf)


def evaluated(name: str, evaluate: Evaluate, goal: Goal, images: int, out_of_time: Callable[[], bool]) -> Tally | None:
    """Return the tally of a point, which ends when it is hopeless; None: time was over before."""
    tally = Tally()
    for losses in evaluate.losses(name):
        if out_of_time():
            return None
        tally.add(losses)
        if tally.hopeless(goal, images):
            return tally
    tally.complete = True
    return tally


def accepted(families: Mapping[str, Sequence[Candidate]], found: Found, goal: Goal) -> list[Candidate]:
    """Return the points that meet the target, as no gentler one of their family misses it; fastest first."""
    met: list[Candidate] = []
    for points in families.values():
        for point in reversed(points):
            tally = found.tallies.get(point.name)
            if tally is None:
                continue
            if not (tally.complete and tally.meets(goal)):
                break
            met.append(point)
    return sorted(met, key=found.cost)


def nearest(families: Mapping[str, Sequence[Candidate]], found: Found, goal: Goal) -> Candidate | None:
    """Return the evaluated point with the highest quality, of equal ones the fastest; None: none was evaluated."""
    seen = [point for points in families.values() for point in points if point.name in found.tallies]
    return max(seen, key=lambda p: (found.tallies[p.name].quality(goal), -found.cost(p)), default=None)
