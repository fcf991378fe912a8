"""A file that was trained as another function than its keys describe is refused by name, unless a method is given."""

import argparse

import pytest
import torch
from golden_cases import state_dict

import dvit_infer as dvit

HEADS = {"num_heads": 2}
EVIT = {"model": "deit_small_patch16_shrink_base", "base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)", "fuse_token": True}


def file(predictors: bool = False, **args) -> dict:
    state = {key: w for key, w in state_dict("tiny-deit", 1).items() if predictors or "predictor" not in key}
    return {"model": state, "args": argparse.Namespace(**args)}


@pytest.mark.parametrize(
    ("args", "method"),
    [
        (EVIT, "EViT"),
        ({"base_keep_rate": 0.7}, "EViT"),
        ({"drop_loc": "(3, 6, 9)", "fuse_token": False}, "EViT"),
        ({"model": "evit_tiny"}, "EViT"),
        ({"model": "avit_tiny_patch16_224"}, "A-ViT"),
        ({"model": "deit_tiny", "ponder_token_scale": 5e-4, "gate_scale": 10.0}, "A-ViT"),
        ({"model": "tome_deit_small"}, "ToMe"),
        ({"tome_r": 13}, "ToMe"),
        ({"arch": "spvit_small"}, "SPViT"),
        ({"model": "topk_small_patch16_224", "keep_rate": [0.7], "reduction_loc": [3, 6, 9]}, "TokenReduction's topk"),
        ({"model": "dyvit_small", "keep_rate": [0.7], "reduction_loc": [3, 6, 9]}, "TokenReduction's dyvit_small"),
    ],
)
def test_another_method_is_refused_by_name(args, method):
    content = file(**args)
    with pytest.raises(dvit.InputError, match=f"was trained as {method}.*: another function than .* --method none"):
        dvit.convert(content, assume=HEADS)
    engine = dvit.convert(content, assume=HEADS, method="none", device="cpu")
    note = next(note for note in engine.notes if note.what == "trained as")
    assert note.how == "given"
    assert note.value.startswith(method)
    assert str(engine.config.reduction) == "dense"


def test_a_converted_one_needs_no_method_again(tmp_path):
    engine = dvit.convert(file(**EVIT), assume=HEADS, method="none", device="cpu")
    engine.save(tmp_path / "m.safetensors")
    assert dvit.convert(tmp_path / "m.safetensors", device="cpu").config == engine.config


@pytest.mark.parametrize(
    "args",
    [
        EVIT | {"base_keep_rate": 1.0},  # it drops nothing
        {"model": "deit_small_patch16_224", "tome_r": 0, "prop_attn": False},
        {"model": "deit_tiny_patch16_224", "keep_rate": [0.7], "reduction_loc": [3, 6, 9]},  # TokenReduction's baseline
        {"model": "tomentum", "epochs": 3},
        {"model": 3},
        {"fuse_token": torch.ones(3), "reduction_loc": torch.ones(3), "mean": torch.ones(3), "keep_rate": "x"},
        {
            "pretrained_cfg": {"global_pool": torch.ones(3), "mean": torch.ones(3)},
            "imagenet_default_mean_and_std": True,
        },
    ],
)
def test_a_dense_model_is_none_of_them(args):
    assert not dvit.convert(file(**args), assume=HEADS, device="cpu").config.reduction.stages


def test_token_reductions_dynamicvit_is_read_by_its_own_names():
    args = {"model": "dyvit_small", "keep_rate": [0.5], "reduction_loc": [0, 1, 3]}
    engine = dvit.convert(file(True, **args), assume=HEADS, device="cpu")
    assert (engine.config.keep_rate, engine.config.prune_at) == (0.5, (0, 1, 3))
    assert engine.config.num_keep == (98, 49, 24)
    notes = {note.what: note for note in engine.notes}
    assert (notes["prune_at"].how, notes["prune_at"].why) == ("read", "the file's args: reduction_loc")
    assert notes["keep_rate"].why == "the file's args: keep_rate"
    powers = file(True, **args | {"keep_rate": [0.5, 0.25, 0.125]})
    assert dvit.convert(powers, assume=HEADS, device="cpu").config == engine.config
    others = file(True, **args | {"keep_rate": [0.9, 0.5, 0.3]})
    with pytest.raises(dvit.InputError, match=r"DynamicViT with keep rates 0\.9,0\.5,0\.3, not r, r\^2, r\^3"):
        dvit.convert(others, assume=HEADS)


def test_a_dynamic_model_without_its_predictors_is_said_to_be_one():
    notes = dvit.convert(file(model="deit-s", base_rate=0.7), assume=HEADS, device="cpu").notes
    said = [note for note in notes if note.what == "trained as"]
    assert [note.value for note in said] == ["deit-s", "DynamicViT"]
    assert "no predictors" in said[1].why
