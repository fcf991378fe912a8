"""The outcome of a comparison: rows, speed-ups, and whether all candidates compute the same function."""

from dataclasses import dataclass

from dvit_infer.benchmark.timing import Row


@dataclass(frozen=True)
class PruningSpeedup:
    """The speed-up of pruning, or merging, at one keep rate over the dense engine in the same run, and its ceiling."""

    keep_rate: float
    num_keep: tuple[int, ...]
    gmacs: float
    images_per_s: float
    speedup: float
    ceiling: float  # ratio of the MACs of the two graphs as run
    merges: bool = False

    def __str__(self) -> str:
        what = "merging" if self.merges else "pruned"
        return (
            f"{what} over dense engine: {self.speedup:.3f} x of the {self.ceiling:.3f} x that the MACs of the two "
            f"graphs as run allow: {self.speedup / self.ceiling:.1%} realised"
        )


@dataclass(frozen=True)
class Outcome:
    """The measurements at one batch size.

    Attributes:
        rows: one for each candidate.
        pruning_speedups: one for each keep rate of the engine, if the dense engine ran too.
        mismatches: the candidates that compute another function, each with its error. Any makes the check fail.
        verdict: one line on whether all candidates compute the same function.
        noise: a warning if the machine was noisy.
    """

    rows: list[Row]
    pruning_speedups: list[PruningSpeedup]
    mismatches: list[str]
    verdict: str
    noise: str | None
