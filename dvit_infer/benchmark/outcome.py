"""The outcome of a comparison: rows, speed-ups, and whether all candidates compute the same function."""

from dataclasses import dataclass

from dvit_infer.benchmark.timing import Row


@dataclass(frozen=True)
class PruningSpeedup:
    """The speed-up of pruning at one keep rate over the dense engine in the same run, and its ceiling."""

    keep_rate: float
    num_keep: tuple[int, ...]
    gmacs: float
    images_per_s: float
    speedup: float
    ceiling: float  # ratio of the MACs of the two graphs as run

    def __str__(self) -> str:
        return (
            f"pruned over dense engine: {self.speedup:.3f} x of the {self.ceiling:.3f} x that the MACs of the two "
            f"graphs as run allow: {self.speedup / self.ceiling:.1%} realised"
        )


@dataclass(frozen=True)
class Outcome:
    """The measurements at one batch size.

    Attributes:
        rows: one for each candidate.
        pruning_speedups: one for each keep rate of the engine, if the dense engine ran too.
        mismatches: the candidates that compute another function, each with its error. Any makes the check fail.
        unchecked: the candidates for which these images cannot show whether they compute the same function.
        noise: a warning if the machine was noisy.
    """

    rows: list[Row]
    pruning_speedups: list[PruningSpeedup]
    mismatches: list[str]
    unchecked: list[str]
    noise: str | None

    @property
    def verdict(self) -> str:
        if self.mismatches:
            return f"NOT the same function as the reference: {'; '.join(self.mismatches)}"
        if self.unchecked:
            names = ", ".join(self.unchecked)
            return f"not checked whether {names} computes the same function: in no image is the choice of tokens clear"
        exact = [row for row in self.rows if row.variant != "int8"]
        largest = max(row.max_logit_error for row in exact if row.max_logit_error is not None)
        reduced = "" if self.rows[0].dtype == "float32" else f", near ties in {self.rows[0].dtype} included"
        but = "" if len(exact) == len(self.rows) else " but int8, which is approximate,"
        return f"all candidates{but} compute the same function: largest error of a logit {largest:.1e}{reduced}"
