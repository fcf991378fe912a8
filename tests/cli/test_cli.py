"""The commands as a user types them: what they print, what they write."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, fails, run
from golden_cases import official_checkpoint, state_dict

import dvit_infer as dvit
from dvit_infer.backends import runner_for
from dvit_infer.cli import bench, convert

pytestmark = pytest.mark.usefixtures("_empty_folder")
SCHEMA = """model keep_rate runtime variant device dtype batch images_per_s p20_images_per_s p80_images_per_s
    p50_ms p99_ms gmacs params peak_mib max_logit_error top1_agreement baseline speedup"""


def test_convert_writes_a_verified_file(checkpoint, capsys):
    assert convert.main([str(checkpoint), *TINY, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert "parity passed: dynamicvit-deit-64x4, predictor 0.7: 137,96,67 of 196; 8 images, float32 on cpu" in out
    assert re.search(r"read .*keep_rate.* 0\.7 .*base_rate", out)
    assert re.search(r"assumed .*prune_at.* 1,2,3", out)
    assert re.search(r"given .*num_heads.* 2 ", out)
    assert sorted(os.listdir()) == ["found.json", "tiny.dvit.safetensors"]
    found = json.loads(Path("found.json").read_text())
    assert found["parity"]["passed"] is True
    assert found["config"]["prune_at"] == [1, 2, 3]
    engine = dvit.load("tiny.dvit.safetensors", device="cpu")
    assert engine.config.num_heads == 2
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat("tiny.dvit.safetensors").st_mode) == 0o666 & ~umask


def test_convert_options_reach_the_engine(checkpoint):
    argv = [
        "--keep-rate",
        "0.5",
        "--prune-at",
        "0,2,3",
        "--image-size",
        "192x256",
        "--no-verify",
        "-o",
        "x.safetensors",
    ]
    assert convert.main([str(checkpoint), *TINY, *argv]) == 0
    config = dvit.load("x.safetensors", device="cpu").config
    assert (config.keep_rate, config.prune_at, config.image_size) == (0.5, (0, 2, 3), (192, 256))
    assert convert.main([str(checkpoint), *TINY, "--method", "none", "--dtype", "bfloat16", "-o", "d.safetensors"]) == 0
    assert dvit.load("d.safetensors", device="cpu").config.method == "none"


def test_convert_replaces_an_earlier_file_and_takes_its_own_output(checkpoint, capsys):
    Path("tiny.dvit.safetensors").write_text("old")
    assert convert.main([str(checkpoint), *TINY]) == 0
    assert convert.main(["tiny.dvit.safetensors", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert sorted(os.listdir()) == ["tiny.dvit.dvit.safetensors", "tiny.dvit.safetensors"]
    again = ["tiny.dvit.safetensors", "--device", "cpu", "-o", "tiny.dvit.safetensors"]
    assert "is the input itself" in fails(convert, again, capsys)


def test_convert_exits_1_and_writes_nothing_when_parity_fails(checkpoint, capsys, monkeypatch):
    load = dvit.load

    def spoiled(*arguments, **options):
        engine = load(*arguments, **options)
        graph = engine.graph_in(torch.float32)
        graph.nodes[2].weights["fc1.weight"].mul_(1.01)
        engine.runner = runner_for(graph)
        return engine

    monkeypatch.setattr("dvit_infer.load", spoiled)
    assert convert.main([str(checkpoint), *TINY, "--json", "found.json"]) == 1
    out = capsys.readouterr()
    assert "parity FAILED" in out.out
    assert out.err.startswith("error: ")
    assert os.listdir() == ["found.json"]
    assert json.loads(Path("found.json").read_text())["parity"]["passed"] is False


@pytest.mark.slow
def test_bench_measures_side_by_side(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.2)
    assert convert.main([str(checkpoint), *TINY, "--no-verify"]) == 0
    capsys.readouterr()
    argv = ["tiny.dvit.safetensors", "--device", "cpu", "--batch", "3,1", "--json", "rows.json"]
    assert bench.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("realised") == 2
    content = json.loads(Path("rows.json").read_text())
    assert (content["version"], content.keys()) == (2, {"version", "environment", "rows"})
    assert content["environment"].keys() == {"machine", "gpu", "driver", "torch", "triton", "commit", "date"}
    rows = content["rows"]
    names = ("reference", "dense", "engine")
    assert [(row["batch"], row["runtime"]) for row in rows] == [(batch, name) for batch in (3, 1) for name in names]
    for row in rows:
        assert list(row) == SCHEMA.split()
        assert row["max_logit_error"] < 1e-4
        assert row["top1_agreement"] == 1.0
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["p50_ms"] * 1e3)
        assert row["p20_images_per_s"] <= row["images_per_s"] <= row["p80_images_per_s"]
        assert row["keep_rate"] == (1.0 if row["runtime"] == "dense" else 0.7)
        assert row["baseline"] == "reference"
    reference, dense, engine = rows[:3]
    assert reference["speedup"] == 1.0
    assert engine["gmacs"] < reference["gmacs"] < dense["gmacs"]
    assert dense["params"] < engine["params"] == reference["params"]


@pytest.mark.slow
def test_bench_of_a_dense_model_and_of_chosen_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.1)
    torch.save(
        {
            "model": {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k},
            "args": {"num_heads": 2},
        },
        "d.pth",
    )
    assert bench.main(["d.pth", "--device", "cpu", "--batch", "2", "--json", "d.json"]) == 0
    assert [row["runtime"] for row in json.loads(Path("d.json").read_text())["rows"]] == ["reference", "dense"]
    torch.save(official_checkpoint("tiny-deit-r0.7-s1") | {"args": {"num_heads": 2}}, "p.pth")
    assert bench.main(["p.pth", "--device", "cpu", "--batch", "2", "--compare", "dense", "--json", "p.json"]) == 0
    rows = json.loads(Path("p.json").read_text())["rows"]
    assert [(row["runtime"], row["baseline"]) for row in rows] == [("dense", "dense"), ("engine", "dense")]


@pytest.mark.slow
def test_bench_against_the_compiled_reference(checkpoint, capsys, monkeypatch):
    """torch.compile itself needs a C++ compiler and a minute: here it gives the model back."""
    monkeypatch.setattr(bench, "SECONDS", 0.1)
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: modes.append(mode) or model)
    assert convert.main([str(checkpoint), *TINY, "--no-verify"]) == 0
    argv = ["tiny.dvit.safetensors", "--device", "cpu", "--batch", "2", "--compare", "compile", "--json", "c.json"]
    assert bench.main(argv) == 0
    assert "compile (default)" in capsys.readouterr().out
    rows = json.loads(Path("c.json").read_text())["rows"]
    assert [(row["runtime"], row["variant"]) for row in rows] == [("compile", "default"), ("engine", "openvino")]
    assert rows[0]["gmacs"] > rows[1]["gmacs"]
    assert all(row["max_logit_error"] < 1e-4 for row in rows)
    assert modes == ["default"]


def test_what_a_file_says_is_printed_as_it_is(capsys, tmp_path):
    args = {"num_heads": 2, "model": "[bold]deit[/b] :smile: \x1b[31m"}
    torch.save({"model": state_dict("tiny-deit", 1), "args": args}, tmp_path / "odd.pth")
    assert convert.main([str(tmp_path / "odd.pth"), "--device", "cpu", "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "[bold]deit[/b] :smile:" in out
    assert "\x1b" not in out


HELP = """
import importlib, sys, tomllib
for target in tomllib.load(open(sys.argv[1], "rb"))["project"]["scripts"].values():
    module, _, name = target.partition(":")
    try:
        getattr(importlib.import_module(module), name)(["-h"])
    except SystemExit as end:
        print("exit", end.code)
print(sorted({"torch", "numpy", "rich", "PIL", "safetensors"} & sys.modules.keys()))
"""


def test_help_loads_nothing_that_takes_long():
    done = run("-c", HELP, str(ROOT / "pyproject.toml"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: dvit-") == done.stdout.count("\nexit 0\n") == 9
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_import_loads_no_torch_and_names_are_there():
    code = (
        "import sys, dvit_infer as d; assert 'torch' not in sys.modules; assert set(d.__all__) <= set(dir(d));"
        "assert not any(m.startswith(('fvcore', 'onnx', 'matplotlib', 'triton')) for m in sys.modules);"
        "import dvit_infer.parity.verification, dvit_infer.benchmark.compare;"
        "assert all(callable(getattr(d, n)) or n == 'ray' for n in d.__all__);"
        "assert not any(m.split('.')[0] in ('fvcore', 'onnx', 'matplotlib') for m in sys.modules)"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    done = run("-c", "import torch, dvit_infer; print(torch.ops.dvit.prune_tokens.default)")
    assert (done.returncode, done.stdout.strip()) == (0, "dvit.prune_tokens.default")
    assert not hasattr(dvit, "nonsense")


@pytest.mark.slow
def test_a_real_run_shows_no_progress_where_there_is_no_terminal(checkpoint):
    done = run("-m", "dvit_infer.cli.convert", str(checkpoint), *TINY)
    assert (done.returncode, done.stderr) == (0, "")
