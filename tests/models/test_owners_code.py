"""A model in timm's code or in that of transformers: what they are asked for; modules that record it stand for them."""

import pytest
import torch
from any_vit import tiny
from golden_vits import case_images, size_of, state_dict, write
from stand_ins import StandIns

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.registry import build_reference, recognise
from dvit_infer.models.source import WeightSource
from dvit_infer.models.vit.in_timm import in_timm
from dvit_infer.models.vit.in_transformers import in_transformers


@pytest.fixture
def stand_ins(monkeypatch):
    return StandIns(monkeypatch)


def of_file(case, folder):
    """What a builder takes, of a golden case's file."""
    source = write(case, folder / "model")
    checkpoint = read_checkpoint(source)
    config = recognise(checkpoint, None, {}, {"image_size": size_of(case)})[0]
    weights = build_reference(config, checkpoint).state_dict()
    return config, weights, checkpoint.beside, WeightSource(source, checkpoint).tensors_in_file


def of_kind(kind, **other):
    model = tiny(kind, **other)
    return model.config, model.state, {}, dict


def test_an_architecture_that_timm_names_is_built_by_its_name(stand_ins, tmp_path):
    case = "timm-eva02_tiny_patch14_224-d4-tame"
    config, weights, beside, in_file = of_file(case, tmp_path)
    beside["config.json"]["model_args"] |= {"pretrained": True, "checkpoint_path": "x"}  # no facts of a model
    stand_ins.timm(lambda: dvit.load_reference(tmp_path / "model"))
    model = in_timm(config, weights, beside, in_file)
    assert all(torch.equal(w, weights[key]) for key, w in model.state_dict().items())
    asked = {"img_size": size_of(case), "num_classes": config.num_classes, "embed_dim": 192, "depth": 4, "num_heads": 3}
    assert stand_ins.given == {"arch": "eva02_tiny_patch14_224", "global_pool": "avg", **asked, "in_chans": 3}


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (
            "dinov2-registers",
            {"reg_tokens": 3, "mlp_layer": "SwiGLUPacked", "mlp_ratio": 3.0, "act_layer": "silu", "init_values": 1e-5},
        ),
        ("clip", {"pre_norm": True, "fc_norm": True, "act_layer": "quick_gelu", "num_classes": 0, "mlp_ratio": 1.5}),
        ("qk-norm", {"qk_norm": True, "qkv_bias": False, "class_token": False, "global_pool": "avg"}),
    ],
)
def test_other_models_are_timms_class_with_their_parts(kind, asked, stand_ins):
    stand_ins.timm(tiny(kind).reference)
    model = in_timm(*of_kind(kind))
    assert asked.items() <= stand_ins.given.items()
    assert stand_ins.given["norm_layer"](8).eps == 1e-6
    images = tiny(kind).images()
    assert torch.equal(model(images), tiny(kind).reference()(images))


@pytest.mark.parametrize(
    ("case", "kind", "answer", "config"),
    [
        ("hf-vit-tiny-at-64x128", "ViTForImageClassification", "logits", "ViTConfig"),
        ("hf-deit-tiny-teacher", "DeiTForImageClassificationWithTeacher", "logits", "DeiTConfig"),
        ("hf-dinov2-tiny", "Dinov2ForImageClassification", "logits", "Dinov2Config"),
        ("hf-clip-full-tiny", "CLIPVisionModelWithProjection", "image_embeds", "CLIPVisionConfig"),
        ("hf-vitmae-tiny", "ViTModel", "last_hidden_state", "ViTConfig"),
    ],
)
def test_a_file_of_hugging_face_is_loaded_by_its_own_names(case, kind, answer, config, stand_ins, tmp_path):
    stand_ins.transformers(kind, answer, config)
    given = of_file(case, tmp_path)
    model = in_transformers(*given)
    assert stand_ins.given["attn_implementation"] == "sdpa"
    assert stand_ins.given["state_dict"].keys() == state_dict(case).keys()
    assert "vision_config" not in stand_ins.given
    assert model.options == ({"interpolate_pos_encoding": True} if "-at-" in case else {})
    if "-at-" not in case:
        images = case_images(case)
        torch.testing.assert_close(model(images), dvit.load_reference(tmp_path / "model")(images), atol=2e-5, rtol=0)
    stand_ins.missing = {"norm.weight"}
    with pytest.raises(dvit.InputError, match=f"transformers finds no norm.weight in the file for its {kind}"):
        in_transformers(*given)


@pytest.mark.parametrize(
    ("kind", "other", "name"),
    [
        ("deit", {"no_qkv_bias": True, "act": "gelu_tanh"}, "ViTForImageClassification"),
        ("distilled", {}, "DeiTForImageClassificationWithTeacher"),
        ("teacher", {}, "DeiTForImageClassification"),
    ],
)
def test_a_vit_of_another_owner_gets_the_names_of_hugging_face(kind, other, name, stand_ins):
    stand_ins.transformers(name)
    model = tiny(kind, size=(32, 32), **other)
    images = model.images()
    found = in_transformers(model.config, model.state, {}, dict)(images)
    torch.testing.assert_close(found, model.reference()(images), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("build", "kind", "why"),
    [
        (in_timm, "dinov2", "timm has no dinov2: its head reads the class token and the mean of the patches"),
        (in_timm, "eva02", "timm has no eva02: it has rotary positions, and no name"),
        (in_timm, "beit", r"timm has no beit: blocks.0.attn.q_bias has shape none in its PlainViT, \(64,\) here"),
        (in_transformers, "mixed", "transformers has no mixed: its ViT answers by the class token"),
        (in_transformers, "dinov3", "transformers has no dinov3: its ViT has learned positions"),
        (in_transformers, "pooler", "transformers has no pooler: its ViT has no pre_logits.fc.weight"),
    ],
)
def test_what_a_package_does_not_have_is_said(build, kind, why, stand_ins):
    stand_ins.timm(tiny("deit").reference)
    with pytest.raises(dvit.InputError, match=f"compare: {why}.*; leave t.* out$"):
        build(*of_kind(kind))
