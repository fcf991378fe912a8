"""Hugging Face's config.json: what it states counts, and transformers' defaults where it is sparse."""

import pytest

from dvit_infer.models.beside import facts_of
from dvit_infer.models.vit.described import SOUND
from dvit_infer.models.vit.huggingface_config import _DEFAULTS, huggingface_facts

TINY = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 320, "image_size": 96}
TOWER = {**TINY, "patch_size": 16}
LABELS = {str(i): f"LABEL_{i}" for i in range(64)}
DINOV3 = {"kind": "centered", "theta": 100.0, "ref": 0, "offset": 0.0, "xy": False, "half": True}


def facts(content):
    return {what: value for what, (value, _) in huggingface_facts(content).items()}


@pytest.mark.parametrize(
    ("model_type", "written_by", "stated", "expected"),
    [
        ("vit", "ViTForImageClassification", {}, (1e-12, "gelu", "token", 320, 16)),
        ("vit", "ViTModel", {"layer_norm_eps": 1e-6}, (1e-6, "gelu", "token", 320, 16)),
        ("deit", "DeiTForImageClassificationWithTeacher", {}, (1e-12, "gelu", "token", 320, 16)),
        ("vit_mae", "ViTMAEModel", {}, (1e-12, "gelu", "token", 320, 16)),
        ("beit", "BeitForImageClassification", {}, (1e-12, "gelu", "mean", 320, 16)),
        ("beit", "BeitForImageClassification", {"use_mean_pooling": False}, (1e-12, "gelu", "token", 320, 16)),
        ("dinov2", "Dinov2ForImageClassification", {}, (1e-6, "gelu", "token_mean", 384, 14)),
        ("dinov2", "Dinov2Model", {"use_swiglu_ffn": True}, (1e-6, "silu", "token", 256, 14)),
        (
            "dinov2_with_registers",
            "Dinov2WithRegistersForImageClassification",
            {},
            (1e-6, "gelu", "token_mean", 384, 16),
        ),
        ("dinov3_vit", "DINOv3ViTModel", {}, (1e-5, "gelu", "token", 320, 16)),
        ("dinov3_vit", "DINOv3ViTModel", {"hidden_act": "silu"}, (1e-5, "silu", "token", 320, 16)),
        ("clip_vision_model", "CLIPVisionModelWithProjection", {}, (1e-5, "quick_gelu", "token", 320, 32)),
        ("clip_vision_model", "CLIPVisionModel", {"hidden_act": "gelu"}, (1e-5, "gelu", "token", 320, 32)),
        ("siglip_vision_model", "SiglipVisionModel", {}, (1e-6, "gelu_tanh", "map", 320, 16)),
        ("siglip2_vision_model", "Siglip2VisionModel", {}, (1e-6, "gelu_tanh", "map", 320, 16)),
    ],
)
def test_the_facts_of_every_type(model_type, written_by, stated, expected):
    patches = {"patch_size": expected[4]}
    found = facts({"model_type": model_type, "architectures": [written_by], **TINY, **patches, **stated})
    if model_type.startswith("dinov2"):  # its width follows from a ratio, of which a file need not say anything
        expected = (*expected[:3], found.get("mlp_dim"), expected[4])
    assert tuple(found.get(what) for what in ("eps", "act", "pool", "mlp_dim", "patch_size")) == expected
    assert (found["num_heads"], found["embed_dim"], found["depth"]) == (3, 96, 4)
    assert found["rope"] == (DINOV3 if model_type == "dinov3_vit" else "none")
    assert found["owner"] == "huggingface"
    assert found["model"] == model_type.removesuffix("_vision_model")
    assert found["resample"] == ("siglip2" if found["model"] == "siglip2" else "huggingface")
    assert all(SOUND[what](value) for what, value in found.items() if what in SOUND)
    assert "unsupported" not in found
    assert ("map_heads" in found) == (expected[2] == "map")


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("vit", (12, 1e-12, None)),
        ("dinov2", (12, 1e-6, None)),
        ("dinov3_vit", (6, 1e-5, 224)),
        ("clip", (12, 1e-5, None)),
        ("siglip_vision_model", (12, 1e-6, None)),
    ],
)
def test_a_file_with_a_type_alone_has_the_defaults_of_transformers(model_type, expected):
    found = facts({"model_type": model_type})
    assert tuple(found.get(what) for what in ("num_heads", "eps", "image_size")) == expected
    assert not found.keys() & {"embed_dim", "depth", "mlp_dim", "patch_size"}  # the shapes of the weights show them
    where = huggingface_facts({"model_type": model_type})["eps"][1]
    assert where == f"no layer_norm_eps, so transformers' for {model_type.removesuffix('_vision_model')}"


@pytest.mark.parametrize(
    ("model_type", "written_by", "pool"),
    [
        ("clip", "CLIPModel", "token"),
        ("clip", "CLIPForImageClassification", "mean"),
        ("siglip", "SiglipModel", "map"),
        ("siglip", "SiglipForImageClassification", "mean"),
    ],
)
def test_of_two_towers_the_one_for_images_is_read(model_type, written_by, pool):
    text = {"hidden_size": 32, "num_attention_heads": 2}
    found = facts(
        {"model_type": model_type, "architectures": [written_by], "vision_config": TOWER, "text_config": text}
    )
    assert (found["embed_dim"], found["num_heads"], found["image_size"], found["pool"]) == (96, 3, 96, pool)
    assert huggingface_facts({"model_type": "clip", "vision_config": TOWER})["depth"][1] == (
        "vision_config.num_hidden_layers"
    )


def test_clips_first_files_describe_their_tower_twice():
    twice = {"model_type": "clip", "vision_config": {"hidden_size": 768}, "vision_config_dict": {"hidden_size": 1024}}
    assert facts(twice)["embed_dim"] == 1024


def test_classes_are_those_of_a_classifier_alone():
    def classes(written_by, **content):
        return facts({"model_type": "vit", "architectures": [written_by], **content}).get("num_classes")

    assert classes("ViTForImageClassification", id2label=LABELS) == 64
    assert classes("ViTForImageClassification", id2label={}) == 0
    assert classes("ViTForImageClassification", num_labels=0) == 0
    assert classes("ViTForImageClassification") is None  # two by default, which was not always written
    assert classes("ViTModel", id2label={"0": "LABEL_0", "1": "LABEL_1"}) is None
    assert facts({"model_type": "vit", "id2label": LABELS}).get("num_classes") is None


def test_the_size_of_a_preprocessor_counts_before_that_of_the_position_embedding():
    def size(**preprocessor):
        content = {"model_type": "dinov2", "image_size": 518}
        return facts_of({"config.json": content, "preprocessor_config.json": preprocessor}, {})[0]["image_size"]

    at = "preprocessor_config.json: crop_size"
    assert size(image_mean=0.5) == (518, "config.json: image_size")
    assert size(image_mean=0.5, size={"shortest_edge": 256}, crop_size=224, do_center_crop=True) == ([224, 224], at)


@pytest.mark.parametrize("written_by", [[], None, "Dinov2Model", [3], ["MyClassifier"]])
def test_a_dinov2_of_an_unknown_class_leaves_pooling_to_its_weights(written_by):
    found = facts({"model_type": "dinov2", "architectures": written_by})
    assert "pool" not in found


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', none of Hugging Face's that are read here: vit, "),
        ({"model_type": "\x1b[31m"}, "model_type is '?[31m', none"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act is 'relu', none of gelu, gelu_python, "),
        ({"model_type": "vit", "hidden_act": ["gelu"]}, "hidden_act is 'gelu'"),
        ({"model_type": "vit", "pooler_act": "relu"}, "pooler_act is relu, which is not supported; dvit_infer does"),
        ({"model_type": "dinov3_vit", "mlp_bias": False}, "mlp_bias is False, which is not supported; dvit_infer"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "vision_use_head is false: it returns"),
        ({"model_type": "vit", "auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map names code that came with"),
    ],
)
def test_what_cannot_be_read_says_why(content, why):
    assert facts(content)["unsupported"].startswith(why)
    found, _ = facts_of({"config.json": content}, {})
    reason, where = found["unsupported"]
    assert reason.startswith(why)
    assert reason.isprintable()
    key = where.removeprefix("config.json: ")
    assert key == next(iter([name for name in content if name != "model_type"]), "model_type") or "." in key
    what_would_do = (
        "; dvit_infer does not read such models yet",
        "are read here: " + ", ".join(_DEFAULTS),
        "; without auto_map they are read as the model that model_type names",
    )
    assert reason.endswith(what_would_do)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", "12"),
        ("hidden_size", 0),
        ("layer_norm_eps", float("nan")),
        ("patch_size", [16, 8]),
        ("image_size", "224"),
        ("rope_theta", "100"),
        ("mlp_ratio", None),
    ],
)
def test_values_that_make_no_sense_are_refused_and_not_replaced_by_a_guess(key, value):
    model_type = "dinov3_vit" if key == "rope_theta" else "dinov2"
    found, unused = facts_of({"config.json": {"model_type": model_type, key: value}}, {})
    if value is None:
        assert "unsupported" not in found
    elif key == "image_size":  # whoever runs it may give another one
        assert key in str(unused)
    else:
        reason, where = found["unsupported"]
        assert reason.startswith(f"{key} is ")
        assert reason.endswith(", which is impossible")
        assert where == f"config.json: {key}"


def test_a_whole_number_may_be_written_with_a_point():
    found, _ = facts_of({"config.json": {"model_type": "vit", "num_attention_heads": 4.0}}, {})
    assert found["num_heads"] == (4, "config.json: num_attention_heads")
    assert isinstance(found["num_heads"][0], int)
