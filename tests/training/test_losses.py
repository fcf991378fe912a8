"""What training minimises: equal to the official losses, and to itself however the images are shared out."""

from itertools import pairwise

import pytest
import torch
from golden_cases import training_case

from dvit_infer.models.reference import TrainOutput
from dvit_infer.training.losses import Objective, losses

RATIOS = (0.7, 0.49, 0.343)


@pytest.mark.parametrize(
    ("name", "token_loss", "per_image", "total", "parts"),
    [
        ("train-tiny-deit-s21", "mse", True, "loss_mse", "loss_parts_mse"),
        ("train-tiny-deit-s21", "kl", False, "loss_dynamic_kl", None),
        ("train-tiny-lvvit-s22", "kl", True, "loss", "loss_parts"),
    ],
)
def test_equals_the_official_losses(name, token_loss, per_image, total, parts, monkeypatch):
    out, teacher, golden = training_case(name, monkeypatch)
    found = losses(Objective(RATIOS, token_loss, per_image), out, teacher, golden["labels"])
    assert torch.allclose(found.total, golden[total], rtol=0, atol=1e-5)
    if parts is not None:
        ours = torch.stack([found.cross_entropy, found.ratio, found.logits, found.tokens])
        assert torch.allclose(ours, golden[parts], rtol=0, atol=1e-5)
    assert torch.allclose(found.kept, torch.stack([d.mean() for d in out.decisions]))


def _outputs(images: int, seed: int = 0) -> tuple[TrainOutput, TrainOutput, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    decisions = [(random(images, 20) > 0).float().requires_grad_() for _ in RATIOS]
    pred, tokens = random(images, 5).requires_grad_(), random(images, 20, 8).requires_grad_()
    out = TrainOutput(pred, tokens, decisions[-1].detach(), decisions)
    teacher = TrainOutput(random(images, 5), random(images, 20, 8), torch.ones(images, 20), [])
    return out, teacher, random(images, 5).softmax(dim=-1)


def _part(out: TrainOutput, part: slice) -> TrainOutput:
    return TrainOutput(out.pred[part], out.tokens[part], out.mask[part], [d[part] for d in out.decisions])


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("token_loss", ["mse", "kl"])
def test_processes_with_uneven_shares_agree_with_one(per_image, token_loss):
    objective = Objective(RATIOS, token_loss, per_image)
    out, teacher, targets = _outputs(6)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1])
    leaves = [out.pred, out.tokens, *out.decisions]
    whole = losses(objective, out, teacher, targets, weights)
    expected = torch.autograd.grad(whole.total, leaves)

    shares = [slice(a, b) for a, b in pairwise([0, 2, 3, 6])]
    sums: list[torch.Tensor] = []
    for part in shares:  # what all processes together would add up

        def keep(local: torch.Tensor) -> torch.Tensor:
            sums.append(local)
            return local

        losses(objective, _part(out, part), _part(teacher, part), targets[part], weights[part], keep)
    everyone = torch.stack(sums).sum(dim=0)
    found = [
        losses(objective, _part(out, p), _part(teacher, p), targets[p], weights[p], lambda _: everyone) for p in shares
    ]
    for one in found:
        assert torch.allclose(one.parts(), whole.parts(), atol=1e-6)
    gradients = torch.autograd.grad(torch.stack([one.total for one in found]).sum(), leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_image_of_no_weight_counts_for_nothing_whatever_is_in_it():
    objective = Objective(RATIOS)
    out, teacher, targets = _outputs(4)
    without = losses(objective, _part(out, slice(0, 3)), _part(teacher, slice(0, 3)), targets[:3])
    broken = TrainOutput(out.pred.detach().clone(), out.tokens.detach().clone(), out.mask, out.decisions)
    broken.pred[3], broken.tokens[3] = torch.nan, torch.inf
    found = losses(objective, broken, teacher, targets, torch.tensor([1.0, 1, 1, 0]))
    assert torch.allclose(found.parts(), without.parts(), atol=1e-6)


def test_nothing_kept_is_no_division_by_zero():
    out, teacher, targets = _outputs(2)
    nothing = out._replace(mask=torch.zeros_like(out.mask))
    found = losses(Objective(RATIOS), nothing, teacher, targets)
    assert found.tokens == 0
    assert torch.isfinite(found.total)
    none_count = losses(Objective(RATIOS), out, teacher, targets, torch.zeros(2))
    assert none_count.total >= 0
