"""DynamicViT-DeiT-S/0.7 end to end: the reference, with PyTorch's fused attention, our engine dense and pruned."""

import pytest
import torch

from dvit_infer import ways
from dvit_infer.families import build_reference
from dvit_infer.images import sample_images
from dvit_infer.parity import evaluate
from dvit_infer.ways import Subject

WAYS = {
    "reference": ways.reference_way,
    "sdpa": ways.sdpa_way,
    "dense": ways.dense_way,
    "engine": lambda subject: ways.engine_way(subject, subject.config),
}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(None, None, None)


@pytest.mark.parametrize("size", ["one", "many"])
@pytest.mark.parametrize("runtime", WAYS)
def test_model(size, runtime, subject, batch, timed):
    count = 1 if size == "one" else batch
    way = WAYS[runtime](subject)
    images = sample_images(count, subject.config.image_size, seed=2)
    right = evaluate(build_reference(way.config, subject.checkpoint).to(subject.device), images).logits
    images = images.to(subject.device, subject.dtype)
    with torch.no_grad():
        agreement = (way.call(images).argmax(dim=1) == right.argmax(dim=1)).float().mean().item()
    timed(
        lambda: way.call(images),
        right,
        f"{subject.config.arch}, batch {count}",
        model=subject.config.arch,
        keep_rate=way.keep_rate,
        runtime=runtime,
        variant=None,
        device=subject.device.type,
        batch=count,
        gmacs=way.gmacs,
        params=subject.params(way.is_dense),
        peak_mib=None,
        top1_agreement=agreement,
    )
