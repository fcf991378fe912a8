"""Busy processes beside a measurement, which make its machine one that does other work too."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator

from dvit_infer.errors import InputError
from dvit_infer.utils.bounds import check_bound

MOST = 1024
# Run by each process, given the id of its parent. It reports that it has started, waits for a byte from the parent,
# and counts as long as the parent lives: a parent that is killed cannot end it.
_BUSY = """
import os, sys
os.write(1, b"!")
os.close(1)
os.read(0, 1)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


def check_load(count: int) -> None:
    """Raise InputError if that many busy processes cannot be run."""
    if count < 0:
        raise InputError(f"load: {count} busy processes cannot be run; 0 to {MOST} can")
    check_bound("load", count, MOST)


def describe_load(count: int | str) -> str:
    """Return 'beside 2 busy processes'; of several measurements, 'beside 1, 2 busy processes'."""
    return f"beside {count} busy process{'es' * (str(count) != '1')}"


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run that many processes, each a loop in one thread, during the block; all are busy when it begins.

    They have the affinity mask, the CPU quota and the priority of this process. They end with the block, and with this
    process if it is killed. Ctrl-C reaches this process alone.

    Raises:
        InputError: The number is out of range, or some could not be started or ended before the block did.
    """
    check_load(count)
    if count == 0:
        yield
        return
    from dvit_infer.images.stream import interrupts_held  # here: it imports torch, which a report does without

    processes: list[subprocess.Popen[bytes]] = []
    # Two pipes that all share: one of each process for itself would be more files than a process may usually open.
    wait, go, started, tell = *_pipe(), *_pipe()
    with wait, go, started, tell:
        try:
            with interrupts_held():  # an interrupt between a start and the list would lose a process
                for _ in range(count):
                    processes.append(_start(wait.fileno(), tell.fileno()))
            tell.close()
            ready = sum(map(len, iter(lambda: started.read(4096), b"")))  # until each has closed its end, or has ended
            if ready < count:
                raise InputError(f"load: only {ready} of {count} busy processes started; try fewer")
            go.write(b"!" * count)
            yield
            if ended := sum(process.poll() is not None for process in processes):
                raise InputError(f"load: {ended} of {count} busy processes ended before the measurement; try fewer")
        finally:
            with interrupts_held():
                for process in processes:
                    process.kill()
                for process in processes:
                    process.wait()


def _pipe() -> tuple[io.FileIO, io.FileIO]:
    read, write = os.pipe()
    return io.FileIO(read, "r"), io.FileIO(write, "w")


def _start(stdin: int, stdout: int) -> "subprocess.Popen[bytes]":
    # No site-packages: a start takes 10 ms, not 50.
    command = [sys.executable, "-I", "-S", "-c", _BUSY, str(os.getpid())]
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise InputError(f"load: a busy process cannot be started: {error.strerror or error}; try fewer") from None
