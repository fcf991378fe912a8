"""Shared by the benchmarks: device and dtype, timing with accuracy, and rows, written as a result file.

`make bench` runs them; every run adds a file to bench/results/<machine>/ for bench/compare.py.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.benchmark.timing import Timing

Call = Callable[[], Any]
Timed = Callable[..., None]
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
}  # relative to the largest expected value; wrong outputs are not timed


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def batch(device: torch.device) -> int:
    return 256 if device.type == "cuda" else 8


@pytest.fixture
def timed(benchmark: Any, device: torch.device, dtype: torch.dtype) -> Timed:
    """Time a call whose output is correct; its row includes the error."""

    def measure(call: Call, right: torch.Tensor, group: str, **row: Any) -> None:
        def until_done() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        with torch.no_grad():
            found = call()
            answer = (found[0] if isinstance(found, tuple) else found).float()
            error = (answer - right).abs().max().item()
            assert error <= TOLERANCE[dtype] * right.abs().max().item()
            benchmark.group = group
            benchmark.extra_info.update(row, dtype=str(dtype).removeprefix("torch."), max_error=error)
            benchmark(until_done)

    return measure


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Iterable[Any], output_json: dict[str, Any]) -> None:
    """Write rows in the project's schema beside pytest-benchmark's file."""
    where = environment()
    found = [(bench.extra_info, np.array(bench.stats.data)) for bench in benchmarks]
    rows = [(_op_row if "op" in info else _model_row)(info, seconds) for info, seconds in found]
    name = re.sub(r"[:-]", "", f"{where['date']}") + (f"-{where['commit'][:7]}" if where["commit"] else "")
    out = Path(__file__).parent.parent / "results" / str(where["machine"]) / f"bench-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"environment": where, "rows": rows})
    config.get_terminal_writer().line(f"wrote {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


def _op_row(info: dict[str, Any], seconds: np.ndarray) -> dict[str, Any]:
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]) * 1e6
    keys = {key: info[key] for key in ("op", "runtime", "dtype", "batch", "shape")}
    return keys | {"us": p50, "p20_us": p20, "p80_us": p80, "max_error": info["max_error"]}


def _model_row(info: dict[str, Any], seconds: np.ndarray) -> dict[str, Any]:
    keys = {key: info[key] for key in ("model", "keep_rate", "runtime", "variant", "device", "dtype", "batch")}
    after = {key: info[key] for key in ("gmacs", "params", "peak_mib")}
    error = {"max_logit_error": info["max_error"], "top1_agreement": info["top1_agreement"]}
    # pytest-benchmark does not interleave, so ratios of its times are not comparable with dvit-bench's.
    return keys | Timing(seconds, None).rates(info["batch"]) | after | error | {"baseline": None, "speedup": None}
