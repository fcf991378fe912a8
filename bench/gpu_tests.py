"""The parts of the suite that run tests: those marked gpu, the native library's, some under compute-sanitizer."""

import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import children
from children import ROOT

from dvit_infer.errors import InputError
from dvit_infer.ops import native

Say = Callable[[str], None]
WITH_GPU_TESTS = re.compile(r"mark\.gpu|WHERE|def test_\w+\([^)]*\bdevice\b")
NATIVE_TESTS = ROOT / "tests" / "ops" / "test_native_cuda.py"
FIRST = ("test_gpu_engine.py", "test_linear_kernels.py", "test_attention_kernels.py", "test_prune_tokens_kernels.py")
SMALL, SMALL_NATIVE = "(neighbours or strides) and float16", "strides"  # what pytest selects for compute-sanitizer
DRY_TESTS = ["tests/kernels/test_layer_norm_kernels.py", "-k", "strides and float16"]
TIMEOUT_S = 120  # for one test, including compilation
NOTHING_SELECTED = 5  # pytest's exit status


def test_files() -> list[Path]:
    """Return the files with GPU tests, most informative first, without those of the native library."""
    files = (f for f in (ROOT / "tests").rglob("test_*.py") if WITH_GPU_TESTS.search(f.read_text()))
    order = {name: place for place, name in enumerate(FIRST)}
    return sorted((f for f in files if f != NATIVE_TESTS), key=lambda f: (order.get(f.name, len(FIRST)), f.name))


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "first_failures", "-q", "--tb=short", "--no-summary", *arguments]


def tests(seconds: float, say: Say, dry: bool) -> int:
    """Run the tests of the kernels and the engine, spread over the cores."""
    if dry:
        return children.run(_pytest(*DRY_TESTS), seconds, say, children.DRY)
    spread = []
    if importlib.util.find_spec("xdist"):  # in the given order: most informative first
        spread = ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "load", "--maxschedchunk", "2"]
    else:
        say("pytest-xdist is not installed: one process runs all tests")
    if importlib.util.find_spec("pytest_timeout"):
        spread += ["--timeout", str(TIMEOUT_S), "--timeout-method", "thread"]  # ends a process that hangs on the GPU
    return children.run(_pytest("-m", "gpu", *spread, *map(str, test_files())), seconds, say)


def native_tests(seconds: float, say: Say, dry: bool) -> int:
    """Build the native library and run its GPU tests."""
    end = time.monotonic() + seconds
    if dry or not name_native_library(0.7 * seconds, say):
        return 0
    status = children.run(_pytest("-m", "gpu", str(NATIVE_TESTS)), end - time.monotonic(), say)
    return 0 if status == NOTHING_SELECTED else status


def name_native_library(seconds: float, say: Say) -> bool:
    """Set DVIT_NATIVE_LIBRARY to a library with CUDA, built here if needed; report if there is none."""
    if not os.environ.get("DVIT_NATIVE_LIBRARY"):
        if missing := [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]:
            say(f"native library: its GPU tests are NOT RUN: no {' and no '.join(missing)}, no DVIT_NATIVE_LIBRARY")
            return False
        folder, end = ROOT / "build" / "native-gpu", time.monotonic() + seconds
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder)]
        configure += ["-DDVIT_CUDA=ON", "-DDVIT_TESTS=OFF", "-DCMAKE_CUDA_ARCHITECTURES=native"]
        for command in (configure, ["cmake", "--build", str(folder), f"-j{os.cpu_count() or 2}"]):
            if (status := children.run(command, end - time.monotonic(), say)) != 0:
                why = "no time left" if status == children.CUT_OFF else "building it FAILED"
                say(f"native library: its GPU tests are NOT RUN: {why}")
                return False
        os.environ["DVIT_NATIVE_LIBRARY"] = str(folder / native.FILE)
    try:
        with_cuda = bool(native.library().dvit_has_cuda())
    except InputError as error:
        say(f"native library: its GPU tests are NOT RUN: {error}")
        return False
    say(f"native library: {os.environ['DVIT_NATIVE_LIBRARY']}")
    if not with_cuda:
        say("native library: its GPU tests are NOT RUN: it was built without CUDA")
    return with_cuda


def sanitizer(seconds: float, say: Say, dry: bool) -> int:
    """Run the small kernel tests under compute-sanitizer, if it is installed and works.

    All run under memcheck; the native library's also under racecheck, because its barriers are placed by hand.
    """
    tool = shutil.which("compute-sanitizer")
    if dry or tool is None:
        say("compute-sanitizer: NOT RUN" + ("" if dry else ", it is not here"))
        return 0
    end, worst = time.monotonic() + seconds, 0
    runs = [("memcheck", SMALL, test_files())]
    if os.environ.get("DVIT_NATIVE_LIBRARY"):  # else its tests are skipped
        runs.append(("racecheck", SMALL_NATIVE, [NATIVE_TESTS]))
    for checker, small, files in runs:
        given = [tool, "--tool", checker, "--error-exitcode", "77", "--target-processes", "all"]
        command = [*given, *_pytest("-rs", "-m", "gpu", "-k", small, *map(str, files))]
        status = children.run(command, end - time.monotonic(), say)
        say(f"compute-sanitizer, {checker}: exit status {status}")  # 77: it found something
        worst = worst or status
    return worst
