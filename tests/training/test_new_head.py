"""Other classes than the dense model's: a new head, and a teacher whose logits mean nothing for them."""

import pytest
import torch
from small_training import arguments, trained, write_dense, write_folder

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.models.vit.lvvit import LVViT
from dvit_infer.models.vit.plain import PlainViT
from dvit_infer.training.losses import Objective, losses
from dvit_infer.training.student import make_pair, set_training

STEM = {"stem_dim": 8, "mlp_dim": 96, "skip_lam": 2.0}
KINDS = [
    (PlainViT, {}, ["head"]),
    (PlainViT, {"num_prefix": 2}, ["head", "head_dist"]),
    (LVViT, STEM, ["aux_head", "head"]),
]
CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(("make", "shape", "heads"), KINDS)
def test_other_classes_get_a_new_head(make, shape, heads, folder, tmp_path, capsys):
    dense, out = write_dense(tmp_path / "dense.pth", make, num_classes=5, **shape), tmp_path / "out.pth"
    assert train.main(arguments(dense, folder, out, "--val", folder, "--epochs", "1")) == 0
    said = capsys.readouterr().out
    assert f"new head for 3 classes ({dense} has 5): it learns from scratch" in said
    assert f"the teacher {dense} has other classes: its features are distilled, not its logits" in said
    assert "logits 0," in said
    engine = dvit.convert(out, device="cpu")
    assert engine.config.num_classes == 3
    assert dvit.verify(engine, out).passed
    assert vars(torch.load(out, weights_only=False)["args"])["dvit_infer"]["classes"] == CLASSES
    # While the backbone is frozen, the new heads learn: all of them, and at the predictors' rate.
    pair = make_pair(dense, 0.7, classes=CLASSES)
    begins, ends, before = pair.student.state_dict(), trained(out), trained(dense)
    for name in heads:
        moved = (ends[f"{name}.weight"] - begins[f"{name}.weight"]).abs().max()
        assert moved > 1e-4, name
        assert begins[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.3)
        assert not begins[f"{name}.bias"].any()
    others = [key for key in before if key.split(".")[0] not in heads]
    assert all(torch.equal(ends[key], before[key]) for key in others)


def test_the_same_number_of_classes_keeps_the_head_unless_asked(folder, tmp_path, capsys):
    dense = write_dense(tmp_path / "dense.pth")
    assert not any("head" in prefix for prefix in make_pair(dense, 0.7, classes=CLASSES).new)
    assert train.main(arguments(dense, folder, tmp_path / "out.pth", "--new-head", "--epochs", "1")) == 0
    assert "new head for 3 classes" in capsys.readouterr().out
    pair = make_pair(dense, 0.7, classes=CLASSES, new_head=True)
    assert pair.is_new("head.weight")
    assert not pair.is_new("blocks.0.attn.qkv.weight")
    assert not pair.distils_logits


def test_the_head_is_seeded(tmp_path):
    dense = write_dense(tmp_path / "dense.pth")
    weights = [
        make_pair(dense, 0.7, classes=["a", "b"], seed=seed).student.state_dict()["head.weight"] for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    predictors = [make_pair(dense, 0.7, classes=c).student.state_dict() for c in (CLASSES, ["a", "b"])]
    key = "score_predictor.0.in_conv.1.weight"
    assert torch.equal(predictors[0][key], predictors[1][key])  # a new head does not change them


@pytest.mark.parametrize(("make", "shape", "heads"), KINDS)
def test_training_logits_are_those_of_evaluation(make, shape, heads, tmp_path):
    """With every patch kept; LV-ViT's auxiliary head counts then, and gets a gradient."""
    pair = make_pair(write_dense(tmp_path / "dense.pth", make, num_classes=5, **shape), 0.7, classes=CLASSES)
    teacher = pair.teacher
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher.eval()(images)
        set_training(teacher)
        found = teacher(images)
    assert torch.allclose(found.pred, expected, atol=1e-5)
    assert found.tokens.shape == (3, 16, 32)
    set_training(pair.student)
    out = pair.student(images)
    objective = Objective((0.7, 0.49, 0.343), "mse", logits=0.0)
    loss = losses(objective, out, found, torch.tensor([0, 1, 2]))
    assert loss.logits == 0
    loss.total.backward()
    for name in heads:
        assert pair.student.get_parameter(f"{name}.weight").grad.abs().max() > 0


def test_logits_without_any_patch_are_finite(tmp_path):
    pair = make_pair(write_dense(tmp_path / "dense.pth", LVViT, num_classes=5, **STEM), 0.7, classes=CLASSES)
    x = torch.randn(2, 17, 32, requires_grad=True)
    logits = pair.student.train_logits(x, torch.zeros(2, 16))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(x.grad).all()


def test_a_teacher_of_the_new_classes_is_distilled_in_full(folder, tmp_path, capsys):
    dense = write_dense(tmp_path / "dense.pth", num_classes=5)
    teacher = write_dense(tmp_path / "teacher.pth")
    out = tmp_path / "out.pth"
    assert train.main(arguments(dense, folder, out, "--teacher", teacher, "--epochs", "1")) == 0
    said = capsys.readouterr().out
    assert "new head for 3 classes" in said
    assert f"the teacher is {teacher}" in said
    assert "logits 0," not in said
