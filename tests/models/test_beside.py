"""Preprocessing is read from timm's and Hugging Face's files beside the weights; what is assumed is remembered."""

import argparse
import json
import os

import pytest
import torch
from golden_cases import official_checkpoint, state_dict
from safetensors.torch import save_file

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.header import header_text
from dvit_infer.models.registry import config_of

HEADS = {"num_heads": 2}
ARCH = {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 64, "depth": 4, "num_heads": 2}}
TIMM = {"mean": [0.15, 0.16, 0.17], "std": [0.3, 0.31, 0.32], "crop_pct": 0.95, "interpolation": "bicubic"}


def dense() -> dict[str, torch.Tensor]:
    return {key: w for key, w in state_dict("tiny-deit", 1).items() if "predictor" not in key}


def converted(folder, assume=HEADS, **files):
    """The engine of a dense model in a folder with these JSON files, and its notes by name."""
    folder.mkdir(exist_ok=True)
    save_file(dense(), folder / "model.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    engine = dvit.convert(folder / "model.safetensors", device="cpu", assume=assume)
    return engine, {note.what: note for note in engine.notes}


def test_timms_config_beside_the_file_is_read(tmp_path):
    engine, notes = converted(tmp_path, None, config={**ARCH, "num_classes": 10, "pretrained_cfg": TIMM})
    assert (engine.config.mean, engine.config.std) == ((0.15, 0.16, 0.17), (0.3, 0.31, 0.32))
    assert (engine.config.crop_pct, engine.config.num_heads, engine.config.assumed) == (0.95, 2, ())
    assert (notes["mean"].how, notes["mean"].why) == ("read", "config.json: pretrained_cfg.mean")
    old, notes = converted(tmp_path, config={**ARCH, **TIMM})  # as timm wrote it before 2023
    assert (old.config.mean, notes["std"].why) == ((0.15, 0.16, 0.17), "config.json: std")


def test_the_order_is_the_callers_the_files_and_then_what_lies_beside(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM | {"mean": [0.1] * 3}}))
    args = argparse.Namespace(mean=[0.2] * 3)
    torch.save({"model": dense(), "args": args, "pretrained_cfg": {"std": [0.4] * 3}}, tmp_path / "a.pth")
    config = dvit.convert(tmp_path / "a.pth", device="cpu", assume=HEADS).config
    assert (config.mean, config.std, config.crop_pct) == ((0.2,) * 3, (0.4,) * 3, 0.95)
    given = dvit.convert(tmp_path / "a.pth", device="cpu", assume=HEADS | {"mean": (0.6,) * 3}).config
    assert (given.mean, given.std) == ((0.6,) * 3, (0.4,) * 3)
    dvit.convert(tmp_path / "a.pth", device="cpu", assume=HEADS).save(tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM | {"std": [0.9] * 3}}))
    assert dvit.load(tmp_path / "m.safetensors", device="cpu").config == config


def test_another_size_beside_the_file_is_the_one_to_run_at(tmp_path):
    engine, notes = converted(tmp_path, config={"pretrained_cfg": TIMM | {"input_size": [3, 192, 256]}})
    assert (engine.config.image_size, engine.config.trained_size) == ((192, 256), (224, 224))
    assert notes["image_size"].why == "config.json: pretrained_cfg.input_size"
    with pytest.raises(dvit.InputError, match=r"config\.json: pretrained_cfg\.input_size: 225x225 is not a multiple"):
        converted(tmp_path, config={"pretrained_cfg": {"input_size": [3, 225, 225]}})


@pytest.mark.parametrize(
    ("found", "mean", "std", "crop_pct"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "size": 256, "crop_size": 224}, 0.5, 0.4, 0.875),
        ({"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "size": {"shortest_edge": 224}}, 0.5, 0.4, 1.0),
        ({"image_mean": 0.5, "image_std": 0.4, "size": {"height": 224, "width": 224}}, 0.5, 0.4, 1.0),
        ({"image_mean": [51.0] * 3, "image_std": [102.0] * 3, "do_rescale": False}, 0.2, 0.4, None),
        ({"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5}, 0.5, 0.5, None),
        ({"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "do_normalize": False}, 0.0, 1.0, None),
    ],
)
def test_hugging_faces_preprocessor_is_read(found, mean, std, crop_pct, tmp_path):
    config = converted(tmp_path, preprocessor_config=found)[0].config
    assert config.mean == pytest.approx((mean,) * 3)
    assert config.std == pytest.approx((std,) * 3)
    assert config.crop_pct == crop_pct
    assert config.assumed == (("crop_pct",) if crop_pct is None else ())


@pytest.mark.parametrize("where", ["args", "caller", "config"])
def test_a_mean_of_0_to_255_is_recognised(where, tmp_path):
    facts = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    torch.save({"model": dense(), "args": facts if where == "args" else {}}, tmp_path / "a.pth")
    if where == "config":
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": facts}))
    engine = dvit.convert(tmp_path / "a.pth", device="cpu", assume=HEADS | (facts if where == "caller" else {}))
    assert engine.config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert engine.config.std == pytest.approx((0.229, 0.224, 0.225))
    note = next(note for note in engine.notes if note.what == "std")
    assert note.value == "0.229,0.224,0.225"
    assert note.why.endswith("for pixels of 0 to 255; divided by 255")


def test_a_mean_of_0_to_255_without_a_std_takes_the_std_with_it():
    facts = {"mean": (123.675, 116.28, 103.53), "std": (1, 1, 1)}
    config = dvit.convert(dense(), device="cpu", assume=HEADS | facts).config
    assert config.std == pytest.approx((1 / 255,) * 3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "is no JSON object, or too large"),
        ('{"x": "' + "x" * (16 << 20) + '"}', "is no JSON object, or too large"),
        ({"pretrained_cfg": TIMM, "num_classes": 1000}, "describes another model: num_classes 1000"),
        ({"pretrained_cfg": {"mean": "abc"}}, "pretrained_cfg.mean is abc"),
        ({"pretrained_cfg": {"std": [1, 2, 0]}}, "pretrained_cfg.std is 1,2,0"),
        ({"pretrained_cfg": {"mean": {"\x1b[31m": "\n"}}}, "pretrained_cfg.mean is {"),
        ({"pretrained_cfg": {"crop_mode": "\x1b[31msquash"}}, "pretrained_cfg.crop_mode is ?[31msquash"),
        ({"pretrained_cfg": {"mean": [float("nan")] * 3}}, "pretrained_cfg.mean is nan"),
        ({"pretrained_cfg": {"crop_pct": 7}}, "pretrained_cfg.crop_pct is 7"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "pretrained_cfg.interpolation is random"),
        ({"pretrained_cfg": {"interpolation": 2}}, "pretrained_cfg.interpolation is 2"),
    ],
)
def test_what_is_not_used_of_a_file_is_said(content, why, tmp_path):
    engine, notes = converted(tmp_path, config=content)
    assert notes["config.json"].value == "not used"
    assert notes["config.json"].why.startswith(why)
    assert notes["config.json"].why.isprintable()
    assert engine.config.assumed == ("mean", "std", "crop_pct")


def test_what_is_no_file_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "preprocessor_config.json").mkdir()
    engine, notes = converted(tmp_path)
    assert engine.config.assumed == ("mean", "std", "crop_pct")
    assert not {"config.json", "preprocessor_config.json"} & notes.keys()


def test_other_files_beside_say_nothing(tmp_path):
    engine, notes = converted(tmp_path, config={"compilerOptions": {"mean": [1, 2, 3]}}, package={"name": "x"})
    assert engine.config.assumed == ("mean", "std", "crop_pct")
    assert "config.json" not in notes
    assert read_checkpoint({"model": dense()}).beside == {}


def test_pooling_and_activation_of_timms_config_count(tmp_path):
    body = converted(tmp_path, config=ARCH | {"global_pool": "avg"})[0].config.body
    assert (body.pool, body.act) == ("mean", "gelu")
    other = {**ARCH, "model_args": ARCH["model_args"] | {"act_layer": "quick_gelu"}}
    body = converted(tmp_path, config=other)[0].config.body
    assert (body.pool, body.act) == ("token", "quick_gelu")
    with pytest.raises(dvit.InputError, match="global_pool is 'max': its head reads the largest of the patches"):
        converted(tmp_path, config=ARCH | {"global_pool": "max"})


def test_a_saved_file_remembers_what_was_assumed_until_it_is_given(tmp_path):
    engine, notes = converted(tmp_path)
    assert notes["crop_pct"].how == notes["mean"].how == "assumed"
    engine.save(tmp_path / "m.safetensors")
    again = dvit.load(tmp_path / "m.safetensors", device="cpu")
    assert again.config == engine.config
    assert again.config.assumed == ("mean", "std", "crop_pct")
    given = dvit.convert(tmp_path / "m.safetensors", device="cpu", assume={"mean": (0.5,) * 3})
    assert given.config.assumed == ("std", "crop_pct")


@pytest.mark.parametrize("value", [["eps"], "mean", [1], {"mean": 1}])
def test_a_header_that_says_otherwise_is_refused(value):
    config = dvit.convert(dense(), device="cpu", assume=HEADS).config
    header = json.loads(header_text(config))
    header["config"]["assumed"] = value
    with pytest.raises(dvit.InputError, match="assumed"):
        config_of("f", json.dumps(header))
    del header["config"]["assumed"]  # a file of an earlier version
    assert config_of("f", json.dumps(header)).assumed == ()


def test_a_file_of_a_trainer_with_one_preprocessing_assumes_nothing():
    for case in ("tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"):
        source = official_checkpoint(case)
        for one in (source, source["model"]):
            assert dvit.convert(one, device="cpu", assume=HEADS).config.assumed == ()
    lvvit = {key: w for key, w in state_dict("tiny-lvvit", 1).items() if "predictor" not in key}
    assert dvit.convert(lvvit, device="cpu", assume=HEADS).config.assumed == ()
    for args in ({"model": "deit_small_patch16_224"}, {"imagenet_default_mean_and_std": True, "crop_pct": 0.9}):
        assert dvit.convert({"model": dense(), "args": args}, device="cpu", assume=HEADS).config.assumed == ()
    halves = {"model": dense(), "args": {"imagenet_default_mean_and_std": False, "eval_crop_ratio": 1.0}}
    config = dvit.convert(halves, device="cpu", assume=HEADS).config
    assert (config.mean, config.std, config.crop_pct, config.assumed) == ((0.5,) * 3, (0.5,) * 3, 1.0, ())
