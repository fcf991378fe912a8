"""Measuring: every call once a round, ratios round by round, steady before and settled between."""

import itertools
import os

import numpy as np
import pytest
import torch

from dvit_infer.benchmark import timing
from dvit_infer.benchmark.timing import MIN_ROUNDS, Timing, _peak_mib, interleave, noise


@pytest.mark.slow
def test_calls_take_turns():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    shares: list[float] = []
    timings = interleave(calls, torch.device("cpu"), 0.0, shares.append)
    rounds = order[-3 * MIN_ROUNDS :]
    assert all(sorted(rounds[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(rounds), 3))
    followed = set(itertools.pairwise(rounds))
    assert followed >= {("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")}
    assert all(len(t.seconds) == MIN_ROUNDS for t in timings.values())
    assert len(shares) == MIN_ROUNDS


def test_rates_and_ratios_follow_from_times():
    slow, fast = Timing(np.array([0.4, 0.2, 0.4]), None), Timing(np.array([0.2, 0.1, 0.1]), 5.0)
    assert fast.speedup_over(slow) == pytest.approx(2.0)
    rates = slow.rates(8)
    assert rates["images_per_s"] == pytest.approx(20.0)
    assert rates["p50_ms"] == pytest.approx(400.0)
    assert rates["p20_images_per_s"] <= rates["images_per_s"] <= rates["p80_images_per_s"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory is read from /proc")
def test_peak_memory_is_that_of_a_call_after_others_too():
    weights = torch.randn(1536, 384)

    def call(rows: int) -> torch.Tensor:
        return torch.nn.functional.gelu(torch.randn(rows, 384) @ weights.T)

    for rows in (8 * 197, 64 * 197):
        for _ in range(3):
            call(rows)
        mib = rows * 1536 * 4 / 2**20
        peak = _peak_mib(lambda rows=rows: call(rows), torch.device("cpu"))
        assert peak is not None
        assert mib < peak < 4 * mib


def test_warming_up_goes_on_until_it_gets_no_faster(monkeypatch):
    falling = iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, *[0.3] * 100])
    taken: list[float] = []
    monkeypatch.setattr(timing, "timed", lambda call, device: (None, taken.append(next(falling)) or taken[-1]))
    timing._warm_up(lambda: None, torch.device("cpu"), 0.0)
    assert timing._steady(taken)
    assert not any(timing._steady(taken[:n]) for n in range(len(taken)))
    assert taken[-1] == 0.3


class Clock:
    """Stands for `time` in a process whose threads spin for so many seconds, as thread pools do after a call."""

    def __init__(self, spinning: float) -> None:
        self.now = self.used = 0.0
        self.spinning = spinning

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used

    def sleep(self, seconds: float) -> None:
        spun = min(seconds, self.spinning)
        self.now, self.used, self.spinning = self.now + seconds, self.used + spun, self.spinning - spun


@pytest.mark.parametrize(("spinning", "waited"), [(0.0, 0.01), (0.035, 0.05), (9.0, 0.2)])
def test_a_call_begins_when_this_process_is_idle(spinning, waited, monkeypatch):
    """And one that never is idle is not waited for for ever."""
    monkeypatch.setattr(timing, "time", clock := Clock(spinning))
    timing._settle(torch.device("cpu"))
    assert clock.now == pytest.approx(waited, abs=1e-6)


def test_noise_is_said():
    quiet, noisy = Timing(np.array([1.0, 1.01, 1.02] * 9), None), Timing(np.array([1.0, 1.3, 1.6] * 9), None)
    assert noise([quiet, quiet, noisy]) is None
    assert "noisy" in noise([quiet, noisy, noisy])
