"""dvit-eval by features: rows of k-NN and probe, two folders of classes, and what cannot be asked."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, fails
from drawn import SMALL, draw, draw_all, write_text
from PIL import Image

from dvit_infer.cli import eval as command

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]


@pytest.fixture
def folders(_empty_folder) -> None:
    """Ten images of each of the classes 3, 5 and 8 in `test`; others, in another order of classes, in `train`."""
    for name, classes, first in (("test", "358", 0), ("train", "8539", 50)):
        for at, label in enumerate(classes):
            Path(name, label).mkdir(parents=True)
            for number in range(first, first + 10):
                image = Image.blend(draw(1000 * (at + 1) + number), draw(int(label)), 0.7)
                image.save(f"{name}/{label}/{number:02}.png")


def rows(capsys, checkpoint, *argv: str) -> list[dict]:
    assert command.main([str(checkpoint), *argv, *OPTIONS, "--json", "e.json"]) == 0
    assert capsys.readouterr().err == ""
    return json.loads(Path("e.json").read_text())["rows"]


@pytest.mark.slow
def test_rows_of_both(folders, checkpoint, capsys):
    alone = rows(capsys, checkpoint, "test", "--knn", "3", "--probe", "0.5")
    assert [(row["classifier"], row.get("k"), row.get("C")) for row in alone] == [
        ("knn", 3, None),
        ("probe", None, 0.5),
    ]
    usual = {"model", "keep_rate", "runtime", "device", "dtype", "batch", "images", "top1", "top5", "images_per_s"}
    usual |= {"decode_images_per_s", "model_images_per_s", "unreadable"}
    assert all(usual < set(row) and (row["images"], row["train_images"]) == (30, None) for row in alone)
    split = rows(capsys, checkpoint, "test", "--knn", "3", "--probe", "--train", "train", "--pool", "cls_mean")
    assert all((row["images"], row["train_images"], row["pool"]) == (30, 40, "cls_mean") for row in split)
    assert np.min([row["top1"] for row in alone + split]) > 60  # by chance a third
    (itself,) = rows(capsys, checkpoint, "test", "--knn", "1", "--train", "test")
    assert itself["top1"] == 100
    with tarfile.open("t.tar", "w") as tar:
        tar.add("train")
    (packed,) = rows(capsys, checkpoint, "test", "--knn", "3", "--train", "t.tar", "--pool", "cls_mean")
    assert packed["top1"] == split[0]["top1"]


def test_unreadable_images_are_left_out_and_said(folders, checkpoint, capsys):
    expected = rows(capsys, checkpoint, "test", "--knn", "3")[0]["top1"]
    write_text(Path("test/5/00.text.jpg"))
    assert command.main([str(checkpoint), "test", *OPTIONS, "--knn", "3", "--json", "e.json"]) == 1
    out = capsys.readouterr()
    assert out.err == "error: test: 1 of 31 images cannot be read, more than 1%\n"
    assert "cannot be read: test/5/00.text.jpg: " in out.out
    (row,) = json.loads(Path("e.json").read_text())["rows"]
    assert (row["images"], row["top1"]) == (30, expected)
    assert row["unreadable"][0]["image"] == "test/5/00.text.jpg"


def test_what_cannot_be_asked(folders, checkpoint, capsys, monkeypatch):
    draw_all(Path("one/a"), 3)
    write_text(Path("text/a/x.jpg"))
    write_text(Path("text/b/x.jpg"))
    draw_all(Path("others/z"), 3)
    asked = (
        (["test", "--knn", "30"], "--knn: 30 neighbours cannot be found among 29 images"),
        (["test", "--knn", "0"], "--knn: 0 neighbours"),
        (["one", "--probe"], "--probe: all 3 images are of one class, 'a'"),
        (["test", "--probe", "--train", "one"], "--probe: all 3 images are of one class, 'a'"),
        (["test", "--probe", "nan"], "--probe: nan is no strength"),
        (["test", "--knn", "1", "--train", "others"], "--train: has no image of the classes"),
        (["test", "--knn", "1", "--train", "none"], "none: there is no such folder"),
        (["test", "--knn", "1", "--pool", "max"], "--pool: "),
        (["test", "--train", "train"], "--train: is for classification by features"),
        (["test", "--pool", "cls"], "--pool: is for classification by features"),
        (["test", "--knn", "1", "--against-reference"], "--against-reference: compares logits"),
    )
    with monkeypatch.context() as patch:
        patch.setattr("dvit_infer.evaluate.features.decode", lambda *given: pytest.fail("worked for nothing"))
        for argv, why in asked:
            assert why in fails(command, [checkpoint, *argv, *OPTIONS], capsys)
    assert "none of 2 images can be read" in fails(command, [checkpoint, "text", *OPTIONS, "--knn", "1"], capsys)
