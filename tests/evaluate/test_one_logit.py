"""Models with one logit: class 1 with probability sigmoid(logit), in dvit-predict, dvit-eval and drawings."""

import json
from pathlib import Path

import pytest
import torch
from commands import SIZE, TINY, lines
from drawn import SMALL, draw_all
from golden_cases import official_checkpoint

import dvit_infer as dvit
from dvit_infer.cli import eval as eval_command
from dvit_infer.cli import predict as predict_command
from dvit_infer.evaluate.one_logit import as_classes
from dvit_infer.images.decode import open_image
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.tensors import normalise

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = [*TINY, *SMALL]


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    """A checkpoint of one logit, whose sign differs between images."""
    content = dict(official_checkpoint("tiny-deit-r0.7-s1"))
    state = content["model"] = dict(content["model"])
    state["head.weight"] = 4 * (state["head.weight"][3:4] - state["head.weight"][5:6])
    state["head.bias"] = torch.zeros(1)
    path = tmp_path_factory.mktemp("binary") / "binary.pth"
    torch.save(content, path)
    paths = draw_all(path.parent, 12)
    state["head.bias"] -= logits(path, paths).quantile(0.5)
    torch.save(content, path)
    return path


def logits(checkpoint: Path, paths) -> torch.Tensor:
    images = torch.stack([torch.from_numpy(Preprocess((64, 64))(open_image(path))) for path in paths])
    with torch.no_grad():
        model = dvit.load_reference(checkpoint, **SIZE)
        return model(normalise(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[:, 0]


def test_two_classes_of_one_logit():
    z = torch.tensor([[-2.0], [0.5], [90.0]])
    torch.testing.assert_close(as_classes(z).softmax(dim=1)[:, 1:], z.sigmoid())
    several = torch.randn(3, 4)
    assert as_classes(several) is several


def test_predictions_are_sigmoids(binary, capsys):
    paths = draw_all(Path("d"), 12)
    expected = logits(binary, paths).sigmoid()
    assert 0 < (expected > 0.5).sum() < 12
    Path("names.txt").write_text("fine\nbroken")
    assert predict_command.main([str(binary), "d", *OPTIONS, "--classes", "names.txt"]) == 0
    out = capsys.readouterr()
    assert out.err == "note: one logit: class 1 with probability sigmoid(logit), else class 0\n"
    for line, share in zip(lines(out.out), expected.tolist(), strict=True):
        first, second = line["top5"]
        assert (first["class"], second["class"]) == ((1, 0) if share > 0.5 else (0, 1))
        assert {a["class"]: a["label"] for a in line["top5"]} == {0: "fine", 1: "broken"}
        assert {a["class"]: a["probability"] for a in line["top5"]}[1] == pytest.approx(share, abs=1e-5)


def test_accuracy_is_by_the_threshold(binary, capsys):
    paths = draw_all(Path("all"), 12)
    right = 0
    for path, logit in zip(paths, logits(binary, paths).tolist(), strict=True):
        label = int(logit > 0) if right < 9 else int(logit <= 0)
        right += label == int(logit > 0)
        Path(f"d/{label}").mkdir(parents=True, exist_ok=True)
        Path(path).rename(f"d/{label}/{Path(path).name}")
    argv = [str(binary), "d", *OPTIONS, "--against-reference", "--json", "e.json"]
    assert eval_command.main(argv) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "one logit: class 1 with probability sigmoid(logit)" in out.out
    row = json.loads(Path("e.json").read_text())["rows"][0]
    assert (row["top1"], row["reference_top1"], row["top1_agreement"]) == (75.0, 75.0, 1.0)


def test_drawings_name_the_class(binary):
    from dvit_infer.evaluate.visualize import look

    engine = dvit.convert(binary, device="cpu", **SIZE)
    paths = draw_all(Path("d"), 12)
    images = torch.stack([torch.from_numpy(Preprocess((64, 64))(open_image(path))) for path in paths])
    seen = look(engine, [images])
    assert {one.label for one in seen} == {"class 0", "class 1"}
    assert all(0.5 <= one.probability < 1 for one in seen)
