"""EViT and ToMe from the command line: every command, and what cannot be used."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from commands import fails, lines
from drawn import draw_all
from golden_cases import state_dict
from golden_vits import write

import dvit_infer as dvit
from dvit_infer.cli import bench, convert, eval, predict, viz

pytestmark = pytest.mark.usefixtures("_empty_folder")
CPU = ["--device", "cpu", "--backend", "torch"]
READING = [*CPU, "--workers", "0"]
TOME, EVIT = ["--method", "tome"], ["--method", "evit"]
COMMANDS = {"dvit-convert": convert, "dvit-bench": bench, "dvit-eval": eval, "dvit-predict": predict, "dvit-viz": viz}


@pytest.fixture
def deit(_empty_folder) -> str:
    """A dense model of four blocks, 196 patches and ten classes."""
    weights = {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k}
    known = {"num_heads": 2, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875}
    torch.save({"model": weights, "args": known}, "deit_small.pth")
    return "deit_small.pth"


def bench_rows(*argv: str) -> list[dict]:
    usual = ["--batch", "2", "--seconds", "0.1", "--json", "rows.json"]
    assert bench.main([argv[0], *CPU, *usual, *argv[1:]]) == 0
    return json.loads(Path("rows.json").read_text())["rows"]


EVERY_COMMAND = """
dvit-convert deit_small.pth --method tome --merge 13
dvit-convert deit_small.pth --method evit --keep-rate 0.7 -o evit.safetensors
dvit-bench deit_small.pth --method tome --merge 13 --nodes --seconds 0.1 --batch 2
dvit-bench deit_small.pth --method evit --sweep 0.5:0.9:0.2 --seconds 0.1 --batch 2
dvit-eval deit_small.pth imagenet/val --method tome --merge 8:decreasing
dvit-predict evit.safetensors photos --kept -o kept.jsonl
dvit-viz deit_small.pth photo.jpg --method tome --merge 13
"""


@pytest.mark.slow
def test_every_command_reduces(deit, capsys):
    draw_all(Path("photos"), 2)
    draw_all(Path("imagenet/val/1"), 2)
    next(Path("photos").iterdir()).rename("photo.jpg")
    for line in EVERY_COMMAND.strip().splitlines():
        name, *argv = shlex.split(line)
        assert COMMANDS[name].main([*argv, *(CPU if name in ("dvit-bench", "dvit-convert") else READING)]) == 0, line
    out = capsys.readouterr().out
    assert "parity passed: deit-64x4, tome 13: 183,170,157,144 of 196" in out
    assert "parity passed: deit-64x4, evit 0.7: 138,98,70 of 196" in out
    assert "tome 8:decreasing" not in out  # dvit-eval names counts
    assert "merging to 180,170,165 of 196 patches" in out
    assert "merged to 183, 170, 157, 144 of 196" in out
    assert all(len(line["kept"]) == 3 for line in lines(Path("kept.jsonl").read_text()))
    merging = dvit.convert("deit_small.pth", method="tome", merge=13)
    groups = merging(torch.rand(2, 3, 224, 224), return_kept=True)[1]
    assert [stage.shape for stage in groups] == [(2, 196)] * 4
    assert "saves" in str(merging.graph)
    attentive = dvit.convert("deit_small.pth", method="evit", keep_rate=[0.9, 0.7, 0.5], prune_at=(1, 2, 3))
    assert str(attentive.config.reduction) == "evit 0.9,0.7,0.5: 177,125,63 of 196"


def test_a_saved_file_is_opened_with_another_method(deit, capsys):
    assert convert.main([deit, *CPU, "--method", "tome", "--merge", "16,10,5,0", "-o", "a.safetensors"]) == 0
    draw_all(Path("photos"), 1)
    kept = {}
    for name, argv in {
        "saved": [],
        "decreasing": ["--merge", "8:decreasing"],
        "evit": ["--method", "evit", "--keep-rate", "120,60,30", "--prune-at", "0,1,2"],
        "unfused": ["--method", "evit", "--keep-rate", "0.5", "--assume", "fuse=false"],
        "random": ["--method", "random", "--keep-rate", "0.5"],
    }.items():
        capsys.readouterr()
        assert predict.main(["a.safetensors", "photos", *READING, "--kept", *argv]) == 0
        kept[name] = lines(capsys.readouterr().out)[0]["kept"]
    assert kept["saved"] == kept["decreasing"]
    assert [len(set(stage)) for stage in kept["saved"]] == [180, 170, 165]
    assert [len(stage) for stage in kept["evit"]] == [120, 60, 30]
    assert [len(stage) for stage in kept["unfused"]] == [98, 49, 25]
    assert max(map(max, kept["unfused"])) < 196
    assert dvit.load("a.safetensors", merge="3:decreasing", device="cpu", backend="torch").config.num_keep[0] == 190


def test_a_dense_file_is_measured(deit, capsys):
    rows = bench_rows(deit, *TOME, "--merge", "8:decreasing", "--compare", "dense", "--batch", "1")
    assert [(row["runtime"], row["keep_rate"]) for row in rows] == [("dense", 1.0), ("engine", 165 / 196)]
    assert all(row["max_logit_error"] < 1e-4 and row["method"] == "tome" for row in rows)
    assert "deit-64x4, tome 8:decreasing: 180,170,165 of 196" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "keep_rate"),
    [(["--method", "tome", "--merge", "8"], 164 / 196), (["--method", "evit", "--keep-rate", "0.9,0.7,0.5"], 0.9)],
)
def test_candidates_and_nodes_of_dvit_bench(argv, keep_rate, deit, capsys):
    rows = bench_rows(deit, *argv, "--compare", "reference,dense", "--nodes")
    models = [row for row in rows if "speedup" in row]
    assert [(row["runtime"], row["keep_rate"]) for row in models] == [
        ("reference", pytest.approx(keep_rate)),
        ("dense", 1.0),
        ("engine", pytest.approx(keep_rate)),
    ]
    assert all(row["max_logit_error"] < 1e-4 and row["method"] == argv[1] for row in models)
    nodes = [row for row in rows if "share" in row]
    reducing = [row for row in nodes if row["kind"] in ("merge", "prune")]
    # The last stage's tokens are read by nobody but those who ask for them.
    assert [row["op"].split(".")[1] for row in reducing] == [str(i) for i in range(4 if argv[1] == "tome" else 3)][:-1]
    assert all(row["us"] > 0 and row["saves_us"] > 0 and row["max_error"] < 1e-4 for row in reducing)
    assert all(row["saves_us"] is None for row in nodes if row not in reducing)
    out = capsys.readouterr().out
    assert "saves us" in out
    assert f"{'merging' if argv[1] == 'tome' else 'pruned'} over dense engine" in out


@pytest.mark.slow
def test_a_sweep_of_evit(deit, capsys):
    rows = bench_rows(deit, "--method", "evit", "--sweep", "0.5:0.9:0.4", "--compare", "reference")
    assert [(row["runtime"], row["keep_rate"]) for row in rows] == [
        ("reference", 0.7), ("dense", 1.0), ("engine", 0.5), ("engine", 0.9)
    ]  # fmt: skip
    assert "98,50,26" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*TOME, "--merge", "-1"], "--merge: -1 is not a number of tokens to merge; a whole number such as 8 is"),
        ([*TOME, "--merge", "2.5"], "--merge: '2.5' is not a number"),
        ([*TOME, "--merge", "8:rising"], "--merge: '8:rising' is not a number"),
        ([*TOME, "--merge", "-8:decreasing"], "--merge: -8 is not a number"),
        ([*TOME, "--merge", "1,2,x,4"], "--merge: 'x' is not a number"),
        ([*TOME, "--merge", "9,9,9"], "--merge: 3 numbers are given; the model has 4 blocks"),
        (["--merge", "8"], "--merge: deit_small.pth holds no score predictors, so it runs dense; method tome takes it"),
        ([*EVIT, "--merge", "8"], "--merge: is for method tome, not evit, which takes keep_rate"),
        ([*TOME, "--keep-rate", "0.7"], "--keep-rate: is for methods evit and random, not tome, which takes merge"),
        ([*TOME, "--prune-at", "1,2"], "--prune-at: is for methods evit and random, not tome"),
        ([*EVIT, "--keep-rate", "0"], "--keep-rate: 0 is neither a keep rate"),
        ([*EVIT, "--keep-rate", "1.5"], "--keep-rate: 1.5 is neither a keep rate, above 0 and at most 1, nor a number"),
        ([*EVIT, "--keep-rate", "0.9,0.7"], "--keep-rate: 2 given, but 3 stages (prune_at 1,2,3) need one each"),
        ([*EVIT, "--keep-rate", "0.9,x"], "--keep-rate: '0.9,x' is neither"),
        ([*EVIT, "--keep-rate", "500"], "--keep-rate: 500 tokens are to be kept in block 1, where there are only 196"),
        (["--method", "random", "--keep-rate", "0.9,0.7"], "--keep-rate: one rate is expected"),
        (["--method", "predictor"], "--method: 'predictor' needs score predictors, and deit_small.pth holds none"),
        ([*EVIT, "--assume", "fuse=perhaps"], "--assume fuse: 'perhaps' is not true or false"),
        ([*EVIT, "--assume", "prop_attn=true"], "--assume prop_attn: is for method tome, not evit"),
    ],
)
@pytest.mark.parametrize("command", [convert, bench], ids=["convert", "bench"])
def test_bad_options(command, argv, said, deit, capsys):
    assert said in fails(command, [deit, *CPU, *argv], capsys)


@pytest.mark.parametrize("command", [eval, predict, viz])
def test_bad_options_of_commands_that_read_images(command, deit, capsys):
    draw_all(Path("photos/1"), 1)
    assert "--merge: -1" in fails(command, [deit, "photos", *READING, *TOME, "--merge", "-1"], capsys)
    assert "--prune-at: is for" in fails(command, [deit, "photos", *READING, *TOME, "--prune-at", "1"], capsys)


def test_sweeps_that_mean_nothing(deit, capsys):
    line = fails(bench, [deit, *CPU, *TOME, "--sweep", "0.5:0.9:0.2"], capsys)
    assert line.startswith("error: --sweep: is for methods evit and random, not tome")
    line = fails(bench, [deit, *CPU, *EVIT, "--keep-rate", "0.5", "--sweep", "0.5:0.9:0.2"], capsys)
    assert line.startswith("error: --sweep: it measures keep rates")


def test_a_model_without_class_token(capsys):
    folder = write("hf-siglip-tiny", Path("siglip"))
    line = fails(convert, [folder, *CPU, *EVIT], capsys)
    assert line.startswith(
        "error: --method: 'evit' ranks patches by the class token's attention, but the model has none"
    )
    assert convert.main([str(folder), *CPU, *EVIT, "--assume", "score=pooled", "-o", "a.safetensors"]) == 0
    assert convert.main([str(folder), *CPU, *TOME, "--merge", "1000000", "-o", "b.safetensors"]) == 0  # half, each time
    assert "tome 1000000: 18,9,5,3 of 36" in capsys.readouterr().out
