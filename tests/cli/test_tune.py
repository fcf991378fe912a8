"""dvit-tune: what it writes and says, and what cannot be searched."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from commands import ROOT, fails
from drawn import draw_all
from golden_vits import write
from small_training import write_dense

import dvit_infer as dvit
from dvit_infer.cli import bench, tune
from dvit_infer.images.stream import Entry, decode
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.tuning.measure import Measure

pytestmark = pytest.mark.usefixtures("_empty_folder")
CPU = ["--device", "cpu", "--backend", "torch", "--workers", "0"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Search few points, and time them little: what is timed is not what is tested."""
    monkeypatch.setattr("dvit_infer.tuning.final.TIMING_S", (0.05, 0.05))
    monkeypatch.setattr("dvit_infer.tuning.points.RATES", (0.2, 0.4, 0.6, 0.8, 0.9, 0.96))
    monkeypatch.setattr("dvit_infer.tuning.measure.PAIRS_S", 0.0)
    monkeypatch.setattr("dvit_infer.benchmark.timing.MIN_ROUNDS", 2)
    monkeypatch.setattr("dvit_infer.benchmark.timing.WARM_UP_S", 0.0)
    monkeypatch.setattr("dvit_infer.benchmark.timing.WARM_UP_LIMIT_S", 0.0)


@pytest.fixture
def model(_empty_folder):
    return write_dense(Path("dense.pth"), num_classes=10)


@pytest.fixture
def photos(_empty_folder):
    draw_all(Path("photos"), 24)
    return "photos"


@pytest.mark.slow
def test_what_it_writes(model, photos, capsys):
    argv = [str(model), photos, *CPU, "--target", "0.5", "--methods", "tome", "--json", "a.json", "--report", "a.html"]
    assert tune.main([*argv, "-o", "tuned.safetensors"]) == 0
    out = capsys.readouterr().out
    assert sorted(os.listdir()) == ["a.html", "a.json", "dense.pth", "photos", "tuned.safetensors"]
    content = json.loads(Path("a.json").read_text())
    tuned = content["tune"]
    assert tuned["met"]
    assert (tuned["searched"], tuned["held_back"]["images"]) == (16, 8)
    engine = dvit.load("tuned.safetensors", device="cpu", backend="torch")
    assert str(engine.config.reduction) == tuned["chosen"]["label"]
    assert {point["method"] for point in tuned["points"]} == {"tome"}
    assert out.splitlines()[-1] == tuned["won"]
    assert "16 images searched, 8 held back" in out
    # The options that are printed give the same reduction.
    options = re.search(r"^wrote tuned.safetensors \(.*\): (.*)$", out, re.MULTILINE)[1]
    assert options == tuned["chosen"]["name"]
    assert bench.main([str(model), *CPU[:4], *options.split(), "--seconds", "0.1", "--batch", "2"]) == 0
    assert tuned["chosen"]["label"] in capsys.readouterr().out
    rows = content["rows"]
    assert [row["runtime"] for row in rows].count("dense") == 1
    assert content["version"] == 2
    page = Path("a.html").read_text()
    assert "Quality against speed" in page
    assert tuned["won"] in page


@pytest.mark.slow
def test_a_target_that_is_not_met_writes_no_model(model, photos, capsys, monkeypatch):
    monkeypatch.setattr(Measure, "_losses", lambda self, engine, held_back: iter([[0.0, 1.0] * 8]))
    assert tune.main([str(model), photos, *CPU, "--methods", "tome", "--json", "a.json"]) == 1
    out = capsys.readouterr()
    assert out.err.splitlines()[-1] == "error: target: no reduction keeps 0.99; dense.dvit.safetensors was not written"
    assert out.out.splitlines()[-1].startswith("no reduction meets the target of 0.99; the nearest is tome")
    assert not json.loads(Path("a.json").read_text())["tune"]["met"]
    assert sorted(os.listdir()) == ["a.json", "dense.pth", "photos"]


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(model, photos, capsys, monkeypatch):
    losses, calls = Measure.losses, []

    def interrupted(self, name):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return losses(self, name)

    monkeypatch.setattr(Measure, "losses", interrupted)
    argv = [str(model), photos, *CPU, "--target", "0.9", "--methods", "evit,tome"]
    assert tune.main(argv) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].endswith("dense.dvit.safetensors.search.json holds what was found: the same command resumes")
    assert lines[-1] == "error: interrupted"
    assert "dense.dvit.safetensors" not in os.listdir()
    assert tune.main(argv) == 0
    assert not set(calls[2:]) & set(calls[:1])
    assert sorted(os.listdir()) == ["dense.dvit.safetensors", "dense.pth", "photos"]


@pytest.mark.slow
def test_top1_by_a_file_of_labels(model, photos):
    engine = dvit.convert(model, device="cpu", backend="torch")
    paths = sorted(str(path) for path in Path(photos).iterdir())
    stream = decode(map(Entry, paths), preprocess_for(engine.config), workers=0)
    classes = [engine(torch.from_numpy(image.pixels)[None]).argmax().item() for image in stream]
    rows = [f"{Path(path).name},{label}" for path, label in zip(paths, classes, strict=True)]
    Path("labels.csv").write_text("\n".join(["file,class", *rows]) + "\n")
    argv = [str(model), photos, *CPU, "--metric", "top1", "--labels", "labels.csv", "--target", "0.1"]
    assert tune.main([*argv, "--methods", "tome", "--json", "a.json"]) == 0
    held = json.loads(Path("a.json").read_text())["tune"]["held_back"]
    assert held["dense_top1"] == 100
    assert held["top1"] == pytest.approx(100 * held["quality"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--target", "1.5"], "--target: 1.5 is not a share such as 0.99; above 0, at most 1, is expected"),
        (["--target", "nan"], "--target: nan is not a share"),
        (["--metric", "loss"], "--metric: 'loss' is not one of agreement, cosine, top1"),
        (["--methods", "merge"], "--methods: 'merge' is not one of"),
        (["--methods", "predictor"], "--methods: 'predictor' needs score predictors, and dense.pth holds none"),
        (["--budget", "-1"], "--budget: -1.0 is not a number of seconds"),
        (["--budget", "1e-9"], "--budget: 1e-09 seconds are too few"),
        (["--batch", "0"], "--batch: 0 images"),
        (["--assume", "keep_rate=0.5"], "--assume: keep_rate is what is searched"),
        (["-o", "nowhere/a.safetensors"], "--out: nowhere/a.safetensors: there is no folder"),
        (["-o", "dense.pth"], "--out: dense.pth is the input itself"),
        (["-o", "a", "--json", "a"], "--out: model, JSON and report are three files"),
        (["--metric", "top1"], "error: photos: has no class folders"),
    ],
)
def test_bad_options(argv, said, model, photos, capsys):
    assert said in fails(tune, [model, photos, *CPU, *argv], capsys)


@pytest.mark.slow
def test_bad_folders(model, capsys):
    draw_all(Path("one"), 1)
    assert fails(tune, [model, "one", *CPU], capsys).startswith("error: one: 1 image to search; 3 or more are needed")
    Path("empty").mkdir()
    assert "empty: no image in this folder or below it" in fails(tune, [model, "empty", *CPU], capsys)
    assert "nowhere: there is no such file or folder" in fails(tune, [model, "nowhere", *CPU], capsys)
    Path("text").mkdir()
    Path("text/a.png").write_text("no image")
    assert "text: none of 1 images can be read" in fails(tune, [model, "text", *CPU], capsys)


def test_models_that_cannot_be_tuned(photos, capsys):
    assert "nothing.pth" in fails(tune, ["nothing.pth", photos, *CPU], capsys)
    Path("a.onnx").write_bytes(b"model")
    line = fails(tune, ["a.onnx", photos, *CPU], capsys)
    assert line == "error: model: a.onnx was converted with its tokens fixed; give the checkpoint instead\n"
    folder = write("hf-siglip-tiny", Path("siglip"))
    line = fails(tune, [folder, photos, *CPU, "--metric", "agreement"], capsys)
    assert "has no classifier, and so no classes; metric cosine fits it" in line


def test_the_docs_name_options_that_exist():
    text = (ROOT / "docs" / "tune.md").read_text()
    known = {option for action in tune._parser()._actions for option in action.option_strings}
    others = {"--method", "--merge", "--keep-rate"}  # of dvit-convert, which gives what was found
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) <= known | others
