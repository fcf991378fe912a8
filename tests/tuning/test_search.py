"""The search on families whose optimum is known, and what it spends; no model is needed."""

import math

import numpy as np
import pytest

from dvit_infer.tuning.quality import Goal, Tally
from dvit_infer.tuning.search import SMALLEST_GAIN, WINDOW, Candidate, Found, accepted, nearest, search

IMAGES, BATCH, STEPS = 600, 20, 40


class Families:
    """Three families: an image's answer changes where fewer MACs are left than it needs in that family.

    `needs`: the mean need of a family; `extra`: time beside its MACs.
    """

    def __init__(self, needs: dict[str, float], extra: dict[str, float], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        hard = rng.normal(0, 0.1, IMAGES)  # the same images are hard for all
        self.needs = {name: mean + hard + rng.normal(0, 0.02, IMAGES) for name, mean in needs.items()}
        self.extra = extra
        shares = [0.2 + 0.02 * i for i in range(STEPS)]
        self.families = {name: [Candidate(f"{name} {share:.2f}", name, share) for share in shares] for name in needs}
        self.points = {point.name: point for points in self.families.values() for point in points}
        self.seen, self.calls = 0, []

    def losses(self, name):
        self.calls.append(name)
        point = self.points[name]
        lost = (self.needs[point.family] > point.macs).astype(float)
        for first in range(0, IMAGES, BATCH):
            self.seen += BATCH
            yield lost[first : first + BATCH].tolist()

    def relative_time(self, name):
        point = self.points[name]
        return point.macs + self.extra[point.family]

    def quality(self, point):
        return float((self.needs[point.family] <= point.macs).mean())

    def best(self, goal):
        """The least time of all points that meet the target, by trying all."""
        met = [p for p in self.points.values() if self.quality(p) >= goal.target]
        return min((self.relative_time(p.name) for p in met), default=math.inf)


def several(seed=0):
    return Families({"a": 0.5, "b": 0.35, "c": 0.42}, {"a": 0.0, "b": 0.25, "c": 0.02}, seed)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99, 0.997])
@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_grid_finds(seed, target):
    known, goal = several(seed), Goal("agreement", target)
    found = search(known.families, known, goal, IMAGES)
    met = accepted(known.families, found, goal)
    best = known.best(goal)
    assert found.finished
    assert known.relative_time(met[0].name) <= best * (1 + SMALLEST_GAIN) + 0.02  # one step of the grid
    assert all(known.quality(point) >= target for point in met)
    assert known.seen < 0.3 * len(known.points) * IMAGES


def test_the_fastest_of_all_is_taken_if_it_meets_the_target():
    known = several()
    found = search(known.families, known, Goal("agreement", 1e-6), IMAGES)
    assert accepted(known.families, found, Goal("agreement", 1e-6))[0].name == "a 0.20"


def test_a_target_that_no_point_meets_has_a_nearest_one():
    known, goal = Families({"a": 1.2, "b": 1.3}, {"a": 0.0, "b": 0.0}), Goal("agreement", 0.99)
    found = search(known.families, known, goal, IMAGES)
    assert accepted(known.families, found, goal) == []
    assert nearest(known.families, found, goal).name == "a 0.98"
    assert nearest(known.families, Found(), goal) is None


def test_hopeless_points_leave_early():
    known = several()
    found = search(known.families, known, Goal("agreement", 0.99), IMAGES)
    first = found.tallies["c 0.20"]
    assert not first.complete
    assert first.images < 100


def test_a_lucky_point_needs_a_witness():
    """A point meets the target, a gentler one of its family does not: neither is accepted."""

    class Lucky(Families):
        def quality(self, point):
            return 1.0 if point.name == "a 0.60" or point.macs > 0.8 else 0.9

        def losses(self, name):
            share = self.quality(self.points[name])
            for _ in range(IMAGES // BATCH):
                yield [1.0] * round(BATCH * (1 - share)) + [0.0] * round(BATCH * share)

    known, goal = Lucky({"a": 0.5}, {"a": 0.0}), Goal("agreement", 0.99)
    tallies = {}
    for name in ("a 0.60", "a 0.64"):
        tallies[name] = Tally()
        for losses in known.losses(name):
            tallies[name].add(losses)
        tallies[name].complete = True
    found = search(known.families, known, goal, IMAGES, Found(tallies))
    met = accepted(known.families, found, goal)
    assert met
    assert all(point.macs > 0.8 for point in met)


def test_families_that_are_slower_are_left_alone():
    known = Families({"a": 0.3, "slow": 0.3}, {"a": 0.0, "slow": 5.0})
    search(known.families, known, Goal("agreement", 0.9), IMAGES)
    assert not [name for name in known.calls if name.startswith("slow")]
    assert WINDOW < 1


def test_an_interrupted_search_resumes_where_it_was():
    whole = several()
    goal = Goal("agreement", 0.99)
    expected = search(whole.families, whole, goal, IMAGES)
    known, saved = several(), []

    class StopError(Exception):
        pass

    def save(found):
        saved[:] = [Found(dict(found.tallies), dict(found.times))]
        if len(found.tallies) == 4:
            raise StopError

    with pytest.raises(StopError):
        search(known.families, known, goal, IMAGES, save=save)
    again, before = several(), set(saved[0].tallies)
    found = search(again.families, again, goal, IMAGES, saved[0])
    assert found.tallies == expected.tallies
    assert found.times == expected.times
    assert not before & set(again.calls)
    assert len(again.calls) + 4 == len(whole.calls)


def test_time_that_is_over_ends_it():
    known = several()
    found = search(known.families, known, Goal("agreement", 0.99), IMAGES, out_of_time=lambda: known.seen > 300)
    assert not found.finished
    assert known.seen <= 300 + BATCH
    found = search(known.families, known, Goal("agreement", 0.99), IMAGES, out_of_time=lambda: True)
    assert found.tallies == {}
