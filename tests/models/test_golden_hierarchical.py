"""Swin, ConvNeXt and their dynamic forms give the official models' answers, as references and as engines."""

import json

import pytest
import torch
from golden_cases import FLOPS, same_kept
from hierarchical_cases import CASES, EVERY_CASE, HERE, answers, checkpoint, images, kept_of, options

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.registry import outline, recognise

TOLERANCE = 2e-5


def check(case, logits, kept, features):
    golden = answers(case)
    assert (logits - golden["logits"]).abs().max() < TOLERANCE
    assert same_kept(kept, kept_of(golden), golden.get("margin", torch.empty(len(logits), 0)))
    assert [stage.shape[1] for stage in kept] == CASES[case].get("kept", [])
    if "features" in golden:
        assert (features - golden["features"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_reference_agrees(case):
    out = dvit.load_reference(checkpoint(case), **options(case)).evaluate(images(case))
    check(case, out.logits, out.kept, out.features)


@pytest.mark.parametrize("case", ["tiny-swin-r0.7-tame", "tiny-cnn-r0.7-tame", "timm-tiny-swin-tame"])
def test_engine_agrees_saved_and_loaded_too(case, tmp_path):
    engine = dvit.convert(checkpoint(case), device="cpu", **options(case))
    check(case, *engine(images(case), return_kept=True), engine.features(images(case)))
    engine.save(tmp_path / "m.safetensors")
    again = dvit.load(tmp_path / "m.safetensors", device="cpu")
    assert again.config == engine.config
    assert torch.equal(again(images(case)), engine(images(case)))


KEYS = {name: name for name in (case["keys"] for case in CASES.values())}
for size, word in (("s", "small"), ("b", "base")):  # the same models under timm's names
    KEYS |= {
        f"dense-swin-{size}": f"timm-swin_{word}_patch4_window7_224",
        f"dense-convnext-{size}": f"timm-convnext_{word}",
    }
MODELS = [
    pytest.param(name, marks=() if name.endswith("-t") else pytest.mark.slow)
    for name in FLOPS
    if "swin" in name or "cnn" in name or "convnext" in name
]


@pytest.mark.parametrize("model", MODELS)
def test_macs_and_params_are_fvcores(model):
    shapes = json.loads((HERE / "keys" / f"{KEYS[model]}.json").read_text())
    checkpoint = read_checkpoint({name: torch.zeros(shape) for name, (_, shape) in shapes.items()})
    for rate, gmacs in FLOPS[model]["gmacs"].items():
        given = {"keep_rate": float(rate)} if "dynamic" in model else {}
        config, _ = recognise(checkpoint, None, given, {})
        assert outline(config).gmacs == pytest.approx(gmacs, rel=5e-3)
    assert checkpoint.params(None) == FLOPS[model]["params"]
