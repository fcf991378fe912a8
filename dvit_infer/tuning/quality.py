"""Quality: how much of the dense model's answers a reduction keeps, as a mean of losses image by image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dvit_infer.errors import InputError
from dvit_infer.tuning.interval import Z95, of_mean, wilson

Metric = Literal["agreement", "cosine", "top1"]
METRICS: tuple[Metric, ...] = ("agreement", "cosine", "top1")
SURE = 3.0  # standard deviations at which a point is given up before it has seen all images
LEAST = 32  # images before that


@dataclass(frozen=True)
class Goal:
    """The quality to keep. Quality is 1 - mean loss / scale.

    Attributes:
        metric: what the loss of an image is. "agreement": 1 if the class differs from the dense model's, else 0.
            "cosine": 1 - the cosine of its features with the dense model's. "top1": 1 if only the dense model is
            right, -1 if only the reduced one is.
        target: the least quality.
        scale: for top1 the dense model's own top-1, so that quality is a share of it; else 1.
    """

    metric: Metric
    target: float
    scale: float = 1.0

    @property
    def allowed(self) -> float:
        """The mean loss that still meets the target."""
        return (1 - self.target) * self.scale


def check_goal(metric: str, target: object) -> Goal:
    """Return the goal.

    Raises:
        InputError: there is no such metric, or no quality can be the target.
    """
    known: Metric | None = next((one for one in METRICS if one == metric), None)
    if known is None:
        raise InputError(f"metric: {str(metric)[:40]!r} is not one of {', '.join(METRICS)}")
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target <= 1:
        raise InputError(f"target: {str(target)[:40]} is not a share such as 0.99; above 0, at most 1, is expected")
    return Goal(known, float(target))


@dataclass
class Tally:
    """The losses of a point on the images that it has seen; `complete`: on all of those that are searched."""

    images: int = 0
    loss: float = 0.0
    squares: float = 0.0
    complete: bool = False

    def add(self, losses: Sequence[float]) -> None:
        self.images += len(losses)
        self.loss += math.fsum(losses)
        self.squares += math.fsum(loss * loss for loss in losses)

    def quality(self, goal: Goal) -> float:
        return 1 - self.loss / max(1, self.images) / goal.scale

    def meets(self, goal: Goal) -> bool:
        # Losses are whole or float32: what rounding leaves is far below one image's.
        return self.loss <= goal.allowed * self.images + 1e-9

    def interval(self, goal: Goal, distinct: int | None = None, z: float = Z95) -> tuple[float, float]:
        """Return the confidence interval of the quality; images of which only some are distinct count as those."""
        count = self.images if distinct is None else min(distinct, self.images)
        mean = self.loss / max(1, self.images)
        if goal.metric == "agreement":
            return wilson((1 - mean) * count, count, z)
        deviation = math.sqrt(max(0.0, self.squares / max(1, self.images) - mean * mean))
        low, high = of_mean(mean, deviation, count, z)
        most = 1.0 if goal.metric == "cosine" else math.inf
        least = -1.0 if goal.metric == "cosine" else 0.0
        return max(least, 1 - high / goal.scale), min(most, 1 - low / goal.scale)

    def hopeless(self, goal: Goal, of: int) -> bool:
        """Return whether the target is missed whatever the rest of the `of` images do, or all but certainly."""
        if goal.metric != "top1" and self.loss > goal.allowed * of + 1e-9:  # no image can make up for another
            return True
        return self.images >= LEAST and self.interval(goal, z=SURE)[1] < goal.target
