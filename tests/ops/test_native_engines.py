"""DVIT_PRUNE=native: the op, engines and dvit-bench run the native library, or say in one line why not."""

import json
from pathlib import Path

import pytest
import torch
from commands import ROOT
from golden_cases import answers, case_images, official_checkpoint, options
from kernel_helpers import DTYPES
from prune_tokens_inputs import make_predictor, make_x

import dvit_infer as dvit
from dvit_infer.backends.cpu import CpuRunner, Linear
from dvit_infer.cli import bench
from dvit_infer.errors import InputError
from dvit_infer.ops import native
from dvit_infer.ops.prune_tokens import backend_of, prune_tokens_ref

pytestmark = pytest.mark.slow  # it builds the library
CPU = torch.device("cpu")


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_runs_it_when_asked(dtype, monkeypatch):
    x, packed = make_x(2, 30, 1, 64, dtype), dvit.pack_predictor(make_predictor(64), dtype)
    expected_x, expected = native.prune_tokens(x, packed, 9, 1, 1e-5)
    monkeypatch.setattr("dvit_infer.ops.prune_tokens.prune_tokens_ref", None)
    kept_x, index = dvit.prune_tokens(x, packed, 9)
    assert torch.equal(index, expected)
    assert torch.equal(kept_x, expected_x)
    torch.library.opcheck(torch.ops.dvit.prune_tokens.default, (x, packed, 5, 1, 1e-5))
    assert backend_of(CPU, 30, 64) == "native (CPU)"


@pytest.mark.usefixtures("_native")
def test_sizes_beyond_it_run_in_pytorch_and_are_told():
    assert backend_of(CPU, 9, 3) == "PyTorch"


@pytest.mark.usefixtures("_native")
def test_dvit_bench_says_who_prunes(tmp_path, capsys):
    given = [str(ROOT / "bench/proof/digits-0.7.pth"), "--batch", "2", "--seconds", "0", "--device", "cpu"]
    assert bench.main([*given, "--json", str(tmp_path / "b.json")]) == 0
    assert "prune_tokens by native (CPU)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["runtime"]: row["variant"] for row in rows} == {"reference": None, "dense": None, "engine": "native"}


def test_only_native_can_be_asked_for(monkeypatch):
    x, packed = torch.zeros(1, 9, 64), dvit.pack_predictor(make_predictor(64))
    monkeypatch.setenv("DVIT_PRUNE", "fast")
    with pytest.raises(InputError, match="DVIT_PRUNE: 'fast'"):
        dvit.prune_tokens(x, packed, 3)
    monkeypatch.setenv("DVIT_PRUNE", "")
    expected = prune_tokens_ref(x, packed, 3)[1]
    assert torch.equal(dvit.prune_tokens(x, packed, 3)[1], expected)


def test_a_library_that_cannot_be_used_is_told_in_one_line(tmp_path, monkeypatch):
    x, packed = torch.zeros(1, 9, 64), dvit.pack_predictor(make_predictor(64))
    monkeypatch.setenv("DVIT_PRUNE", "native")

    def refusal(path: Path) -> str:
        monkeypatch.setenv("DVIT_NATIVE_LIBRARY", str(path))
        with pytest.raises(InputError, match="DVIT_PRUNE") as error:
            dvit.prune_tokens(x, packed, 3)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "DVIT_NATIVE=1 pip install" in refusal(tmp_path / "nowhere.so")
    assert "DVIT_NATIVE_LIBRARY" in refusal(tmp_path / "nowhere.so")
    (tmp_path / "text.so").write_text("no library")
    assert "cannot be used" in refusal(tmp_path / "text.so")
    with pytest.raises(InputError, match="DVIT_PRUNE"):
        dvit.convert(official_checkpoint("tiny-deit-r0.7-s1"), device="cpu", **options("tiny-deit-r0.7-s1"))


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("linear", [Linear(torch.float32, False), Linear(torch.float32, True)], ids=str)
@pytest.mark.parametrize("case_id", ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"])
def test_engines_give_the_golden_answers(case_id, linear):
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", **options(case_id))
    assert ", prune_tokens by native (CPU)" in engine.graph.runtime
    engine.runner = CpuRunner(engine.runner._graph, linear)
    assert engine.runner.runtime == f"PyTorch, {linear}, prune_tokens by native (CPU)"
    expected, expected_kept, _ = answers(case_id)
    logits, kept = engine(case_images(case_id), return_kept=True)
    assert (logits - expected).abs().max() < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept, strict=True))


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_engines_in_reduced_precision_pass_verify(dtype):
    source = official_checkpoint("tiny-deit-r0.7-s1")
    report = dvit.verify(
        dvit.convert(source, device="cpu", dtype=dtype, **options("tiny-deit-r0.7-s1")), source, num_images=16
    )
    assert report.passed, str(report)
