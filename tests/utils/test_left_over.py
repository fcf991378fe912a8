"""What a killed run leaves beside its output is removed by the next run there, and nothing that a live run writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dvit_infer.errors import InputError
from dvit_infer.utils import partial
from dvit_infer.utils.files import atomic_write, atomic_write_files, check_output
from dvit_infer.utils.partial import remove_left_over

ROOT = Path(__file__).parents[2]
WRITER = """
import sys, time
from dvit_infer.utils import files
with getattr(files, sys.argv[1])(sys.argv[2], "out") as part:
    part.write_bytes(bytes(1000))
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer():
    """Starts processes that have written a part of a file and wait."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path, how: str = "atomic_write") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, how, str(path)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["atomic_write", "atomic_write_files"])
def test_the_next_run_removes_what_a_killed_one_left(how, writer, tmp_path):
    killed(writer(tmp_path / "model.safetensors", how))
    assert [name.startswith(".model.safetensors.") for name in names(tmp_path)] == [True]
    with (atomic_write if how == "atomic_write" else atomic_write_files)(tmp_path / "other", "out") as part:
        part.write_text("whole")
    assert names(tmp_path) == ["other"]


def test_checking_an_output_is_enough(writer, tmp_path):
    killed(writer(tmp_path / "a"))
    check_output(tmp_path / "a", "out")
    assert names(tmp_path) == []


def test_what_a_live_run_writes_stays(writer, tmp_path):
    one, two = writer(tmp_path / "a"), writer(tmp_path / "b", "atomic_write_files")
    killed(writer(tmp_path / "a"))
    remove_left_over(tmp_path)
    with atomic_write(tmp_path / "c", "out") as part:
        part.write_text("whole")
        remove_left_over(tmp_path)  # nor what this process writes
    assert len(names(tmp_path)) == 3
    for process in (one, two):
        process.communicate("end\n")
        assert process.returncode == 0
    assert names(tmp_path) == ["a", "b", "c"]
    assert all((tmp_path / name).stat().st_size == 1000 for name in "ab")


def test_a_child_that_outlives_its_parent_still_writes(tmp_path):
    script = WRITER.replace(
        "    sys.stdin", "    import os; os.fork() or time.sleep(600)\n    os.kill(os.getpid(), 9)\n    sys.stdin"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, "atomic_write", str(tmp_path / "a")], cwd=ROOT, stdout=-1
    ) as run:
        run.wait()
        remove_left_over(tmp_path)
        assert len(names(tmp_path)) == 1
        found = [int(p.name) for p in Path("/proc").glob("[0-9]*") if str(tmp_path / "a").encode() in cmdline(p)]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    for _ in range(100):
        remove_left_over(tmp_path)
        if not names(tmp_path):
            break
        time.sleep(0.05)
    assert names(tmp_path) == []


def cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / ".a.abcdefgh.part").write_text("a file of another program")
    (tmp_path / ".b.abcdefgh.part").mkdir()
    (tmp_path / ".c.abcdefgh.part").symlink_to(tmp_path)
    (tmp_path / "d.part").mkdir()
    remove_left_over(tmp_path)
    remove_left_over(tmp_path / "none")
    assert len(names(tmp_path)) == 4


def test_a_folder_of_another_machine_stays_for_a_day(writer, tmp_path, monkeypatch):
    """Its lock may hold there alone, as on some network file systems."""
    killed(writer(tmp_path / "a"))
    monkeypatch.setattr(partial, "_system", lambda: "another")
    remove_left_over(tmp_path)
    (left,) = tmp_path.iterdir()
    for path in (left, *left.rglob("*")):
        os.utime(path, (time.time() - 90_000,) * 2)
    remove_left_over(tmp_path)
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_written_to_and_nothing_is_removed(writer, tmp_path, monkeypatch):
    killed(writer(tmp_path / "a"))

    def no_locks(file: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(partial, "_lock", no_locks)
    with atomic_write(tmp_path / "b", "out") as part:
        part.write_text("whole")
    assert names(tmp_path)[1:] == ["b"]


def test_without_fcntl_everything_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "fcntl", None)
    with atomic_write(tmp_path / "a", "out") as part:
        part.write_text("whole")
    with atomic_write_files(tmp_path / "b", "out") as part:
        part.write_text("whole")
    assert names(tmp_path) == ["a", "b"]


def test_a_result_has_the_mode_of_a_new_file(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "writer.lock", "out") as part:
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "writer.lock").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"out: .*none/a: No such file"), atomic_write(tmp_path / "none" / "a", "out"):
        pass
