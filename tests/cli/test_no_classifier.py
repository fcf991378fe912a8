"""Models without a classifier: commands that need classes refuse them, dvit-eval asks neighbours, dvit-viz draws."""

from dataclasses import replace
from pathlib import Path

import pytest
from commands import fails
from drawn import draw_all

import dvit_infer as dvit
from dvit_infer.cli import eval, predict, viz
from dvit_infer.evaluate import predictions
from dvit_infer.evaluate.accuracy import measure_accuracy
from dvit_infer.evaluate.visualize import draw_kept
from dvit_infer.images.labelled import labelled_images

pytestmark = pytest.mark.usefixtures("_empty_folder", "_headless")
OPTIONS = ["--device", "cpu", "--workers", "0", "--image-size", "64", "--assume", "num_heads=2"]
SAID = "has no classifier, so that there are no classes to predict; engine.features and dvit-embed give its embedding\n"


def headless(*args, **options) -> dvit.Engine:
    """An engine whose config says that what it returns are no logits."""
    engine = CONVERT(*args, **options)
    engine.config = replace(engine.config, num_classes=0)
    engine.labels = None
    return engine


CONVERT = dvit.convert


@pytest.fixture
def _headless(monkeypatch, _empty_folder):
    monkeypatch.setattr("dvit_infer.evaluate.open_model.convert", headless)
    draw_all(Path("photos", "a"), 2)


def test_there_is_nothing_to_predict(checkpoint, capsys):
    Path("names.txt").write_text("a\n")
    names = ["--classes", "names.txt"]
    for command, more in ((predict, []), (predict, names), (predict, ["-o", "x.jsonl"]), (eval, names)):
        line = fails(command, [checkpoint, "photos", *OPTIONS, *more], capsys)
        assert line == f"error: {checkpoint}: {headless(checkpoint, assume={'num_heads': 2}).config.arch} {SAID}"


def test_they_are_evaluated_by_neighbours(checkpoint, capsys):
    draw_all(Path("photos", "b"), 2, 2)
    line = fails(eval, [checkpoint, "photos", *OPTIONS, "--json", "x.json"], capsys)
    assert line == "error: --knn: 20 neighbours cannot be found among 3 images; at most 3 can be\n"
    assert eval.main([str(checkpoint), "photos", *OPTIONS, "--knn", "1"]) == 0
    assert "1 nearest neighbours" in capsys.readouterr().out


def test_nor_for_a_program(checkpoint):
    engine = headless(checkpoint, assume={"num_heads": 2}, image_size=64, device="cpu")
    with pytest.raises(dvit.InputError, match=r"engine: .* has no classifier"):
        next(predictions.predict(engine, ["photos/a/000.png"], workers=0))
    with pytest.raises(dvit.InputError, match=r"engine: .* has no classifier"):
        measure_accuracy(engine, labelled_images("photos", 2), workers=0)


def test_what_it_keeps_is_drawn_without_a_class(checkpoint, capsys):
    assert viz.main([str(checkpoint), "photos/a/000.png", *OPTIONS, "-o", "out.png"]) == 0
    assert "photos/a/000.png: no classifier, kept " in capsys.readouterr().out
    assert viz.main([str(checkpoint), "photos", *OPTIONS, "--heat-map", "-o", "heat.png"]) == 0
    engine = headless(checkpoint, assume={"num_heads": 2}, image_size=64, device="cpu")
    assert draw_kept(engine, ["photos/a/000.png"]).width > 64
    Path("names.txt").write_text("a\n")
    capsys.readouterr()
    assert SAID in fails(viz, [checkpoint, "photos", *OPTIONS, "--classes", "names.txt", "-o", "x.png"], capsys)
    assert "nothing to draw" in fails(viz, [checkpoint, "photos", *OPTIONS, "--method", "none"], capsys)
