"""A pytest plugin for the suite: print every failure when it happens, not at the end, which may never come.

    python -m pytest -p first_failures -m gpu

With pytest-xdist, a worker whose GPU context is broken (e.g. by an illegal access) ends itself after the test that
broke it, and a new one replaces it: in the same process all later tests would fail.
"""

import os
import sys

import pytest

EVERY = 50  # tests between progress lines


class FirstFailures:
    """Prints failures as they occur. Only the printing process counts the tests."""

    def __init__(self) -> None:
        self.done = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
            _say(f"FAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}")
        if report.when == "call":
            self.done += 1
            if self.done % EVERY == 0:
                _say(f"{self.done} tests have run, {self.failed} failures")


class FreshWorkers:
    """In an xdist worker: ends it once every CUDA call fails."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> object:
        outcome = yield
        report = outcome.get_result()
        if report.failed and not _usable():
            _say(f"FAILED {report.nodeid}: it left the GPU unusable, so its process ends\n{report.longreprtext}")
            os._exit(70)


def _usable() -> bool:
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _say(text: str) -> None:
    """Write past output capturing; a worker's stdout is its channel to xdist, its stderr the terminal."""
    os.write(2, f"{text}\n".encode(errors="replace"))


def pytest_configure(config: pytest.Config) -> None:
    plugin = FreshWorkers() if hasattr(config, "workerinput") else FirstFailures()
    config.pluginmanager.register(plugin, "dvit_failures")
    sys.stdout.flush()
