"""The part that all comparisons share: run all candidates on the same images, time them, fill the rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from dvit_infer.benchmark.load import busy_processes, check_load
from dvit_infer.benchmark.outcome import Outcome, PruningSpeedup
from dvit_infer.benchmark.timing import Row, Timing, interleave, noise
from dvit_infer.images.stream import running

Calls = dict[str, Callable[[], torch.Tensor]]


class Check(NamedTuple):
    """The check of a candidate's outputs, by what is known about the expected ones."""

    mismatch: str | None  # the error, if it is too large for the same function
    unchecked: bool = False  # these images cannot show whether it computes the same function
    max_logit_error: float | None = None
    top1_agreement: float | None = None


class BaseComparison(ABC):
    """The candidates that run one model; `baseline` is the one over which speed-ups are taken."""

    device: torch.device
    title: str  # the model, and the dtype of its candidates
    dtype_name: str
    baseline: str
    fixed_batch: int | None = None  # the only batch size that the model takes; None: any

    @property
    @abstractmethod
    def runs(self) -> str:
        """The runtimes in use, as one line."""

    @abstractmethod
    def images(self, batch: int) -> torch.Tensor:
        """Return the images on which a batch of that size is measured."""

    @abstractmethod
    def check_memory(self, batch: int) -> None:
        """Raise InputError if a batch would not fit in main memory."""

    @abstractmethod
    def _prepare(self, images: torch.Tensor) -> tuple[Calls, dict[str, Check]]:
        """Return the call of every candidate on the images, and the check of its outputs."""

    @abstractmethod
    def _row_fields(self, name: str, timing: Timing) -> dict[str, Any]:
        """Return the fields of a candidate's row that `measure` does not know."""

    @abstractmethod
    def _verdict(self, rows: list[Row], mismatches: list[str], unchecked: list[str]) -> str:
        """Return one line on whether all candidates compute the same function."""

    def _pruning_speedups(self, timings: Mapping[str, Timing], batch: int) -> list[PruningSpeedup]:
        return []

    def measure(
        self, batch: int, seconds: float, progress: Callable[[float], None] = lambda share: None, load: int = 0
    ) -> Outcome:
        """Time every candidate on the same images, interleaved, with `load` busy processes beside them.

        The busy processes run from the first warm-up to the last call; outputs are checked before.

        Raises:
            InputError: the batch does not fit in memory, or that many processes cannot be run.
        """
        check_load(load)
        self.check_memory(batch)
        with running(batch), torch.no_grad():
            calls, checks = self._prepare(self.images(batch))
            with busy_processes(load):
                timings = interleave(calls, self.device, seconds, progress)
        rows = [
            Row(
                device=self.device.type,
                batch=batch,
                max_logit_error=checks[name].max_logit_error,
                top1_agreement=checks[name].top1_agreement,
                baseline=self.baseline,
                speedup=timing.speedup_over(timings[self.baseline]),
                **{"dtype": self.dtype_name, **timing.rates(batch), **self._row_fields(name, timing)},
            )
            for name, timing in timings.items()
        ]
        mismatches = [f"{name}: {check.mismatch}" for name, check in checks.items() if check.mismatch]
        verdict = self._verdict(rows, mismatches, [name for name, check in checks.items() if check.unchecked])
        return Outcome(rows, self._pruning_speedups(timings, batch), mismatches, verdict, noise(timings.values(), load))
