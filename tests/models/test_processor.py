"""Hugging Face's image processors: their files, what these leave out, and what the type of a model implies.

Values and pixels were compared with transformers 5.24's own processors (its Pillow classes), which give the same.
"""

import json

import numpy as np
import pytest
import torch
from drawn import draw
from golden_cases import state_dict
from PIL import Image
from safetensors.torch import save_file

import dvit_infer as dvit
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.models.beside import facts_of
from dvit_infer.models.preprocessing import preprocess_for

HALF, IMAGENET = [0.5] * 3, [0.485, 0.456, 0.406]
OPENAI = [0.48145466, 0.4578275, 0.40821073]
STATED = {"image_mean": HALF, "image_std": HALF}


def found(content, name="preprocessor_config.json", **others):
    """The facts of a processor's file by name, and the remarks."""
    facts, unused = facts_of({**others, name: content}, {})
    return {what: value for what, (value, _) in facts.items()}, [why for _, why in unused]


def prepared(facts):
    return tuple(facts.get(what) for what in ("crop_mode", "crop_pct", "interpolation"))


@pytest.mark.parametrize(
    ("kind", "expected", "mean"),
    [
        ("ViT", ("squash", 1.0, "bilinear"), HALF),
        ("DeiT", ("squash", 0.875, "bicubic"), HALF),
        ("Bit", ("center_floor", 1.0, "bicubic"), OPENAI),
        ("CLIP", ("center_floor", 1.0, "bicubic"), OPENAI),
        ("Siglip", ("squash", 1.0, "bicubic"), HALF),
        ("Beit", ("squash", 1.0, "bicubic"), HALF),
        ("DINOv3ViT", ("squash", 1.0, "bilinear"), IMAGENET),
    ],
)
@pytest.mark.parametrize("suffix", ["ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"])
def test_what_a_file_leaves_out_is_what_its_class_does(kind, suffix, expected, mean):
    key = "feature_extractor_type" if suffix == "FeatureExtractor" else "image_processor_type"
    facts, remarks = found({key: kind + suffix, "crop_size": None, "do_center_crop": None})
    assert (prepared(facts), list(facts["mean"]), remarks) == (expected, mean, [])
    assert "image_size" not in facts  # nothing states one: the weights do


@pytest.mark.parametrize(
    ("content", "size", "expected"),
    [
        ({"image_processor_type": "ViTImageProcessor", "size": 384}, [384, 384], ("squash", 1.0, "bilinear")),
        ({"image_processor_type": "ViTImageProcessor", "size": [192, 256]}, [192, 256], ("squash", 1.0, "bilinear")),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 192, "width": 256}, "resample": 3},
            [192, 256],
            ("squash", 1.0, "bicubic"),
        ),
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336},
            [336, 336],
            ("center_floor", 1.0, "bicubic"),
        ),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224},
            [224, 224],
            ("center_floor", 0.875, "bicubic"),
        ),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 438, "crop_size": 384, "resample": 1},
            [384, 384],
            ("squash", 384 / 438, "lanczos"),
        ),
        (
            {"feature_extractor_type": "BeitFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True},
            [224, 224],
            ("squash", 0.875, "bicubic"),
        ),
        ({"image_processor_type": "BeitImageProcessor", "size": 256, "crop_size": 224}, [256, 256], None),
        ({**STATED, "size": {"height": 224, "width": 224}}, [224, 224], ("squash", 1.0, None)),
        ({**STATED, "size": 256, "crop_size": 224}, [224, 224], ("center_floor", 0.875, None)),
        ({**STATED, "size": 256, "crop_size": 224, "do_center_crop": False}, [256, 256], ("squash", 1.0, None)),
    ],
)
def test_the_forms_of_sizes_and_crops(content, size, expected):
    facts, remarks = found(content)
    assert facts["image_size"] == size
    assert prepared(facts) == (expected or ("squash", 1.0, "bicubic"))
    assert remarks == []


@pytest.mark.parametrize("number", range(6))
def test_filters_are_pillows_numbers(number):
    facts, _ = found({**STATED, "resample": number})
    assert Image.Resampling[facts["interpolation"].upper()] == number


@pytest.mark.parametrize(
    ("content", "remark", "left"),
    [
        ({"resample": 99}, "resample is 99; none of Pillow's filters", "interpolation"),
        ({"resample": [3]}, "resample is 3; none of Pillow's filters", "interpolation"),
        ({"resample": True}, "resample is True; none", "interpolation"),
        ({"size": []}, "size is ", "crop_mode"),
        ({"size": "\x1b[31m224"}, "size is ?[31m224", "crop_mode"),
        ({"size": 0}, "size is 0", "crop_mode"),
        ({"size": 10**400}, "size is 1000", "crop_mode"),
        ({"size": {"height": 224}}, "size is {", "crop_mode"),
        ({"size": {"shortest_edge": "x"}}, "size is {", "crop_mode"),
        ({"size": {"longest_edge": 300}}, "size is {'longest_edge': 300}; images keep their aspect ratio", "crop_mode"),
        ({"size": {"max_height": 3, "max_width": 4}}, "size is {", "crop_mode"),
        ({"crop_size": [1, 2, 3], "do_center_crop": True}, "crop_size is 1,2,3", "image_size"),
        ({"do_center_crop": "no"}, "do_center_crop is no", None),
        ({"do_resize": False, "size": 224}, "do_resize is False; here images are resized", "crop_mode"),
        ({"rescale_factor": "x"}, "rescale_factor is x", None),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000", None),
        ({"image_mean": [0.5, 0.5]}, "image_mean is 0.5,0.5", "mean"),
        ({"image_mean": "abc", "do_rescale": False}, "image_mean is abc", "mean"),
        ({"image_std": [10**400] * 3, "do_rescale": False}, "image_std is 1000", "std"),
        ({"image_std": 0}, "image_std is 0,0,0", "std"),
        ({"size": 224, "crop_size": 256, "do_center_crop": True}, "crop_size is 256; images get a margin", None),
        ({"size": 256, "crop_size": [224, 192], "do_center_crop": True}, "crop_size is 224,192; of another", None),
        ({"image_processor_type": "SiglipImageProcessor", "size": 384}, "size is 384; images keep their", None),
        ({"size": {"shortest_edge": 224}}, "size is {'shortest_edge': 224}; images keep their aspect ratio", None),
        ({"image_processor_type": "OddImageProcessor"}, "its type, OddImageProcessor, is not known", None),
        ({"image_processor_type": ["ViT"]}, "its type, ViT, is not known", None),
        (
            {"image_processor_type": "Siglip2ImageProcessor"},
            "max_num_patches is 256; images keep their aspect ratio in at most so many patches",
            None,
        ),
    ],
)
def test_what_is_not_used_is_said(content, remark, left):
    facts, remarks = found({**STATED, **content})
    assert any(why.startswith(remark) for why in remarks), remarks
    assert all(why.isprintable() and len(why) < 200 for why in remarks)
    assert left not in facts


def test_other_files_of_the_name_say_nothing():
    assert found({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}) == ({}, [])
    assert found({"processor_class": "CLIPProcessor"}, "processor_config.json") == ({}, [])


def test_a_processor_within_a_processors_file_comes_first():
    inner = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64}}}
    old = {**STATED, "size": 224, "image_mean": [0.1] * 3}
    facts, _ = facts_of({"processor_config.json": inner, "preprocessor_config.json": old}, {})
    assert facts["image_size"] == ([64, 64], "processor_config.json: size")
    assert facts["mean"] == ((0.5,) * 3, "processor_config.json: SiglipImageProcessor's own image_mean")


def test_a_file_that_does_not_name_its_class_is_of_the_models_type():
    facts, _ = found({**STATED, "size": 256, "crop_size": 224}, **{"config.json": {"model_type": "deit"}})
    assert prepared(facts) == ("squash", 0.875, "bicubic")
    facts, _ = found({**STATED, "size": 384}, **{"config.json": {"model_type": "vit"}})
    assert prepared(facts) == ("squash", 1.0, "bilinear")


@pytest.mark.parametrize(
    ("model_type", "mean", "expected"),
    [
        ("vit", HALF, ("squash", 1.0, "bilinear")),
        ("deit", IMAGENET, ("squash", 0.875, "bicubic")),
        ("dinov2", IMAGENET, ("center_floor", 0.875, "bicubic")),
        ("dinov2_with_registers", IMAGENET, ("center_floor", 0.875, "bicubic")),
        ("dinov3_vit", IMAGENET, ("squash", 1.0, "bilinear")),
        ("clip_vision_model", OPENAI, ("center_floor", 1.0, "bicubic")),
        ("siglip", HALF, ("squash", 1.0, "bicubic")),
        ("beit", HALF, ("squash", 1.0, "bicubic")),
        ("bert", None, (None, None, None)),
        (["vit"], None, (None, None, None)),
    ],
)
def test_without_a_file_the_type_of_the_model_implies_it(model_type, mean, expected):
    facts, remarks = found({"model_type": model_type}, "config.json")
    assert (facts.get("mean") and list(facts["mean"]), prepared(facts), remarks) == (mean, expected, [])
    of_images = {"mean", "std", "crop_pct", "crop_mode", "interpolation"}
    assert set(facts.get("by type", ())) == of_images & set(facts)


def converted(folder, assume=None, **files):
    folder.mkdir(exist_ok=True)
    weights = {key: w for key, w in state_dict("tiny-deit", 1).items() if "predictor" not in key}
    save_file(weights, folder / "model.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    engine = dvit.convert(folder / "model.safetensors", device="cpu", assume={"num_heads": 2, **(assume or {})})
    return engine, {note.what: note for note in engine.notes}


def test_what_the_type_implies_is_assumed_and_stays_so(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 16}
    engine, notes = converted(tmp_path, config={"model_type": "dinov2", **sizes})
    config = engine.config
    assert (config.crop_mode, config.crop_pct, config.interpolation) == ("center_floor", 0.875, "bicubic")
    assert config.assumed == ("mean", "std", "crop_pct")
    assert {notes[what].how for what in ("mean", "std", "crop_pct", "crop_mode", "interpolation")} == {"assumed"}
    assert notes["mean"].why == "as published models of type dinov2; no file of their processor is there"
    engine.save(tmp_path / "m.safetensors")
    assert dvit.load(tmp_path / "m.safetensors", device="cpu").config == config
    engine, notes = converted(tmp_path, {"mean": (0.5,) * 3}, preprocessor_config={"image_std": HALF})
    assert (engine.config.mean, engine.config.std) == ((0.5,) * 3, (0.5,) * 3)
    assert engine.config.assumed == ()
    assert (notes["mean"].how, notes["interpolation"].how) == ("given", "read")


def test_a_saved_engine_prepares_images_as_the_file_did(tmp_path):
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 192, "width": 256}}
    engine, _ = converted(tmp_path, preprocessor_config=processor)
    assert engine.config.image_size == (192, 256)
    expected = Preprocess((192, 256), 1.0, "squash", "bilinear")
    engine.save(tmp_path / "m.safetensors")
    for one in (engine, dvit.load(tmp_path / "m.safetensors", device="cpu")):
        assert preprocess_for(one.config) == expected
    image = draw(1, 300, 200)
    resized = np.asarray(image.resize((256, 192), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(expected(image), resized)


def test_facts_are_given_by_name_and_by_number(tmp_path):
    engine, notes = converted(tmp_path, {"interpolation": 2, "crop_mode": "squash"})
    assert preprocess_for(engine.config) == Preprocess((224, 224), 1.0, "squash", "bilinear")
    assert engine.config.assumed == ("mean", "std")
    assert notes["crop_pct"].value == "none, images are warped"
    engine.save(tmp_path / "m.safetensors")
    again = dvit.convert(tmp_path / "m.safetensors", device="cpu", assume={"interpolation": "lanczos"})
    assert again.config.interpolation == "lanczos"
    assert torch.equal(again(torch.zeros(1, 3, 224, 224)), engine(torch.zeros(1, 3, 224, 224)))


@pytest.mark.parametrize(
    ("assume", "message"),
    [
        ({"interpolation": 6}, "interpolation: '6' is not one of nearest, lanczos"),
        ({"interpolation": True}, "interpolation: 'True' is not one of"),
        ({"interpolation": "random"}, "interpolation: 'random' is not one of"),
        ({"crop_mode": "border"}, "crop_mode: 'border' is not one of center, center_floor, squash"),
        ({"crop_mode": 1}, "crop_mode: '1' is not one of"),
    ],
)
def test_impossible_facts_are_refused(assume, message, tmp_path):
    with pytest.raises(dvit.InputError, match=message):
        converted(tmp_path, assume)


def test_images_that_a_family_warps_are_cropped_if_a_share_is_given():
    source = state_dict("tiny-deit", 1)
    given = {"num_heads": 2, "crop_mode": "center"}
    with pytest.raises(dvit.InputError, match="crop_mode: deit warps images of this size; assume crop_pct too"):
        dvit.convert(source, device="cpu", image_size=384, assume=given)
    config = dvit.convert(source, device="cpu", image_size=384, assume={**given, "crop_pct": 0.9}).config
    assert preprocess_for(config) == Preprocess((384, 384), 0.9)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({"interpolation": "bilinear", "crop_pct": 0.9}, Preprocess((224, 224), 0.9, "center", "bilinear")),
        ({"crop_mode": "squash", "crop_pct": 1.0}, Preprocess((224, 224), 1.0, "squash")),
        ({"crop_mode": "squash"}, Preprocess((224, 224), 0.875, "squash")),
        ({"crop_mode": None, "interpolation": None, "crop_pct": None}, Preprocess((224, 224), 0.875)),
        ({"crop_mode": "border", "crop_pct": 0.9}, Preprocess((224, 224), 0.9)),
        ({"interpolation": "random"}, Preprocess((224, 224), 0.875)),
    ],
)
def test_timms_description_says_it_in_its_words(cfg, expected, tmp_path):
    engine, _ = converted(tmp_path, config={"pretrained_cfg": cfg})
    assert preprocess_for(engine.config) == expected
    said = [f"pretrained_cfg.{key} is {value}" for key, value in cfg.items() if value in ("border", "random")]
    assert [note.why for note in engine.notes if note.value == "not used"] == said


def test_a_trainers_arguments_say_it_too():
    weights = {key: w for key, w in state_dict("tiny-deit", 1).items() if "predictor" not in key}
    args = {"num_heads": 2, "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    config = dvit.convert({"model": weights, "args": args}, device="cpu").config
    assert preprocess_for(config) == Preprocess((224, 224), 1.0, "squash", "bilinear")
    odd = {"num_heads": 2, "crop_mode": ["squash"], "interpolation": ""}  # timm's: the description's
    file = {"model": weights, "args": odd, "pretrained_cfg": {"interpolation": "bilinear"}}
    assert preprocess_for(dvit.convert(file, device="cpu").config) == Preprocess(
        (224, 224), 0.875, "center", "bilinear"
    )
