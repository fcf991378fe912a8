"""Measuring: every call once a round, ratios round by round, an environment, a file whole or not at all."""

import json
import sys

import numpy as np
import pytest
import torch

from dvit_infer.files import whole_file
from dvit_infer.timing import MIN_ROUNDS, Timing, _peak_mib, environment, interleave, machine_name, write_json


def test_calls_take_turns():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    shares: list[float] = []
    timings = interleave(calls, torch.device("cpu"), 0.0, shares.append)
    rounds = order[-3 * MIN_ROUNDS :]
    firsts = rounds[::3]
    assert all(sorted(rounds[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(rounds), 3))
    assert set(firsts) == {"a", "b", "c"}
    assert all(len(t.seconds) == MIN_ROUNDS for t in timings.values())
    assert len(shares) == MIN_ROUNDS


def test_rates_and_ratios_follow_from_times():
    slow, fast = Timing(np.array([0.4, 0.2, 0.4]), None), Timing(np.array([0.2, 0.1, 0.1]), 5.0)
    assert fast.speedup_over(slow) == pytest.approx(2.0)
    rates = slow.rates(8)
    assert rates["images_per_s"] == pytest.approx(20.0)
    assert rates["p50_ms"] == pytest.approx(400.0)
    assert rates["p20_images_per_s"] <= rates["images_per_s"] <= rates["p80_images_per_s"]


def test_environment_is_complete():
    found = environment()
    assert found.keys() == {"machine", "gpu", "driver", "torch", "triton", "commit", "date"}
    assert found["torch"] == torch.__version__
    assert machine_name("NVIDIA H200") == "h200"


def test_files_are_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": [1, float("nan")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "b", "out") as part:
        part.write_text(f"{1 / 0}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_that_of_a_call_after_others_too():
    weights = torch.randn(1536, 384)

    def call(rows: int) -> torch.Tensor:
        return torch.nn.functional.gelu(torch.randn(rows, 384) @ weights.T)

    for rows in (8 * 197, 64 * 197):
        for _ in range(3):
            call(rows)
        mib = rows * 1536 * 4 / 2**20
        peak = _peak_mib(lambda rows=rows: call(rows), torch.device("cpu"))
        assert peak is None or mib < peak < 4 * mib
