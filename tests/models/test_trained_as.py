"""A file trained as another function than its keys describe: EViT's is one, others are refused by name."""

import argparse

import pytest
import torch
from golden_cases import state_dict

import dvit_infer as dvit

HEADS = {"num_heads": 2}
EVIT = {"model": "deit_small_patch16_shrink_base", "base_keep_rate": 0.7, "drop_loc": "(1, 3)", "fuse_token": True}


def file(predictors: bool = False, **args) -> dict:
    state = {key: w for key, w in state_dict("tiny-deit", 1).items() if predictors or "predictor" not in key}
    return {"model": state, "args": argparse.Namespace(**args)}


@pytest.mark.parametrize(
    ("args", "method"),
    [
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
    engine = dvit.convert(file(tome_r=13), assume=HEADS, method="none", device="cpu")
    engine.save(tmp_path / "m.safetensors")
    assert dvit.convert(tmp_path / "m.safetensors", device="cpu").config == engine.config


@pytest.mark.parametrize(
    ("args", "settings", "blocks", "read"),
    [
        (EVIT, (0.7, True), (1, 3), {"keep_rate", "prune_at", "fuse"}),
        ({"base_keep_rate": 0.5}, (0.5, False), (1, 2, 3), {"keep_rate"}),
        ({"drop_loc": "[3, 0, 3]", "fuse_token": False}, (0.7, False), (0, 3), {"prune_at", "fuse"}),
        ({"drop_loc": "2,", "fuse_token": True}, (0.7, True), (2,), {"prune_at", "fuse"}),
        ({"drop_loc": [3, 1], "base_keep_rate": 0.9}, (0.9, False), (1, 3), {"prune_at", "keep_rate"}),
        ({"model": "evit_tiny"}, (0.7, False), (1, 2, 3), set()),
    ],
)
def test_evits_files_are_evit_by_their_trainers_args(args, settings, blocks, read):
    engine = dvit.convert(file(**args), assume=HEADS, device="cpu")
    config = engine.config
    assert (config.reduction.method, config.reduction.blocks) == ("evit", blocks)
    assert config.reduction.settings == (("keep_rate", settings[0]), ("fuse", settings[1]), ("score", "class"))
    notes = {note.what: note for note in engine.notes}
    assert notes["method"].how == "read"
    names = {"keep_rate": "base_keep_rate", "prune_at": "drop_loc", "fuse": "fuse_token"}
    for what, name in names.items():
        assert notes[what].how == ("read" if what in read else "assumed")
        assert what not in read or notes[what].why == f"the file's args: {name}"
    assert dvit.verify(engine, file(**args), num_images=2).passed


def test_an_evit_may_run_as_something_else_and_by_other_settings(tmp_path):
    content = {**file(**EVIT), "args": EVIT}  # a dict, as others write it
    given = dvit.convert(content, assume=HEADS | {"fuse": False}, keep_rate=0.9, prune_at=(2,), device="cpu")
    assert (str(given.config.reduction), given.config.reduction.blocks) == ("evit 0.9 fuse=false: 177 of 196", (2,))
    dense = dvit.convert(content, assume=HEADS, method="none", device="cpu")
    assert next((note.how, note.value) for note in dense.notes if note.what == "trained as") == ("given", "EViT")
    assert str(dense.config.reduction) == "dense"
    for method in ("random", "tome"):
        assert dvit.convert(content, assume=HEADS, method=method, device="cpu").config.reduction.method == method
    evit = dvit.convert(content, assume=HEADS, device="cpu")
    for engine in (evit, dense):
        engine.save(tmp_path / "m.safetensors")
        assert dvit.load(tmp_path / "m.safetensors", device="cpu").config == engine.config
        assert dvit.convert(tmp_path / "m.safetensors", device="cpu").config == engine.config
    assert dvit.load(tmp_path / "m.safetensors", device="cpu", method="evit", keep_rate=0.7).config.num_keep[0] == 138


def test_an_evits_positions_are_resampled_as_its_own_code_does():
    engine = dvit.convert(file(**EVIT), assume=HEADS, device="cpu", image_size=160)
    said = next(note for note in engine.notes if note.what == "pos_embed")
    assert said.why.startswith("bicubic without antialiasing")


def test_a_distilled_evit_keeps_its_distillation_token_and_says_so():
    content = file(**EVIT)
    model = content["model"]
    model |= {"dist_token": model["cls_token"].flip(2)}
    model |= {f"head_dist.{part}": model[f"head.{part}"].flip(0) for part in ("weight", "bias")}
    model["pos_embed"] = torch.cat([model["pos_embed"][:, :1], model["pos_embed"]], dim=1)
    engine = dvit.convert(content, assume=HEADS, device="cpu")
    assert str(engine.config.reduction) == "evit 0.7: 138,98 of 196"
    assert next(note for note in engine.notes if note.what == "dist_token").value == "always kept"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"base_keep_rate": 0}, "base_keep_rate: 0 is neither"),
        ({"base_keep_rate": -0.5}, "base_keep_rate: -0.5 is neither"),
        ({"base_keep_rate": float("nan")}, "base_keep_rate: nan is neither"),
        ({"base_keep_rate": "0.7\n"}, r"base_keep_rate: '0.7\\n' is neither"),
        ({"drop_loc": "__import__('os')"}, r'drop_loc: "__import__\(\'os\'\)" is not a list of block indices'),
        ({"drop_loc": "(1, (2, 3))"}, "drop_loc: .* is not a list"),
        ({"drop_loc": "(" * 5000}, "drop_loc: .* is not a list"),
        ({"drop_loc": "(1, 1.5)"}, "drop_loc: .* is not a list"),
        ({"drop_loc": ["1", None]}, "drop_loc: .* is not a list"),
        ({"drop_loc": {1: 2}}, "drop_loc: .* is not a list"),
        ({"drop_loc": torch.ones(3, 3)}, "drop_loc: .* is not a list"),
        ({"drop_loc": "(3, 6, 9)"}, "drop_loc: there is no block 6; the model has blocks 0 to 3"),
        ({"drop_loc": "(-1, 2)"}, "drop_loc: there is no block -1"),
        ({"drop_loc": []}, "drop_loc: no block is given"),
        ({"fuse_token": "yes"}, "fuse_token: 'yes' is not true or false"),
    ],
)
def test_bad_args_of_an_evit_are_named(args, message, tmp_path):
    path = tmp_path / "evit.pth"
    torch.save(file(**EVIT | args), path)
    with pytest.raises(dvit.InputError, match=rf"evit\.pth: {message}") as caught:
        dvit.convert(path, assume=HEADS, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(dvit.convert(path, assume=HEADS, method="none", device="cpu").config.reduction) == "dense"


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
