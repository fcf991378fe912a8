"""The suite for a GPU, on a CPU: its whole order in a dry run, and bad input."""

import json
import sys

import pytest
import torch
from commands import ROOT, run
from pretended_gpu import _on_an_h100  # noqa: F401 (fixtures are found by being there)

sys.path.append(str(ROOT / "bench"))
import compare
import gpu
import gpu_checks

from dvit_infer.errors import InputError


def suite(*argv: str):
    return run(str(ROOT / "bench" / "gpu.py"), *argv)


@pytest.mark.large
def test_a_dry_run_walks_the_whole_order(tmp_path):
    done = suite("--dry", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "compiled kernels: a dry run needs none"
    begun = [line.split()[1].rstrip(",") for line in lines if line.startswith("== ") and ", at most" in line]
    assert begun == [part for part in gpu.PARTS if part not in gpu.ASKED_FOR]
    assert "no part failed" in lines[-1]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(
        ["gpu.txt", "smoke.json", "models.json", "tune.json", "choices.json", "machine.json", "prune_tokens.json"]
    )
    for name in files[:-1]:
        if name.endswith(".json"):
            content = json.loads((tmp_path / "out" / name).read_text())
            assert content["environment"]["torch"] == torch.__version__
            assert content["rows"]
            assert not [row for row in content["rows"] if "failed" in row]
            if name not in ("choices.json", "models.json"):  # in a dry run two models are one
                assert len(compare.read(str(tmp_path / "out" / name))[1]) == len(content["rows"]), (
                    "a row's name is its own"
                )
    assert (tmp_path / "out" / "gpu.txt").read_text() == done.stdout
    smoke = json.loads((tmp_path / "out" / "smoke.json").read_text())["rows"]
    variants = ["not captured", "captured", "programmatic"]
    assert [(r["batch"], r["variant"]) for r in smoke] == [
        *((2, v) for v in [*variants, "two branches"]),
        *((1, v) for v in variants),
    ]
    again = [r for r in json.loads((tmp_path / "out" / "models.json").read_text())["rows"] if "variant" in r]
    assert {(r["runtime"], r["variant"]) for r in again} >= {
        (runtime, variant) for runtime in ("engine", "dense") for variant in (None, "measured choices")
    }


@pytest.mark.large
def test_the_second_run_walks_too(tmp_path):
    done = suite("--dry", "--only", "second,routing", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())["rows"]
    assert {row["op"] for row in routing} == {"routed_mlp", "route_tokens"}
    assert all(row.get("max_error", 0.0) < 1e-5 for row in routing)
    rows = json.loads((tmp_path / "out" / "second.json").read_text())["rows"]
    beside = [row for row in rows if "baseline" in row]
    assert {row["variant"] for row in beside} == {"registers as they come", "at most 128 registers"}
    assert all(row["max_error"] == 0 for row in beside)


@pytest.mark.parametrize("budget", ["0", "-5", "soon", "nan", "inf", ""])
def test_a_budget_that_is_none(budget, tmp_path, capsys):
    assert gpu.main(["--dry", "--out", str(tmp_path / "out"), f"--budget={budget}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: BUDGET: {budget!r} is not a number of seconds; more than 0 are needed, 540 are usual\n"
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_each(tmp_path, capsys):
    def error(*argv: str) -> str:
        assert gpu.main(argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    expected = "error: ONLY: 'nonsense' is not a part of the suite; these are: smoke, models, "
    assert error("--only", "smoke,nonsense").startswith(expected)
    (tmp_path / "file").write_text("")
    expected = f"error: {tmp_path}/file/out: results cannot be written there (Not a directory)"
    assert error("--dry", "--out", str(tmp_path / "file" / "out")).startswith(expected)
    if not torch.cuda.is_available():
        assert error("--out", str(tmp_path / "none")).startswith("error: there is no NVIDIA GPU here")
        assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense\n"


@pytest.mark.usefixtures("_on_an_h100")
def test_a_machine_that_will_not_do(monkeypatch, tmp_path):
    gpu_checks.check_machine()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(InputError, match="no C compiler here"):
        gpu_checks.check_machine()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no C compiler here"):
        gpu_checks.check_machine()
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    (tmp_path / "home").write_text("a home folder that cannot be written, for root either")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match=r"home/\.triton/cache, where Triton keeps kernels: Not a directory; TRITON_"):
        gpu_checks.check_machine()
    monkeypatch.setenv("DVIT_KERNELS", "perhaps")
    with pytest.raises(InputError, match=r"^DVIT_KERNELS: 'perhaps'; require, off or nothing is expected"):
        gpu_checks.check_machine()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match=r"compute capability 7\.5; the kernels need 8\.0 or later"):
        gpu_checks.check_machine()


def test_parts_come_in_the_suites_order():
    assert gpu.parts_of("tune, smoke") == ["smoke", "tune"]
    assert gpu.parts_of("second,sanitizer") == ["second", "sanitizer"]
    assert gpu.parts_of(None)[:3] == ["smoke", "models", "capture"]
