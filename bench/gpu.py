"""The suite for a GPU: its tests, then what is measured; `make gpu` runs it.

    PYTHONPATH=.:kernels python bench/gpu.py [--out FOLDER] [--only tests,models] [--budget 570]

Each part is a process of its own, so that one that fails leaves the others to run. Results are JSON files and a text
file of everything printed, in FOLDER (default: $OUT, else bench/results/<gpu>). Exit status 1: a part failed.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dvit_infer.benchmark.results import environment, machine_name, write_json
from dvit_infer.errors import InputError
from dvit_infer.ops import native

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
PARTS = ("tests", "tune", "models", "machine", "prune_tokens", "sanitizer")
WITH_GPU_TESTS = re.compile(r"mark\.gpu|WHERE|def test_\w+\([^)]*\bdevice\b")
NATIVE_TESTS = ROOT / "tests" / "test_native.py"
SMALL, SMALL_NATIVE = "(neighbours or strides) and float16", "strides"  # what pytest selects for compute-sanitizer
AT_ONCE = 6  # test files at a time: most of their time goes into compiling
# Shares of the budget; what a part leaves goes to those after it.
SHARE = {"tests": 0.35, "tune": 0.3, "models": 0.75, "machine": 0.4, "prune_tokens": 0.5, "sanitizer": 1.0}


class Log:
    """Prints, and keeps what was printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")


def process(command: list[str], seconds: float) -> tuple[int, str, float]:
    """Exit status (124: it took too long), output, seconds."""
    start = time.monotonic()
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, seconds),
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, (error.stdout or b"")
    return status, output.decode(errors="replace"), time.monotonic() - start


def test_files() -> list[Path]:
    return sorted(f for f in (ROOT / "tests").glob("test_*.py") if WITH_GPU_TESTS.search(f.read_text()))


def tests(out: Path, seconds: float, log: Log) -> bool:
    """Every test file with tests marked gpu, several at a time."""
    files = test_files()
    end = time.monotonic() + seconds

    def run(file: Path) -> tuple[Path, int, str, float]:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--durations=3", str(file)]
        return file, *process(command, end - time.monotonic())

    results = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for file, status, output, taken in pool.map(run, files):
            passed = status in (0, 5)  # 5: no test was selected
            last = output.strip().splitlines()[-1:] or ["no output"]
            log(f"{'passed' if passed else 'FAILED'}  {file.name}  {taken:.0f} s  {last[0].strip('= ')}")
            if not passed:
                log(output[-4000:])
            results.append({"file": file.name, "passed": passed, "status": status, "summary": last[0].strip("= ")})
    write_json(out / "tests.json", {"environment": environment(), "rows": results})
    return all(row["passed"] for row in results)


def name_native_library(seconds: float, log: Log) -> None:
    """Leaves DVIT_NATIVE_LIBRARY naming a library with CUDA, built here if need be: no test builds it in a sanitizer.

    Or says that there is none.
    """
    if not os.environ.get("DVIT_NATIVE_LIBRARY"):
        if missing := [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]:
            log(f"native library: its GPU tests are NOT RUN: no {' and no '.join(missing)}, no DVIT_NATIVE_LIBRARY")
            return
        folder, end = ROOT / "build" / "native-gpu", time.monotonic() + seconds
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder)]
        configure += ["-DDVIT_CUDA=ON", "-DDVIT_TESTS=OFF", "-DCMAKE_CUDA_ARCHITECTURES=native"]
        for command in (configure, ["cmake", "--build", str(folder), "-j2"]):
            status, output, _ = process(command, end - time.monotonic())
            if status != 0:  # the tests will try as well, and fail
                log(f"native library: building it FAILED\n{output[-4000:]}")
                return
        os.environ["DVIT_NATIVE_LIBRARY"] = str(folder / native.FILE)
    try:
        with_cuda = native.library().dvit_has_cuda()
        log(f"native library: {os.environ['DVIT_NATIVE_LIBRARY']}")
        if not with_cuda:
            log("native library: its GPU tests are NOT RUN: it was built without CUDA")
    except InputError as error:  # the tests will fail
        log(f"native library: {error}")


def sanitizer(out: Path, seconds: float, log: Log) -> bool:
    """The small kernel tests under compute-sanitizer, where it is and can run.

    All under memcheck; the native library's under racecheck too: its barriers are placed by hand.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        log("compute-sanitizer is not here: not run")
        return True
    end, good = time.monotonic() + seconds, True
    runs = [("memcheck", SMALL, test_files())]
    if os.environ.get("DVIT_NATIVE_LIBRARY"):  # else its tests are skipped
        runs.append(("racecheck", SMALL_NATIVE, [NATIVE_TESTS]))
    for checker, small, files in runs:
        given = ["--tool", checker, "--error-exitcode", "77", "--target-processes", "all"]
        tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-k", small, *map(str, files)]
        status, output, taken = process([tool, *given, *tests], end - time.monotonic())
        log(output[-2000:])
        log(f"compute-sanitizer, {checker}: exit status {status}, {taken:.0f} s")
        good &= status == 0  # 77: it found something; else it could not run or was cut short, which the lines above say
    return good


def script(name: str, out: Path, seconds: float, log: Log) -> bool:
    """A measuring script of this folder."""
    results = out / f"{name}.json"
    more = {
        "tune": ["--choices", str(out / "choices.json"), "--budget", str(max(10.0, seconds - 15))],
        "models": ["--choices", str(out / "choices.json"), "--budget", str(max(10.0, seconds - 90))],
        "prune_tokens": ["--dtype", "bfloat16"],
    }
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(results), *more.get(name, [])]
    status, output, _ = process(command, seconds)
    log(output)
    return status == 0


def run_parts(names: list[str], out: Path, budget: float, log: Log) -> Iterator[str]:
    """Run the parts in turn; yields the names of those that failed."""
    end = time.monotonic() + budget
    if {"tests", "sanitizer"} & {*names}:
        name_native_library(0.2 * budget, log)
    for name in PARTS:
        if name not in names:
            continue
        left = end - time.monotonic()
        if left < 20:
            log(f"== {name}: not run, no time left")
            continue
        seconds = left * SHARE[name] if len(names) > 1 else left
        log(f"== {name}, at most {seconds:.0f} s")
        start = time.monotonic()
        own = {"tests": tests, "sanitizer": sanitizer}
        good = own[name](out, seconds, log) if name in own else script(name, out, seconds, log)
        log(f"== {name}: {'done' if good else 'FAILED'} in {time.monotonic() - start:.0f} s")
        if not good:
            yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: $OUT, else bench/results/<gpu>")
    parser.add_argument("--only", default=",".join(PARTS), help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all (default: %(default)s)")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("error: there is no NVIDIA GPU here; the suite needs one", file=sys.stderr)
        return 2
    usual = ROOT / "bench" / "results" / machine_name(torch.cuda.get_device_name())
    out = (given.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else usual)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "gpu.txt")
    log(json.dumps(environment()))
    failed = list(run_parts(names, out, given.budget, log))
    log(f"failed: {', '.join(failed)}" if failed else "all parts done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
