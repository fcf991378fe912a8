"""Windows and macOS, simulated: names that only Linux has are deleted before anything is imported. Not run there."""

import sys
from pathlib import Path

import pytest
from commands import TINY, run
from drawn import SMALL, draw_all
from small_training import arguments, write_dense, write_folder

from dvit_infer.images import stream
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import Entry, decode

pytestmark = pytest.mark.usefixtures("_empty_folder")
WITHOUT = """
import importlib, os, signal, sys
for module, names in (
    (signal, "pthread_sigmask SIGHUP SIGKILL SIGALRM SIGUSR1 SIGCHLD SIGPIPE setitimer sigwait"),
    (os, "fork forkpty sched_getaffinity getuid geteuid getgid killpg setsid getpgid mkfifo sysconf statvfs pread"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"))  # None: cannot be imported
sys.exit(importlib.import_module(f"dvit_infer.cli.{sys.argv[1]}").main(sys.argv[2:]))
"""


def without(*argv) -> str:
    done = run("-c", WITHOUT, *map(str, argv))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "eval", "viz"])
def test_reading_images(command, checkpoint):
    draw_all(Path("d/3"), 2)
    out = without(command, checkpoint, "d", *TINY, *SMALL, *(["-o", "k.png"] if command == "viz" else []))
    assert {"predict": "d/3/001.jpg", "eval": "top-1", "viz": "wrote k.png"}[command] in out


@pytest.mark.slow
def test_converting_training_and_resuming_a_results_file(checkpoint):
    draw_all(Path("d"), 2)
    without("convert", checkpoint, *TINY, "--image-size", "64", "-o", "m.safetensors")
    for _ in range(2):
        without("predict", "m.safetensors", "d", "--device", "cpu", "--workers", "0", "-o", "r.jsonl")
    assert Path("r.jsonl").read_text().count("\n") == 2
    without("train", *arguments(write_dense(Path("dense.pth")), write_folder(Path("t")), "out.pth"))
    assert Path("out.pth").exists()


def test_workers_of_systems_without_signal_masks_ignore_ctrl_c(monkeypatch):
    monkeypatch.delattr("signal.pthread_sigmask")
    with stream.interrupts_held():
        pass
    start = stream.first_in_worker()
    assert start is not None
    assert getattr(sys.modules[start.__module__], start.__name__) is start  # spawned workers are sent its name


@pytest.mark.slow
def test_workers_may_be_spawned(monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.setattr(stream, "START_METHOD", "spawn")
    monkeypatch.setattr(stream, "first_in_worker", lambda: stream._ignore_interrupts)
    paths = draw_all(Path("d"), 9)
    found = list(decode([Entry(path, 3) for path in paths], Preprocess((32, 32)), 1))
    assert [(image.path, image.label, image.error) for image in found] == [(path, 3, None) for path in paths]
