"""The one way to measure: calls interleaved in one run, medians and percentiles, one row type."""

import ctypes
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

WARM_UP_S, WARM_UP_LIMIT_S = 0.5, 4.0  # for every call: at least, and until it is steady at most; at least twice
STEADY, STEADY_CALLS = 0.05, 3  # by how much the median of so many calls may fall below that of those before them
SETTLE_S, SETTLE_LIMIT_S = 0.01, 0.2  # how long this process is watched for threads that run on, and at most
NOISY = 0.15  # of the median: a spread from which on single figures say little
MIN_ROUNDS, MAX_ROUNDS = 7, 300


@dataclass(frozen=True)
class Row:
    """One measured candidate: a model and what runs it; rates are images a second, times milliseconds a batch.

    None: not known, as of an ONNX file that says nothing of itself and comes without a reference.
    """

    model: str
    keep_rate: float | None
    runtime: str
    variant: str | None
    device: str
    dtype: str
    batch: int
    images_per_s: float
    p20_images_per_s: float
    p80_images_per_s: float
    p50_ms: float
    p99_ms: float
    gmacs: float | None  # multiply-accumulates in 10^9 of the graph as run, which papers call GFLOPs
    params: int | None
    peak_mib: float | None  # of its weights and what a call allocates at most
    max_logit_error: float | None
    top1_agreement: float | None
    baseline: str
    speedup: float


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, and what one call allocates at most, in MiB (None: this system does not tell)."""

    seconds: np.ndarray
    peak_mib: float | None

    def rates(self, batch: int) -> dict[str, float]:
        """The fields of a Row that follow from times."""
        p20, p50, p80, p99 = np.percentile(self.seconds, [20, 50, 80, 99])
        return {
            "images_per_s": float(batch / p50),
            "p20_images_per_s": float(batch / p80),
            "p80_images_per_s": float(batch / p20),
            "p50_ms": float(p50 * 1e3),
            "p99_ms": float(p99 * 1e3),
        }

    def speedup_over(self, other: "Timing") -> float:
        """Median of the ratios round by round: a machine that slows down slows both."""
        return float(np.median(other.seconds / self.seconds))

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, as a share of the median."""
        p20, p50, p80 = np.percentile(self.seconds, [20, 50, 80])
        return float((p80 - p20) / p50)


def noise(timings: Iterable[Timing]) -> str | None:
    """A line that says so if the machine was noisy: half of what was timed spreads by more than `NOISY`."""
    spread = float(np.median([timing.spread for timing in timings]))
    if spread <= NOISY:
        return None
    return (
        f"this machine is noisy: p20 and p80 of the time of a call are {spread:.0%} of its median apart; "
        "speed-ups, taken round by round, say more than the single figures"
    )


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
    warm_up: float = WARM_UP_S,
) -> dict[str, Timing]:
    """Time every call once a round, round after round, for about `seconds` after `warm_up` seconds of each.

    The order within a round is another in each, so that no call always follows the same one; on a CPU each begins when
    this process is idle.
    """
    for call in calls.values():
        _warm_up(call, device, warm_up)
    peaks = {name: _peak_mib(call, device) for name, call in calls.items()}
    names, chance = list(calls), random.Random(0)
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < MIN_ROUNDS or (time.perf_counter() - start < seconds and len(rounds) < MAX_ROUNDS):
        taken = {}
        for name in chance.sample(names, len(names)):
            _settle(device)
            taken[name] = _seconds(calls[name], device)
        rounds.append([taken[name] for name in names])
        progress(min(1.0, (time.perf_counter() - start) / max(seconds, 1e-9)))
    columns = np.array(rounds).T
    return {name: Timing(column, peaks[name]) for name, column in zip(names, columns, strict=True)}


def _warm_up(call: Callable[[], object], device: torch.device, seconds: float) -> None:
    """Call for `seconds`, and on until it gets no faster."""
    start, taken = time.perf_counter(), []
    while True:
        taken.append(_seconds(call, device))
        spent = time.perf_counter() - start
        if len(taken) >= 2 and spent >= seconds and (_steady(taken) or spent >= WARM_UP_LIMIT_S):
            return


def _steady(taken: Sequence[float]) -> bool:
    """Whether the last calls were no faster than those before them."""
    before, last = taken[-2 * STEADY_CALLS : -STEADY_CALLS], taken[-STEADY_CALLS:]
    return len(before) == STEADY_CALLS and bool(np.median(last) >= (1 - STEADY) * np.median(before))


def _settle(device: torch.device) -> None:
    """Wait until this process is idle, at most `SETTLE_LIMIT_S`.

    Thread pools spin after their work, which takes the cores from whatever comes next: seen with ONNX Runtime, 40 ms
    after a call, in which the engine ran at half its speed.
    """
    end = time.perf_counter() + SETTLE_LIMIT_S
    while device.type == "cpu" and time.perf_counter() < end:
        busy, start = time.process_time(), time.perf_counter()
        time.sleep(SETTLE_S)
        if time.process_time() - busy < 0.2 * (time.perf_counter() - start):
            return


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call; on CUDA until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most memory in use during a call, beyond what was before: allocated on CUDA, resident on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed goes back, or this one would take it unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        resident = _status_kib("VmRSS")
        call()
        return (_status_kib("VmHWM") - resident) / 1024
    except (OSError, AttributeError, LookupError):  # no Linux, or another C library
        return None


def _status_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise LookupError(name)
    return int(found[1])
