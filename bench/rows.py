"""What the measuring scripts share: rows written as they come, jobs that fail by themselves, a time to end."""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dvit_infer.benchmark import timing
from dvit_infer.benchmark.results import environment, write_json

FIGURES = ("batch", "images_per_s", "p50_ms", "us", "tflops", "tb_per_s", "max_error", "max_logit_error")
FIGURES = (*FIGURES, "max_difference", "top1_agreement", "speedup", "share")  # what a line of the log shows of a row
OFTEN_S = 0.5  # a file is written no more often, but at the end of a job
Row = Mapping[str, Any]
Job = Callable[[], Iterable[Row]]


class Rows:
    """A result file in the making, written again with every row.

    Args:
        path: of the JSON.
        add: keep the rows that the file has, of an earlier part of the same run.
    """

    def __init__(self, path: Path, add: bool = False) -> None:
        self._path, self._environment, self._written = path, environment(), 0.0
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if add and path.exists() else []

    def add(self, row: Row) -> None:
        """Write it at once, or with the next, or by `flush` where several come in one go."""
        self.rows.append(row)
        if time.monotonic() - self._written > OFTEN_S:
            self.flush()

    def flush(self) -> None:
        write_json(self._path, {"environment": self._environment, "rows": self.rows})
        self._written = time.monotonic()


def shown(row: Row) -> str:
    """One line: what was measured, then the figures."""
    words = [str(row[key]) for key in ("model", "op", "runtime", "variant") if row.get(key)]
    figures = [f"{key} {row[key]:.5g}" for key in FIGURES if row.get(key) is not None]
    return ", ".join([*words, *figures, *([f"FAILED: {row['failed']}"] if "failed" in row else [])])


class Part:
    """Runs jobs one after the other, each of which may fail alone, until the time is up."""

    def __init__(self, rows: Rows, device: torch.device, budget: float) -> None:
        self.rows, self.device, self.end = rows, device, time.monotonic() + budget

    def run(self, jobs: Iterable[tuple[str, Job]], show: Callable[[Row], str] = shown) -> int:
        """Add every job's rows as it yields them; returns the exit status, 1 if a job or a row failed."""
        failed = False
        for name, job in jobs:
            if time.monotonic() > self.end:
                print(f"{name}: NOT MEASURED, no time left", flush=True)
                continue
            print(f"{name}:", flush=True)
            try:
                for row in job():
                    self.rows.add(row)
                    failed |= "failed" in row
                    if text := show(row):
                        print(f"  {text}", flush=True)
            except Exception:  # the other jobs are still worth having
                traceback.print_exc()
                print(f"{name}: FAILED", flush=True)
                failed = True
                if not usable(self.device):
                    print("this process cannot use the GPU any more: it ends here, with what it has", flush=True)
                    break
            finally:
                self.rows.flush()
        return int(failed)


def usable(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access, say, CUDA fails every later call of a process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def arguments(description: str, budget: float) -> argparse.ArgumentParser:
    """The options that every part of the suite takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON, written again with every row")
    parser.add_argument("--add", action="store_true", help="to the rows that the file has")
    parser.add_argument("--budget", type=float, default=budget, help="seconds (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="on the CPU with tiny sizes: shows that it runs")
    return parser


def device_for(dry: bool) -> torch.device:
    """The GPU; in a dry run the CPU, on which a call or two are enough."""
    if dry:
        timing.MIN_ROUNDS, timing.WARM_UP_LIMIT_S = 1, 0.0
        torch.set_num_threads(1)
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
