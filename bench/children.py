"""Run a command of the suite with live output, and end it with everything that it started."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parent.parent
CUT_OFF = 124  # exit status of a command that took too long
DRY = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # environment of a part in a dry run
PATIENCE_S = 2.0  # between SIGTERM and SIGKILL


def run(
    command: Sequence[str],
    seconds: float,
    say: Callable[[str], None],
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run a command of this project in its own process group for at most `seconds`.

    Args:
        say: called with every line that it prints, immediately.
        variables: added to the environment.

    Returns:
        Its exit status; `CUT_OFF` on timeout.
    """
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "bench"))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    reader = threading.Thread(target=_read, args=(process.stdout, say), daemon=True)
    reader.start()
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        return CUT_OFF
    finally:
        _end(process)
        reader.join(PATIENCE_S)


def _read(output: TextIO, say: Callable[[str], None]) -> None:
    for line in output:
        say(line.rstrip("\n"))


def _end(process: subprocess.Popen[str]) -> None:
    """End the whole group: pool workers, test workers and children of a sanitizer would outlive their parent."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
