"""DynamicViT-DeiT-S/0.7 end to end: the reference, with PyTorch's fused attention, our engine dense and pruned."""

import pytest
import torch

from dvit_infer.benchmark import candidates
from dvit_infer.benchmark.candidates import Subject
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.registry import build_reference
from dvit_infer.parity.verification import evaluate

CANDIDATES = {
    "reference": candidates.reference_candidate,
    "sdpa": candidates.sdpa_candidate,
    "dense": candidates.dense_candidate,
    "engine": lambda subject: candidates.engine_candidate(subject, subject.config),
}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(None, None, None)


@pytest.mark.parametrize("size", ["one", "many"])
@pytest.mark.parametrize("runtime", CANDIDATES)
def test_model(size, runtime, subject, batch, timed):
    count = 1 if size == "one" else batch
    candidate = CANDIDATES[runtime](subject)
    images = sample_images(count, subject.config.image_size, seed=2)
    expected = evaluate(build_reference(candidate.config, subject.checkpoint).to(subject.device), images).logits
    images = images.to(subject.device, subject.dtype)
    with torch.no_grad():
        agreement = (candidate.call(images).argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()
    timed(
        lambda: candidate.call(images),
        expected,
        f"{subject.config.arch}, batch {count}",
        model=subject.config.arch,
        keep_rate=candidate.keep_rate,
        runtime=runtime,
        variant=None,
        device=subject.device.type,
        batch=count,
        gmacs=candidate.gmacs,
        params=subject.params(candidate.config),
        peak_mib=None,
        top1_agreement=agreement,
    )
