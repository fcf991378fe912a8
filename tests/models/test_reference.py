"""The reference models give the official models' answers, in evaluation and in training."""

import pytest
import torch
from golden_cases import EVERY_CASE, answers, case_images, official_checkpoint, options, same_kept, training_case
from torch.nn import functional as F

import dvit_infer as dvit
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.layers import softmax_with_policy
from dvit_infer.models.vit.plain import PlainViT


@pytest.mark.parametrize("case_id", EVERY_CASE)
@torch.no_grad()
def test_agrees_with_the_golden_case(case_id):
    logits, kept, margin = answers(case_id)
    model = dvit.load_reference(official_checkpoint(case_id), **options(case_id))
    ours, ours_kept = model(case_images(case_id), return_kept=True)
    assert (ours - logits).abs().max() < 2e-5
    assert same_kept(ours_kept, kept, margin)


@torch.no_grad()
def test_given_kept_sets_are_used():
    case_id = "tiny-deit-r0.7-s1"
    model = dvit.load_reference(official_checkpoint(case_id), **options(case_id))
    logits, kept = model(case_images(case_id), return_kept=True)
    again, same = model(case_images(case_id), return_kept=True, kept=kept)
    assert torch.equal(logits, again)
    assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))
    others = [torch.arange(stage.shape[1]).expand_as(stage) for stage in kept]
    changed, chosen = model(case_images(case_id), return_kept=True, kept=others)
    assert not torch.allclose(changed, logits, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(chosen, others, strict=True))


@pytest.mark.parametrize("name", ["train-tiny-deit-s21", "train-tiny-lvvit-s22"])
def test_training_forward_agrees_with_the_golden_case(name, monkeypatch):
    out, teacher, golden = training_case(name, monkeypatch)
    assert torch.equal(torch.stack(out.decisions).to(torch.int8), golden["decisions"])
    assert torch.equal(out.mask.to(torch.int8), golden["mask"])
    assert torch.allclose(out.pred, golden["pred"], rtol=0, atol=2e-5)
    assert torch.allclose(teacher.pred, golden["teacher_logits"], rtol=0, atol=2e-5)
    if "aux" in golden:
        assert torch.allclose(out.tokens, golden["aux"], rtol=0, atol=2e-5)
        assert torch.allclose(teacher.tokens, golden["teacher_aux"], rtol=0, atol=2e-5)
    else:
        assert torch.allclose(out.tokens[:, ::14], golden["features"], rtol=0, atol=2e-5)
    # The outputs are what the official losses are made of: their parts follow from them.
    ratios = sum(((d.mean(1) - r) ** 2).mean() for d, r in zip(out.decisions, (0.7, 0.49, 0.343), strict=True))
    parts = golden.get("loss_parts", golden.get("loss_parts_mse"))
    kl = F.kl_div(out.pred.log_softmax(-1), teacher.pred.log_softmax(-1), reduction="batchmean", log_target=True)
    assert torch.allclose(torch.stack([F.cross_entropy(out.pred, golden["labels"]), ratios, kl]), parts[:3], atol=2e-5)


def test_training_reaches_every_weight():
    case_id = "tiny-deit-r0.7-s1"
    model = dvit.load_reference(official_checkpoint(case_id), **options(case_id)).train()
    out = model(case_images(case_id))
    (out.pred.sum() + out.tokens.sum() + sum(d.mean() for d in out.decisions)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_softmax_with_policy_masks_keys_but_not_the_token_itself():
    scores = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))  # others may sum to little
    policy = torch.tensor([1.0, 1, 0, 1, 0]).view(1, 5, 1).expand(2, -1, -1)
    weights = softmax_with_policy(scores, policy)
    dropped = torch.tensor([2, 4])
    assert weights[..., 0, dropped].max() < 1e-6
    assert (weights[..., dropped, dropped] > 1e-3).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 5), atol=1e-5)
    everyone = softmax_with_policy(scores, torch.ones(2, 5, 1))
    assert torch.allclose(everyone, scores.softmax(-1), atol=2e-6)


CASE = "tiny-deit-r0.7-s1"


def _student(fused: bool = False) -> torch.nn.Module:
    model = dvit.load_reference(official_checkpoint(CASE), **options(CASE)).train()
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = fused
    return model


def _noise(images: torch.Tensor) -> torch.Tensor:
    """(3, B, 196, 2) standard Gumbel samples."""
    generator = torch.Generator().manual_seed(1)
    return -torch.empty(3, len(images), 196, 2).exponential_(generator=generator).log()


def test_given_noise_is_used_as_gumbel_softmax_uses_its_own(monkeypatch):
    model, images = _student(), case_images(CASE)
    noise = _noise(images)
    given = model(images, noise=noise)
    (given.tokens.square().mean() + given.decisions[-1].mean()).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    draws = iter((-noise).exp())
    # gumbel_softmax takes minus the logarithm of what this gives
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(next(draws)))
    drawn = model(images)
    (drawn.tokens.square().mean() + drawn.decisions[-1].mean()).backward()
    for a, b in zip(given.decisions, drawn.decisions, strict=True):
        assert torch.equal(a, b.round())
    assert torch.allclose(given.tokens, drawn.tokens, atol=1e-5)
    for a, p in zip(grads, (p for p in model.parameters() if p.grad is not None), strict=True):
        assert (a - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-8


@torch.no_grad()
def test_decisions_follow_from_each_images_own_noise():
    model, images = _student(), case_images(CASE)
    noise, swapped = _noise(images), torch.arange(len(images)).flip(0)
    expected = model(images, noise=noise).decisions
    found = model(images[swapped], noise=noise[:, swapped]).decisions
    assert len(images) > 1
    assert all(torch.equal(a[swapped], b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(expected[0], model(images, noise=noise.flip(2)).decisions[0])
    with torch.autocast("cpu", torch.bfloat16):
        short = model(images, noise=noise).decisions
    assert all(d.dtype == torch.float32 for d in short)


def test_gradients_reach_the_predictors_fused_or_not_and_agree():
    images = case_images(CASE)
    found = []
    for fused in (False, True):
        model = _student(fused)
        model(images, noise=_noise(images)).tokens.square().mean().backward()  # through the attention mask alone
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, fused = found
    assert plain.keys() == fused.keys()
    predictors = [name for name in plain if name.startswith("score_predictor")]
    assert {name.split(".")[1] for name in predictors} == {"0", "1", "2"}
    assert all(plain[name].abs().max() > 0 for name in predictors)
    largest = max(grad.abs().max() for grad in plain.values())
    for name, grad in plain.items():
        assert (fused[name] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-6 * largest, name


def test_training_answers_with_both_heads_where_there_are_two():
    body = ViT(patch_size=4, embed_dim=8, depth=1, num_heads=2, mlp_dim=8, eps=1e-6, num_prefix=2)
    model = PlainViT(body, num_classes=3, grid=(2, 2))
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(model.train()(images).pred, model.eval()(images), atol=1e-6)
