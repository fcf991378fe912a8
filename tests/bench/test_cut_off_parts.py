"""The parts of the GPU suite as processes: what they print, how they fail, and what stays of one that is cut off."""

import os
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT

sys.path.append(str(ROOT / "bench"))
import children
import gpu
import gpu_tests


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.slow
def test_what_is_cut_off_ends_with_all_that_it_started():
    """A child that will not end when asked, and one of its own that would outlive it."""
    script = """if 1:
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
        time.sleep(600)
    """
    lines: list[str] = []
    assert children.run([sys.executable, "-c", script], 3.0, lines.append) == children.CUT_OFF
    assert len(lines) == 1
    end = time.monotonic() + 30
    while alive(int(lines[0])) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(int(lines[0]))


def test_output_comes_as_it_is_printed_and_the_status_with_it():
    lines: list[str] = []
    script = "import sys, os; print('one'); print('two', file=sys.stderr); os._exit(3)"
    assert children.run([sys.executable, "-c", script], 60, lines.append) == 3
    assert lines == ["one", "two"]


@pytest.fixture
def parts_made_of(monkeypatch, tmp_path):
    """Runs parts whose scripts are these lines of Python, in the given seconds; returns outcome and log."""

    def run_parts(seconds: float, **scripts: str):
        monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(scripts, 1))
        monkeypatch.setattr(gpu, "command", lambda part, *_: [sys.executable, "-c", scripts[part]])
        lines: list[str] = []
        found = gpu.run_parts(list(scripts), tmp_path, time.monotonic() + seconds, False, lines.append)
        return found, lines

    return run_parts


@pytest.mark.slow
def test_a_part_that_fails_or_is_cut_off_leaves_the_others(parts_made_of, tmp_path):
    write = "from pathlib import Path; Path({!r}).write_text('kept');"
    slow = write.format(str(tmp_path / "a.json"))
    slow += (
        f"from dvit_infer.utils.files import atomic_write; writing = atomic_write({str(tmp_path / 'b.json')!r}, 'out');"
    )
    slow += "writing.__enter__().write_text('half'); import time; print('before', flush=True); time.sleep(600)"
    found, lines = parts_made_of(18.0, slow=slow, bad="import os; os.abort()", good="print('ran')")
    assert found == {"failed": ["bad"], "cut off": ["slow"], "not run": []}
    assert "before" in lines
    assert "ran" in lines
    assert any(line.startswith("== slow: CUT OFF") for line in lines)
    assert any(line.startswith("== bad: FAILED, status -6") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_part_without_time_says_so(parts_made_of):
    found, lines = parts_made_of(3.0, one="print('ran')", two="print('ran')")
    assert found == {"failed": [], "cut off": [], "not run": ["one", "two"]}
    assert lines == ["== one: NOT RUN, no time left", "== two: NOT RUN, no time left"]


def test_tests_for_a_gpu_are_found_the_most_telling_first():
    names = [path.name for path in gpu_tests.test_files()]
    assert names[: len(gpu_tests.FIRST)] == list(gpu_tests.FIRST)
    assert "test_native_cuda.py" not in names  # it would be built first: its own part, the last
    assert {"test_linear_tma_kernels.py", "test_patch_embedding_kernels.py"} < {*names}


def test_a_failing_test_is_told_when_it_happens(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_bad():\n    assert 1 == 2\ndef test_that_ends_the_process():\n    os._exit(9)\n"
    )
    lines: list[str] = []
    command = [sys.executable, "-m", "pytest", "-p", "first_failures", "-q", "--tb=short", "--no-summary"]
    status = children.run([*command, "-c", os.devnull, str(tmp_path / "test_two.py")], 60, lines.append)
    assert status == 9
    text = "\n".join(lines)
    assert "test_two.py::test_bad (call, " in text
    assert "assert 1 == 2" in text
