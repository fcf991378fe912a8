"""Intervals, and losses as a share of what the dense model answers."""

import math

import pytest

from dvit_infer.errors import InputError
from dvit_infer.tuning.interval import of_mean, wilson
from dvit_infer.tuning.quality import Goal, Tally, check_goal


@pytest.mark.parametrize(
    ("successes", "images", "low", "high"),
    [  # by R's binom.confint(method = "wilson"), as in Brown, Cai, DasGupta 2001
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (99, 100, 0.9455, 0.9982),
        (1, 1, 0.2065, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(successes, images, low, high):
    assert wilson(successes, images) == pytest.approx((low, high), abs=1e-4)


def test_wilson_solves_its_equation():
    for bound in wilson(37, 50):
        assert abs(bound - 37 / 50) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 50), rel=1e-6)


def test_the_interval_of_a_mean():
    assert of_mean(0.5, 0.1, 100) == pytest.approx((0.4804, 0.5196), abs=1e-4)
    assert of_mean(0.5, 0.0, 1) == (-math.inf, math.inf)


def tally(*losses):
    found = Tally()
    found.add(losses)
    return found


def test_agreement():
    goal, found = Goal("agreement", 0.9), tally(*[0.0] * 9, 1.0)
    assert found.quality(goal) == pytest.approx(0.9)
    assert found.meets(goal)
    assert found.interval(goal) == pytest.approx(wilson(9, 10))
    assert found.interval(goal, distinct=1) == pytest.approx(wilson(0.9, 1))


def test_cosine():
    goal, found = Goal("cosine", 0.98), tally(0.01, 0.03)
    assert found.quality(goal) == pytest.approx(0.98)
    assert found.meets(goal)
    low, high = found.interval(goal)
    assert low == pytest.approx(0.98 - 1.96 * 0.01 / 2**0.5, abs=1e-5)
    assert found.interval(goal, distinct=1) == (-1.0, 1.0)
    assert high <= 1


def test_top1_is_a_share_of_the_dense_models():
    goal, found = Goal("top1", 0.95, scale=0.8), tally(*[0.0] * 18, 1.0, 1.0)
    assert found.quality(goal) == pytest.approx(1 - 0.1 / 0.8)
    assert not found.meets(goal)
    found.add([-1.0, -1.0])
    assert found.quality(goal) == 1
    assert found.meets(goal)


def test_when_a_point_is_given_up():
    goal = Goal("agreement", 0.99)
    assert not tally(*[1.0] * 6).hopeless(goal, 667)
    assert tally(*[1.0] * 7).hopeless(goal, 667)
    assert tally(*[1.0] * 20, *[0.0] * 80).hopeless(Goal("agreement", 0.5), 10**6) is False
    assert tally(*[1.0] * 80, *[0.0] * 20).hopeless(Goal("agreement", 0.5), 10**6)
    # What is lost may be won again, so only chance decides.
    assert not tally(*[1.0] * 7).hopeless(Goal("top1", 0.99), 667)
    assert tally(*[1.0, 0.0] * 40).hopeless(Goal("top1", 0.99), 667)


@pytest.mark.parametrize("target", [1.5, 0, -1, math.nan, math.inf, True, "0.9", None])
def test_bad_targets(target):
    with pytest.raises(InputError, match=r"^target: .* is not a share"):
        check_goal("agreement", target)


def test_bad_metrics():
    with pytest.raises(InputError, match="metric: 'loss' is not one of agreement, cosine, top1"):
        check_goal("loss", 0.9)
