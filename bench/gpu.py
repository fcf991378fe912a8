"""Run the GPU suite, most informative parts first: `make gpu BUDGET=540 ONLY=smoke,models`.

    PYTHONPATH=.:kernels python bench/gpu.py [--budget 540] [--only smoke,models] [--out FOLDER] [--dry]

Each part is a separate process, so that a GPU fault ends only that part, and gets its share of the remaining seconds;
rows measured before its time is up are kept. Results are at most eight files in FOLDER (default: $OUT, else
bench/results/<gpu>): JSON, and gpu.txt with everything printed; files of the parts that run are replaced. Without .git,
DVIT_COMMIT names the commit. A dry run runs all parts with tiny sizes on a CPU, into build/gpu-dry. Exit status 1: a
part failed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import children
import gpu_tests
from children import CUT_OFF, ROOT
from gpu_checks import check_folder, check_machine
from kernel_cache import unpack

from dvit_infer.benchmark.results import environment
from dvit_infer.cli.common import Parser, run
from dvit_infer.errors import InputError
from dvit_infer.utils.partial import remove_left_over

BUDGET = 540.0
# In order, with the seconds of each in a run of BUDGET; unused seconds go to later parts. The last two get the
# remaining time, and run only if it is enough.
PARTS = {
    "smoke": 40,
    "models": 65,
    "capture": 50,
    "tests": 120,
    "tune": 110,
    "choices": 40,
    "machine": 40,
    "prune_tokens": 25,
    "lvvit": 40,
    "second": 120,
    "more": 120,
    "routing": 40,
    "native": 2,
    "sanitizer": 2,
}
ASKED_FOR = ("second", "more", "routing")  # parts that run only if --only names them
LEAST = {"native": 45, "sanitizer": 30}  # seconds below which a part is not started; else LEAST_S
LEAST_S = 4.0
MARGIN_S = 4.0  # a script starts nothing in its last seconds
# Scripts that run several parts into one file; otherwise script and file have the name of the part.
FILES = {"capture": "models", "choices": "models", "lvvit": "models", "more": "models"}
BY_TESTS: dict[str, Callable[[float, Callable[[str], None], bool], int]] = {
    "tests": gpu_tests.tests,
    "native": gpu_tests.native_tests,
    "sanitizer": gpu_tests.sanitizer,
}


class Log:
    """Prints lines, and also writes them to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self._file.write(text + "\n")
        self._file.flush()


def command(part: str, out: Path, seconds: float, dry: bool) -> list[str]:
    """Return the script of a part, with its options."""
    script = FILES.get(part, part)
    options = {
        "models": ["--part", part],
        "tune": ["--choices", str(out / "choices.json")],
        "prune_tokens": ["--dtype", "bfloat16"],
    }
    chosen = [*options.get(script, []), *(["--choices", str(out / "choices.json")] if part == "choices" else [])]
    common = ["--out", str(out / results_of(part)), "--add", "--budget", f"{max(1.0, seconds - MARGIN_S):.1f}"]
    path = ROOT / "bench" / f"{script}.py"
    return [sys.executable, str(path), *common, *chosen, *(["--dry"] if dry else [])]


def results_of(part: str) -> str:
    return f"{FILES.get(part, part)}.json"


def run_parts(parts: Sequence[str], out: Path, end: float, dry: bool, log: Log) -> dict[str, list[str]]:
    """Run the parts in order; return those that failed, were cut off, or had no time."""
    found: dict[str, list[str]] = {"failed": [], "cut off": [], "not run": []}
    for place, part in enumerate(parts):
        left = end - time.monotonic()
        weights = [PARTS[one] for one in parts[place:]]
        seconds = left * weights[0] / sum(weights)
        if seconds < LEAST_S or left < LEAST.get(part, LEAST_S):
            log(f"== {part}: NOT RUN, no time left")
            found["not run"].append(part)
            continue
        log(f"== {part}, at most {seconds:.0f} s")
        start = time.monotonic()
        if part in BY_TESTS:
            status = BY_TESTS[part](seconds, log, dry)
        else:
            status = children.run(command(part, out, seconds, dry), seconds, log, children.DRY if dry else None)
        outcome = {0: "done", CUT_OFF: "CUT OFF; what it had measured stays"}.get(status, f"FAILED, status {status}")
        log(f"== {part}: {outcome}, {time.monotonic() - start:.0f} s")
        if status != 0:
            found["cut off" if status == CUT_OFF else "failed"].append(part)
        remove_left_over(out)  # partial files of a child that was ended while writing
    return found


def suite(given: argparse.Namespace) -> int:
    start = time.monotonic()
    parts = parts_of(given.only)
    budget = seconds_of(given.budget)
    if not given.dry:
        check_machine()
    where = environment()
    usual = ROOT / "build" / "gpu-dry" if given.dry else ROOT / "bench" / "results" / str(where["machine"])
    out = check_folder(given.out or (not given.dry and os.environ.get("OUT")) or usual)
    cache = unpack() if not given.dry else "compiled kernels: a dry run needs none"
    log = Log(out / "gpu.txt")
    log(cache)
    log(json.dumps(where))
    for part in parts:  # remove results of an earlier run
        for name in [results_of(part), *(["choices.json"] if part == "tune" else [])]:
            (out / name).unlink(missing_ok=True)
    if not given.dry:
        log(card())
    found = run_parts(parts, out, start + budget, given.dry, log)
    for what, names in found.items():
        if names:
            log(f"{what}: {', '.join(names)}")
    log(f"{'some parts FAILED' if found['failed'] else 'no part failed'}, {time.monotonic() - start:.0f} s in all")
    return 1 if found["failed"] else 0


def parts_of(only: str | None) -> list[str]:
    """Return the parts to run, in the suite's order."""
    if only is None:
        return [part for part in PARTS if part not in ASKED_FOR]
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in PARTS:
            raise InputError(f"ONLY: {name!r} is not a part of the suite; these are: {', '.join(PARTS)}")
    return [part for part in PARTS if part in names]


def seconds_of(budget: str) -> float:
    try:
        seconds = float(budget)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(
            f"BUDGET: {budget!r} is not a number of seconds; more than 0 are needed, {BUDGET:.0f} are usual"
        )
    return seconds


def card() -> str:
    """Return clocks, power and temperature as found; none is changed."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.used"
    asked: Any = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default=f"{BUDGET:.0f}", help="seconds for all (default: %(default)s)")
    parser.add_argument("--only", help=f"parts, of {','.join(PARTS)} (default: all but {' and '.join(ASKED_FOR)})")
    parser.add_argument("--out", type=Path, help="folder for results")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, to show that it runs")
    return run(parser, suite, argv)


if __name__ == "__main__":
    sys.exit(main())
