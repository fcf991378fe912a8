"""Shared by the measuring scripts: incremental result files, jobs that may fail by themselves, a time limit."""

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
FIGURES = (*FIGURES, "max_difference", "top1_agreement", "speedup", "share")  # fields of a row shown in the log
OFTEN_S = 0.5  # minimum interval between writes of a file, except at the end of a job
Row = Mapping[str, Any]
Job = Callable[[], Iterable[Row]]


class Rows:
    """A growing result file, rewritten with every row.

    Args:
        path: the JSON file.
        add: keep the rows in the file, from an earlier part of the same run.
    """

    def __init__(self, path: Path, add: bool = False) -> None:
        self._path, self._environment, self._written = path, environment(), 0.0
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if add and path.exists() else []

    def add(self, row: Row) -> None:
        """Add a row; it is written now, with a later row, or by `flush`."""
        self.rows.append(row)
        if time.monotonic() - self._written > OFTEN_S:
            self.flush()

    def flush(self) -> None:
        write_json(self._path, {"environment": self._environment, "rows": self.rows})
        self._written = time.monotonic()


def shown(row: Row) -> str:
    """Format a row as one line: its names, then the figures."""
    words = [str(row[key]) for key in ("model", "op", "runtime", "variant") if row.get(key)]
    figures = [f"{key} {row[key]:.5g}" for key in FIGURES if row.get(key) is not None]
    return ", ".join([*words, *figures, *([f"FAILED: {row['failed']}"] if "failed" in row else [])])


class Part:
    """Runs jobs in order until the time is up; a failure affects only its own job."""

    def __init__(self, rows: Rows, device: torch.device, budget: float) -> None:
        self.rows, self.device, self.end = rows, device, time.monotonic() + budget

    def run(self, jobs: Iterable[tuple[str, Job]], show: Callable[[Row], str] = shown) -> int:
        """Add every job's rows as they are yielded; return the exit status, 1 if a job or a row failed."""
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
            except Exception:  # the other jobs still run
                traceback.print_exc()
                print(f"{name}: FAILED", flush=True)
                failed = True
                if not usable(self.device):
                    print("this process cannot use the GPU any more; it ends here and keeps its rows", flush=True)
                    break
            finally:
                self.rows.flush()
        return int(failed)


def usable(device: torch.device) -> bool:
    """Return whether the device is usable: after e.g. an illegal access, CUDA fails every later call of a process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def arguments(description: str, budget: float) -> argparse.ArgumentParser:
    """Return a parser with the options of every part of the suite."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten with every row")
    parser.add_argument("--add", action="store_true", help="keep the rows in the file")
    parser.add_argument("--budget", type=float, default=budget, help="seconds (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="run on the CPU with tiny sizes, to show that it runs")
    return parser


def device_for(dry: bool) -> torch.device:
    """Return the GPU; in a dry run the CPU, with timing reduced to a few calls."""
    if dry:
        timing.MIN_ROUNDS, timing.WARM_UP_LIMIT_S = 1, 0.0
        torch.set_num_threads(1)
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
