"""dvit-eval and dvit-predict on archives, flat folders with labels, and models that name their classes."""

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import SIZE, TINY, fails, lines
from drawn import SMALL, draw_all

import dvit_infer as dvit
from dvit_infer.cli import eval as eval_command
from dvit_infer.cli import predict as predict_command

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]


@pytest.fixture
def numbered(_empty_folder) -> dict[str, int]:
    """Twelve images in the class folders 3, 5 and 8, and each one's class."""
    return {path: int(path.split("/")[1]) for number in (3, 5, 8) for path in draw_all(Path(f"d/{number}"), 4, number)}


def top1(capsys, *argv) -> float:
    """The accuracy, of a run that warns of nothing."""
    assert eval_command.main([*map(str, argv), *OPTIONS, "--json", "e.json"]) == 0
    assert capsys.readouterr().err == ""
    (row,) = json.loads(Path("e.json").read_text())["rows"]
    assert row["images"] == 12
    return row["top1"]


def test_all_of_them_give_the_accuracy_of_predictions(numbered, checkpoint, capsys):
    assert predict_command.main([str(checkpoint), "d", *OPTIONS]) == 0
    found = {line["image"]: line["top5"][0]["class"] for line in lines(capsys.readouterr().out)}
    expected = pytest.approx(100 * sum(found[path] == label for path, label in numbered.items()) / 12)
    with tarfile.open("a.tar.gz", "w:gz") as tar:
        tar.add("d")
    with zipfile.ZipFile("a.zip", "w") as packed, zipfile.ZipFile("pairs.zip", "w") as pairs:
        for at, (path, label) in enumerate(numbered.items()):
            packed.write(path)
            pairs.write(path, f"{at:03}{Path(path).suffix}")
            pairs.writestr(f"{at:03}.cls", str(label))
    Path("flat").mkdir()
    rows = ["file,class"]
    for path, label in numbered.items():
        rows.append(f"{label}-{Path(path).name},{label}")
        Path("flat", rows[-1].split(",")[0]).write_bytes(Path(path).read_bytes())
    Path("flat/labels.csv").write_text("\n".join(rows))
    assert top1(capsys, checkpoint, "d") == expected
    for archive in ("a.tar.gz", "a.zip", "pairs.zip"):
        assert top1(capsys, checkpoint, archive) == expected
    assert top1(capsys, checkpoint, "flat", "--labels", "flat/labels.csv") == expected
    assert "--labels flat/labels.csv" in fails(eval_command, [checkpoint, "flat", *OPTIONS], capsys)


def test_a_model_that_names_its_classes(numbered, checkpoint, capsys):
    labels = {index: f"thing {index}" for index in range(10)}
    dvit.export_onnx(dvit.convert(checkpoint, device="cpu", **SIZE), "m.onnx", labels=labels)
    for number in (3, 5, 8):
        Path(f"d/{number}").rename(f"d/Thing_{number}")
    assert eval_command.main(["m.onnx", "d", "--workers", "0"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "3 class folders for 10 classes: by the model's own labels" in out.out
    Path("d/zebra").mkdir()
    draw_all(Path("d/zebra"), 1)
    line = fails(eval_command, ["m.onnx", "d", "--workers", "0"], capsys)
    assert "d: 4 class folders for 10 classes: 1 not among the model's own labels: 'zebra'" in line


def test_predictions_of_an_archive_resume(numbered, checkpoint, capsys):
    with tarfile.open("a.tar", "w") as tar:
        tar.add("d/3")
    argv = [str(checkpoint), *OPTIONS, "-o", "r.jsonl"]
    assert predict_command.main([*argv, "a.tar"]) == 0
    before = Path("r.jsonl").read_text()
    assert [line["image"] for line in lines(before)] == [f"a.tar/{path}" for path in numbered if "/3/" in path]
    assert predict_command.main([*argv, "d/5", "a.tar"]) == 0
    after = Path("r.jsonl").read_text()
    assert after.startswith(before)
    assert after.count("\n") == 8


@pytest.mark.parametrize("labels", ["none.csv", "d", "empty.csv"])
def test_label_files_that_cannot_be_used(labels, numbered, checkpoint, capsys):
    Path("empty.csv").touch()
    assert f"--labels: {labels}: " in fails(eval_command, [checkpoint, "d", *OPTIONS, "--labels", labels], capsys)
