"""A pytest plugin for the suite: every failure's text when it happens, not at the end, which may never come.

    python -m pytest -p first_failures -m gpu

With pytest-xdist a worker whose GPU context is broken (an illegal access, say) ends itself after the test that broke
it, and another takes its place: in the same process all later tests would fail with it.
"""

import os
import sys

import pytest

EVERY = 50  # tests between lines that say how far it is


class FirstFailures:
    """Prints failures as they come. Knows how many tests there were only in the process that prints."""

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
    """In a worker of xdist: ends it once CUDA fails every call."""

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
    """Past whatever captures output; a worker's stdout is its channel to xdist, its stderr the terminal."""
    os.write(2, f"{text}\n".encode(errors="replace"))


def pytest_configure(config: pytest.Config) -> None:
    plugin = FreshWorkers() if hasattr(config, "workerinput") else FirstFailures()
    config.pluginmanager.register(plugin, "dvit_failures")
    sys.stdout.flush()
