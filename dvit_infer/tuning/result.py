"""The result of a search: every point, the chosen one, and what was won."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dvit_infer.benchmark.timing import Row
from dvit_infer.engine import Engine
from dvit_infer.tuning.points import keywords_of
from dvit_infer.tuning.quality import Goal, Metric

_KEEPS = {
    "agreement": "{:.2%} of its answers",
    "cosine": "features at a cosine of {:.4f} with its own, on average,",
    "top1": "{:.2%} of its top-1 accuracy",
}


@dataclass(frozen=True)
class TunedPoint:
    """A point that was searched.

    Attributes:
        name: the options of a command that give it.
        label: its reduction, as in rows.
        method, settings: the method, and what it was told, by the names of `convert`'s arguments.
        macs: MACs as a share of the dense model's.
        quality, low, high: on the searched images that it has seen, with the 95% confidence interval.
        images: how many these are; points that cannot meet the target see fewer.
        meets: whether it meets the target on all of them, and every gentler point of its family that was searched does.
        speedup: over the dense model: measured beside it, else predicted from MACs and one measurement of its family.
        images_per_s: measured, or None.
    """

    name: str
    label: str
    method: str
    settings: Mapping[str, Any]
    macs: float
    quality: float
    low: float
    high: float
    images: int
    meets: bool
    speedup: float
    images_per_s: float | None = None

    @property
    def title(self) -> str:
        """Its reduction, and the blocks in which that happens if they are chosen."""
        blocks = self.settings.get("prune_at", ())
        named = f", block{'s' * (len(blocks) > 1)} {','.join(map(str, blocks))}" if blocks else ""
        return f"{self.label}{named}"

    @property
    def measured(self) -> bool:
        return self.images_per_s is not None


@dataclass(frozen=True)
class HeldBack:
    """The quality of the chosen point on images that no search has seen.

    Attributes:
        quality, low, high: with the 95% confidence interval.
        images: how many these are.
        distinct: how many of them differ by more than noise; the interval counts only those.
        top1, dense_top1: in percent, where classes are known.
    """

    quality: float
    low: float
    high: float
    images: int
    distinct: int
    top1: float | None = None
    dense_top1: float | None = None


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found; `str()` is one line.

    Attributes:
        engine: the model with the chosen reduction, as it was measured: the fastest that meets the target, or, where
            none does (`met` is False), the one that comes nearest to it.
        met: whether it meets the target: on the searched images, and the images held back do not rule that out.
        chosen: its point.
        held_back: its quality on the images held back.
        speedup: over the dense model, in one interleaved run.
        images_per_s: in the same run.
        dense_images_per_s: of the dense model, likewise.
        batch: images at a time in it.
        searched: how many images were searched.
        points: all that were searched, fewest MACs first.
        pareto: those of them to which no other is superior in both quality and speed, fastest first.
        rows: of a result file: the dense model and the points that were timed.
        finished: whether time was enough for the whole search.
        warnings: one line each.
    """

    engine: Engine
    goal: Goal
    met: bool
    chosen: TunedPoint
    held_back: HeldBack
    speedup: float
    images_per_s: float
    dense_images_per_s: float
    batch: int
    searched: int
    points: tuple[TunedPoint, ...]
    rows: tuple[Row, ...]
    finished: bool
    warnings: tuple[str, ...] = ()

    @property
    def target(self) -> float:
        """The quality to keep."""
        return self.goal.target

    @property
    def metric(self) -> Metric:
        """The measure of quality: "agreement", "cosine" or "top1"."""
        return self.goal.metric

    @property
    def pareto(self) -> tuple[TunedPoint, ...]:
        return pareto(self.points)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `convert` that give the chosen reduction."""
        return keywords_of(self.chosen.method, self.chosen.settings)

    def __str__(self) -> str:
        held = self.held_back
        low, high = (f"{bound:.4f}" if self.metric == "cosine" else f"{bound:.1%}" for bound in (held.low, held.high))
        keeps = _KEEPS[self.metric].format(held.quality)
        speed = f"{self.speedup:.2f} x the speed of the dense model ({self.images_per_s:,.1f} images/s, "
        speed += f"{self.dense_images_per_s:,.1f} dense; batch {self.batch})"
        line = f"{self.chosen.title}: {speed}, keeps {keeps} on {held.images} images held back (95%: {low} to {high})"
        if self.met:
            return line
        return f"no reduction meets the target of {self.target:g}; the nearest is {line}"

    def content(self) -> dict[str, Any]:
        """Return the part of a result file that describes the search."""
        return {
            "metric": self.metric,
            "target": self.target,
            "met": self.met,
            "finished": self.finished,
            "chosen": asdict(self.chosen),
            "held_back": asdict(self.held_back),
            "speedup": self.speedup,
            "images_per_s": self.images_per_s,
            "dense_images_per_s": self.dense_images_per_s,
            "batch": self.batch,
            "searched": self.searched,
            "won": str(self),
            "pareto": [point.name for point in self.pareto],
            "points": [asdict(point) for point in self.points],
            "warnings": list(self.warnings),
        }


def pareto(points: Sequence[TunedPoint]) -> tuple[TunedPoint, ...]:
    """Return the points to which no other is superior in both quality and speed, fastest first.

    Points that left the search early count with the quality that they had then.
    """
    front: list[TunedPoint] = []
    for point in sorted(points, key=lambda p: (-p.speedup, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return tuple(front)
