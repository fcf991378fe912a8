"""The small trained model that the project carries: what its result file says holds, and training it again learns."""

import json
import sys

import numpy as np
import pytest
import torch
from commands import ROOT
from PIL import Image

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.models.registry import outline
from dvit_infer.training.student import make_pair, official_content
from dvit_infer.tuning.subject import Subject

sys.path.append(str(ROOT / "bench" / "proof"))
import cluttered_digits
import methods
from pictures import write

FOLDER = ROOT / "bench" / "proof"
TRAINED, DENSE = FOLDER / "digits-0.7.pth", FOLDER / "dense.pth"
PROOF = json.loads((ROOT / "bench" / "results" / "proof.json").read_text())
SOME = 600


@pytest.fixture(scope="module")
def test_images():
    images, labels = cluttered_digits.draw(SOME, "test", 5)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _top1(engine: dvit.Engine, images: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (engine(images).argmax(dim=1) == labels).float().mean().item()


def test_the_result_is_what_the_project_claims():
    assert PROOF["dense_top1"] >= 94
    assert abs(PROOF["pruned_top1"] - PROOF["dense_top1"]) <= 0.5 or PROOF["pruned_top1"] > PROOF["dense_top1"]
    assert PROOF["random_top1"] <= PROOF["pruned_top1"] - 15
    assert PROOF["tokens_dropped"] >= 0.65
    assert len(PROOF["seeds"]["top1"]) == 3
    assert PROOF["pruned_gflops"] < 0.75 * PROOF["dense_gflops"]


def test_methods_are_compared_at_equal_macs():
    compared = PROOF["methods"]["methods"]
    assert set(compared) == {"predictor", "evit", "tome", "random"}
    for rows in zip(*compared.values(), strict=True):
        macs = [row["gmacs"] for row in rows]
        assert max(macs) < 1.05 * min(macs)
        assert min(rows, key=lambda row: row["top1"])["reduction"].startswith("random")
    assert PROOF["methods"]["dense_top1"] == PROOF["dense_top1"]


def test_tuning_lands_at_its_target():
    assert PROOF["tune"]["met"]
    assert PROOF["tune"]["searched"] == 667
    assert abs(PROOF["tune"]["test_agreement"] - 0.99) <= 0.005


@pytest.mark.slow
def test_the_nearest_macs_are_found():
    subject = Subject(DENSE, device="cpu")
    for settings in methods.SETTINGS.values():
        chosen = methods._nearest(subject, settings(), int(0.75 * outline(subject.dense).macs))
        rest = {name: value for name, value in chosen.items() if name != "method"}
        share = outline(subject.config(chosen["method"], rest)).macs / outline(subject.dense).macs
        assert share == pytest.approx(0.75, abs=0.02)


def test_a_chart_of_lines(tmp_path):
    methods.draw_chart(PROOF["methods"], tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert len(chart.convert("RGB").getcolors(1 << 20)) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("path", "claimed"), [(TRAINED, "pruned_top1"), (DENSE, "dense_top1")])
def test_the_committed_files_are_as_right_as_claimed(path, claimed, test_images):
    assert path.stat().st_size < 4 << 20
    engine = dvit.convert(path, device="cpu")
    share = PROOF[claimed] / 100
    assert _top1(engine, *test_images) == pytest.approx(100 * share, abs=400 * (share * (1 - share) / SOME) ** 0.5)


@pytest.mark.slow
def test_the_trained_model_passes_verification_in_both_dtypes():
    for dtype in ("float32", "bfloat16"):
        report = dvit.verify(dvit.convert(TRAINED, device="cpu", dtype=dtype), TRAINED)
        assert report.passed, str(report)


@pytest.mark.slow
def test_random_patches_would_not_do(test_images):
    images, labels = test_images
    engine = dvit.convert(TRAINED, device="cpu")
    order = np.random.default_rng(0).random((SOME, 64)).argsort(axis=1)
    kept = [torch.from_numpy(np.sort(order[:, :count], axis=1)) for count in engine.config.num_keep]
    top1 = 100 * (engine(images, kept=kept).argmax(dim=1) == labels).float().mean().item()
    assert top1 < _top1(engine, images, labels) - 10


def test_keeps_the_patches_that_show_the_digit(monkeypatch):
    monkeypatch.setattr(cluttered_digits, "PIECES", 0)
    images, _ = cluttered_digits.draw(100, "test", 6)
    _, kept = dvit.convert(TRAINED, device="cpu")(torch.from_numpy(images), return_kept=True)
    light = np.clip(images.astype(float) - 64, 0, None).mean(axis=1).reshape(100, 8, 8, 8, 8).sum(axis=(2, 4))
    seen = torch.from_numpy(light.reshape(100, 64)).gather(1, kept[-1]).sum()
    assert seen / light.sum() > 0.9


@pytest.mark.large
def test_a_short_training_learns(tmp_path, capsys, test_images):
    """Predictors with random weights on the dense model, against the same after a few dozen steps."""
    images, labels = cluttered_digits.draw(2560, "train", 1)
    write(tmp_path / "train", images, labels)
    options = [
        "--keep-rate",
        "0.7",
        "--prune-at",
        "2,3,4",
        "--batch",
        "64",
        "--lr",
        "1e-3",
        "--backbone-lr-scale",
        "0.1",
    ]
    options += ["--scale", "1", "--flip", "0", "--mixup", "0", "--cutmix", "0", "--randaugment", "0", "--erase", "0"]
    options += ["--freeze-epochs", "0", "--warmup-epochs", "0.2", "--smoothing", "0", "--epochs", "2", "--workers", "0"]
    pair, before, after = make_pair(DENSE, 0.7, prune_at=(2, 3, 4)), tmp_path / "before.pth", tmp_path / "after.pth"
    torch.save(official_content(pair.student.state_dict(), pair.args, 0), before)
    argv = [str(DENSE), str(tmp_path / "train"), "-o", str(after), "--device", "cpu", *options]
    assert train.main(argv) == 0
    untrained, learned = (_top1(dvit.convert(path, device="cpu"), *test_images) for path in (before, after))
    assert learned > untrained + 10
    shares = capsys.readouterr().out.splitlines()
    assert any(line.startswith("epoch 2 of 2") for line in shares)
