"""Busy processes beside a measurement: that they run during it, and end with it whatever ends it."""

import os
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import ENV
from golden_cases import official_checkpoint

from dvit_infer.benchmark import base, load
from dvit_infer.benchmark.compare import Comparison
from dvit_infer.benchmark.load import busy_processes, check_load, describe_load
from dvit_infer.benchmark.timing import Timing, noise
from dvit_infer.errors import InputError

PARENT = """
import sys
from dvit_infer.benchmark import load

def start(*given, usual=load._start):
    process = usual(*given)
    print(process.pid)
    return process

load._start = start
with load.busy_processes(2):
    print("busy", flush=True)
    sys.stdin.read(1)
    {then}
"""


@pytest.fixture
def started(monkeypatch):
    """The busy processes that a test starts."""
    processes: list[subprocess.Popen[bytes]] = []
    usual = load._start

    def start(*given):
        processes.append(usual(*given))
        return processes[-1]

    monkeypatch.setattr(load, "_start", start)
    return processes


def codes(processes) -> set[int | None]:
    return {process.returncode for process in processes}


def test_they_run_during_the_block_and_end_with_it(started):
    with busy_processes(3):
        assert [process.poll() for process in started] == [None] * 3
    assert codes(started) == {-signal.SIGKILL}


def test_no_load_starts_nothing(started):
    with busy_processes(0):
        pass
    assert started == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_they_end_with_a_block_that_fails(error, started):
    with pytest.raises(error), busy_processes(2):
        raise error
    assert codes(started) == {-signal.SIGKILL}


def test_ctrl_c_ends_the_block_and_not_a_process_in_it(started):
    """A terminal sends it to all of them."""

    def interrupt() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            started[0].send_signal(number)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), busy_processes(1):
        interrupt()
    assert codes(started) == {-signal.SIGKILL}


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes that are not its children")
@pytest.mark.parametrize(
    ("then", "by"),
    [
        ("pass", signal.SIGKILL),
        *(pytest.param("pass", n, marks=pytest.mark.slow) for n in (None, signal.SIGINT, signal.SIGTERM)),
        pytest.param("1 / 0", None, marks=pytest.mark.slow),
    ],
)
def test_none_is_left_by_a_process_that_ends(then, by):
    argv = [sys.executable, "-c", PARENT.format(then=then)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, **pipes, env=ENV, text=True) as parent:
        watched = [os.pidfd_open(int(parent.stdout.readline())) for _ in range(2)]
        assert parent.stdout.readline() == "busy\n"
        assert not select.select(watched, [], [], 0)[0]
        if by is None:
            parent.stdin.write("x")
            parent.stdin.flush()
        else:
            parent.send_signal(by)
        for fd in watched:
            assert select.select([fd], [], [], 60)[0]  # it has ended
            os.close(fd)


def test_one_that_ends_early_is_an_error(started):
    def end_one() -> None:
        started[1].kill()
        started[1].wait()

    with pytest.raises(InputError, match="load: 1 of 2 busy processes ended before"), busy_processes(2):
        end_one()
    assert codes(started) == {-signal.SIGKILL}


def test_one_that_does_not_start_is_an_error(started, monkeypatch):
    monkeypatch.setattr(load, "_BUSY", "raise SystemExit(7)")
    with pytest.raises(InputError, match="load: only 0 of 2 busy processes started"), busy_processes(2):
        pytest.fail("the block ran")
    assert None not in codes(started)


def test_too_many_for_the_system(started, monkeypatch):
    usual = subprocess.Popen

    def popen(*given, **named):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return usual(*given, **named)

    monkeypatch.setattr(subprocess, "Popen", popen)
    text = "load: a busy process cannot be started: Resource temporarily unavailable"
    with pytest.raises(InputError, match=text), busy_processes(2):
        pytest.fail("the block ran")
    assert codes(started) == {-signal.SIGKILL}


@pytest.mark.parametrize("count", [-1, 1025, 10**30])
def test_a_number_out_of_range(count):
    with pytest.raises(InputError, match=r"^load: "):
        check_load(count)
    with pytest.raises(InputError, match=r"^load: "), busy_processes(count):
        pytest.fail("the block ran")


@pytest.mark.slow
def test_only_the_timing_is_loaded(started, monkeypatch):
    counts = []
    usual, prepare = base.interleave, Comparison._prepare

    def interleave(*given):
        counts.append(("timing", sum(process.poll() is None for process in started)))
        return usual(*given)

    def prepared(self, images):
        counts.append(("checks", len(started)))
        return prepare(self, images)

    monkeypatch.setattr(base, "interleave", interleave)
    monkeypatch.setattr(Comparison, "_prepare", prepared)
    Comparison({**official_checkpoint("tiny-deit-r0.7-s1"), "args": {"num_heads": 2}}, (), "cpu").measure(
        1, 0.0, load=2
    )
    assert counts == [("checks", 0), ("timing", 2)]
    assert codes(started) == {-signal.SIGKILL}


def test_a_spread_under_load_is_no_surprise():
    timings = [Timing(np.array([0.1, 0.2, 0.3, 0.4]), None)]
    assert "this machine is noisy" in noise(timings)
    assert "this machine is noisy" not in noise(timings, 3)
    assert noise(timings, 3).startswith("beside 3 busy processes: p20 and p80")


def test_words():
    assert [describe_load(n) for n in (1, 2, "1, 2")] == [
        "beside 1 busy process",
        "beside 2 busy processes",
        "beside 1, 2 busy processes",
    ]
