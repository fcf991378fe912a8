"""The measurement method: calls interleaved in one run, medians and percentiles, and the row type."""

import ctypes
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dvit_infer.benchmark.load import describe_load
from dvit_infer.utils.devices import timed

WARM_UP_S, WARM_UP_LIMIT_S = 0.5, 4.0  # warm-up of a call: minimum, and maximum if it is not steady; at least 2 calls
STEADY, STEADY_CALLS = 0.05, 3  # steady: the median of the last 3 calls is at most 5% below that of the 3 before
SETTLE_S, SETTLE_LIMIT_S = 0.01, 0.2  # interval in which this process must be idle, and the longest wait for it
NOISY = 0.15  # spread, as a share of the median, above which single figures are unreliable
MIN_ROUNDS, MAX_ROUNDS = 7, 300


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured candidate: a model and its runtime. Rates are images per second, times milliseconds per batch.

    None means unknown, e.g. for an ONNX file without metadata and without a reference.
    """

    model: str
    keep_rate: float | None
    runtime: str
    variant: str | None = None
    device: str
    dtype: str
    batch: int
    images_per_s: float
    p20_images_per_s: float
    p80_images_per_s: float
    p50_ms: float
    p99_ms: float
    gmacs: float | None = None  # GMACs of the graph as run, which papers call GFLOPs
    params: int | None = None
    peak_mib: float | None = None  # weights, and the peak allocation of a call
    max_logit_error: float | None = None
    top1_agreement: float | None = None
    baseline: str
    speedup: float


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, and the peak allocation of one call in MiB (None: not available on this system)."""

    seconds: np.ndarray
    peak_mib: float | None

    def rates(self, batch: int) -> dict[str, float]:
        """Return the fields of a Row that follow from times."""
        p20, p50, p80, p99 = np.percentile(self.seconds, [20, 50, 80, 99])
        return {
            "images_per_s": float(batch / p50),
            "p20_images_per_s": float(batch / p80),
            "p80_images_per_s": float(batch / p20),
            "p50_ms": float(p50 * 1e3),
            "p99_ms": float(p99 * 1e3),
        }

    def speedup_over(self, other: "Timing") -> float:
        """Return the median of the per-round ratios: a machine that slows down slows both calls."""
        return float(np.median(other.seconds / self.seconds))

    @property
    def spread(self) -> float:
        """The distance between the 20th and the 80th percentile, as a share of the median."""
        p20, p50, p80 = np.percentile(self.seconds, [20, 50, 80])
        return float((p80 - p20) / p50)


def noise(timings: Iterable[Timing], load: int = 0) -> str | None:
    """Return a warning if the machine was noisy: the median spread of the timings exceeds `NOISY`.

    Beside `load` busy processes it is meant to be, and the line only says by how much.
    """
    spread = float(np.median([timing.spread for timing in timings]))
    if spread <= NOISY:
        return None
    return (
        f"{describe_load(load) if load else 'this machine is noisy'}: "
        f"p20 and p80 of the time of a call differ by {spread:.0%} of its median; "
        "speed-ups, taken per round, are more reliable than single figures"
    )


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
    warm_up: float = WARM_UP_S,
) -> dict[str, Timing]:
    """Time every call once per round, for about `seconds`, after warming up each for `warm_up` seconds.

    Every round has a new random order, so that no call always follows the same one. On a CPU each call starts when this
    process is idle.
    """
    for call in calls.values():
        _warm_up(call, device, warm_up)
    peaks = {name: _peak_mib(call, device) for name, call in calls.items()}
    names, chance = list(calls), random.Random(0)
    times: list[list[float]] = []
    for _ in rounds(seconds, progress):
        taken = {}
        for name in chance.sample(names, len(names)):
            _settle(device)
            taken[name] = timed(calls[name], device)[1]
        times.append([taken[name] for name in names])
    columns = np.array(times).T
    return {name: Timing(column, peaks[name]) for name, column in zip(names, columns, strict=True)}


def rounds(seconds: float, progress: Callable[[float], None]) -> Iterator[int]:
    """Yield the number of each round for about `seconds`, at most `MAX_ROUNDS`; report the share done after each."""
    start, done = time.perf_counter(), 0
    while done < MIN_ROUNDS or (time.perf_counter() - start < seconds and done < MAX_ROUNDS):
        yield done
        done += 1
        progress(min(1.0, (time.perf_counter() - start) / max(seconds, 1e-9)))


def _warm_up(call: Callable[[], object], device: torch.device, seconds: float) -> None:
    """Repeat the call for `seconds`, then until it gets no faster."""
    start, taken = time.perf_counter(), []
    while True:
        taken.append(timed(call, device)[1])
        spent = time.perf_counter() - start
        if len(taken) >= 2 and spent >= seconds and (_steady(taken) or spent >= WARM_UP_LIMIT_S):
            return


def _steady(taken: Sequence[float]) -> bool:
    """Return whether the last calls were no faster than those before them."""
    before, last = taken[-2 * STEADY_CALLS : -STEADY_CALLS], taken[-STEADY_CALLS:]
    return len(before) == STEADY_CALLS and bool(np.median(last) >= (1 - STEADY) * np.median(before))


def _settle(device: torch.device) -> None:
    """Wait until this process is idle, at most `SETTLE_LIMIT_S`.

    Thread pools spin after their work and so slow down the next call. ONNX Runtime's pool spins for 40 ms after a call,
    during which the engine ran at half its speed.
    """
    end = time.perf_counter() + SETTLE_LIMIT_S
    while device.type == "cpu" and time.perf_counter() < end:
        busy, start = time.process_time(), time.perf_counter()
        time.sleep(SETTLE_S)
        if time.process_time() - busy < 0.2 * (time.perf_counter() - start):
            return


def _peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the peak memory of a call above the level before: allocated on CUDA, resident on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        call()
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return memory that earlier calls freed, or reusing it would go unnoticed
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        resident = _status_kib("VmRSS")
        call()
        return (_status_kib("VmHWM") - resident) / 1024
    except (OSError, AttributeError, LookupError):  # not Linux, or another C library
        return None


def _status_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise LookupError(name)
    return int(found[1])
