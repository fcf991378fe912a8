"""timm's config.json names an architecture: what it leaves unsaid is known, and what it says counts."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from owners_files import timms

import dvit_infer as dvit
from dvit_infer.models.beside import facts_of
from dvit_infer.models.vit.described import SOUND
from dvit_infer.models.vit.timm_config import DEFAULTS, arch_of, timm_archs, timm_facts
from dvit_infer.utils.packages import import_beside_torchvision

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
EVA02 = {"kind": "index", "theta": 10000.0, "ref": 16, "offset": 0.0, "xy": False, "half": False}
DINOV3 = {"kind": "centered", "theta": 100.0, "ref": 0, "offset": 0.0, "xy": False, "half": True}


def facts(architecture, model_args=None, **content):
    config = {"architecture": architecture, "model_args": model_args or {}, **content}
    return {what: value for what, (value, _) in timm_facts(config).items()}


@pytest.mark.parametrize(
    ("name", "heads", "eps", "act", "pool", "images", "crop_pct"),
    [  # of timm's own models
        ("vit_small_patch16_224", 6, 1e-6, "gelu", "token", HALF, 0.9),
        ("vit_base_patch14_dinov2", 12, 1e-6, "gelu", "token", IMAGENET, 1.0),
        ("vit_giant_patch14_reg4_dinov2", 24, 1e-6, "silu", "token", IMAGENET, 1.0),
        ("vit_so400m_patch14_siglip_224", 16, 1e-6, "gelu", "map", HALF, 0.9),
        ("vit_so400m_patch16_siglip_256", 16, 1e-6, "gelu_tanh", "map", HALF, 0.9),
        ("vit_giant_patch14_224", 16, 1e-6, "gelu", "token", HALF, 0.9),
        ("vit_gigantic_patch14_224", 16, 1e-6, "gelu", "token", HALF, 0.9),
        ("vit_huge_patch14_224", 16, 1e-6, "gelu", "token", HALF, 0.9),
        ("vit_base_patch16_siglip_gap_224", 12, 1e-6, "gelu", "mean", HALF, 0.9),
        ("vit_medium_patch16_gap_240", 8, 1e-6, "gelu", "mean", HALF, 0.95),
        ("vit_medium_patch16_reg4_gap_256", 8, 1e-6, "gelu", "mean", HALF, 0.95),
        ("vit_base_patch16_clip_quickgelu_224", 12, 1e-5, "quick_gelu", "token", CLIP, 1.0),
        ("vit_base_patch16_clip_224", 12, 1e-5, "gelu", "token", CLIP, 0.95),
        ("deit3_medium_patch16_224", 8, 1e-6, "gelu", "token", IMAGENET, 0.9),
        ("deit_small_distilled_patch16_224", 6, 1e-6, "gelu", "token", IMAGENET, 0.9),
        ("flexivit_small", 6, 1e-6, "gelu", "token", HALF, 0.95),
        ("beit_base_patch16_224", 12, 1e-6, "gelu", "mean", HALF, 0.9),
        ("eva02_base_patch14_448", 12, 1e-6, "silu", "mean", CLIP, 1.0),
        ("vit_small_patch16_dinov3_qkvb", 6, 1e-5, "gelu", "mean", IMAGENET, 1.0),
        ("vit_small_plus_patch16_dinov3", 6, 1e-5, "silu", "mean", IMAGENET, 1.0),
    ],
)
def test_the_facts_of_an_architecture_are_timms(name, heads, eps, act, pool, images, crop_pct):
    found = facts(name)
    assert (found["num_heads"], found["eps"], found["act"], found["pool"]) == (heads, eps, act, pool)
    assert ((found["mean"], found["std"]), found["crop_pct"], found["interpolation"]) == (images, crop_pct, "bicubic")
    assert (found["owner"], found["model"], found["resample"]) == ("timm", name, "timm")
    assert ("map_heads" in found, "map_act" in found) == ((pool == "map"),) * 2
    assert "unsupported" not in found


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("vit_small_patch16_224", "none"),
        ("eva_giant_patch14_224", "none"),
        ("eva02_tiny_patch14_224", EVA02),
        ("eva02_base_patch14_448", EVA02),
        ("vit_base_patch16_rope_reg1_gap_256", EVA02),
        ("vit_small_patch16_rope_224", EVA02 | {"theta": 100.0, "ref": 0, "xy": True}),
        ("vit_small_patch16_rope_mixed_224", {**EVA02, "kind": "mixed", "theta": 10.0, "ref": 0, "xy": True}),
        ("vit_small_patch16_dinov3", DINOV3),
        ("vit_pe_core_base_patch16_224", EVA02 | {"ref": 14, "offset": 1.0, "xy": True}),
        ("vit_pe_spatial_large_patch14_448", EVA02 | {"ref": 32, "offset": 1.0, "xy": True}),
    ],
)
def test_rotary_positions_are_described_in_full(name, rope):
    assert facts(name)["rope"] == rope


def test_every_architecture_has_sound_facts_or_a_reason_why_it_is_not_read():
    assert len(timm_archs()) > 270
    for name in timm_archs():
        found = facts(name)
        assert all(SOUND[what](value) for what, value in found.items() if what in SOUND), name
        if "unsupported" not in found:
            assert {"num_heads", "eps", "act", "pool", "rope", "embed_dim", "depth", "mlp_dim"} <= found.keys(), name
            assert not found["embed_dim"] % found["num_heads"], name
    assert not {"any_size", *DEFAULTS} & facts("vit_small_patch16_224").keys() - {
        *("act", "eps", "rope", "patch_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    }


@pytest.mark.parametrize(
    ("name", "args", "changed"),
    [
        ("vit_giant_patch14_reg4_dinov2", {"embed_dim": 384, "num_heads": 6}, {"embed_dim": 384, "num_heads": 6}),
        ("vit_small_patch16_224", {"depth": 4, "patch_size": [8, 8]}, {"depth": 4, "patch_size": 8}),
        ("vit_small_patch16_224", {"global_pool": "avg"}, {"pool": "mean"}),
        ("vit_small_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, {"pool": "mean_all"}),
        ("vit_small_patch16_224", {"act_layer": "quick_gelu"}, {"act": "quick_gelu"}),
        ("vit_base_patch16_clip_224", {"norm_layer": "layernorm"}, {"eps": 1e-6}),
        ("vit_base_patch16_siglip_224", {"num_heads": 6}, {"num_heads": 6, "map_heads": 6}),
        ("vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh"}, {"act": "gelu_tanh", "map_act": "gelu_tanh"}),
        ("vit_pe_core_base_patch16_224", {"num_heads": 6, "attn_pool_num_heads": 4}, {"map_heads": 4}),
        ("vit_so150m_patch16_reg4_map_256", {"reg_tokens": 0}, {"pool": "map", "map_heads": 14}),
        ("eva02_small_patch14_224", {"swiglu_mlp": False}, {"act": "gelu"}),
        ("eva02_small_patch14_224", {"use_rot_pos_emb": False}, {"rope": "none"}),
        ("eva02_small_patch14_224", {"rope_type": "dinov3"}, {"rope": {**EVA02, "kind": "centered", "ref": 0}}),
        ("eva02_small_patch14_224", {"ref_feat_shape": [7, 7]}, {"rope": {**EVA02, "ref": 7}}),
        ("eva02_small_patch14_224", {"rope_rotate_half": True, "qk_norm": True}, {"rope": {**EVA02, "half": True}}),
        ("vit_small_patch16_224", {"img_size": 96, "drop_rate": 0.1, "act_layer": None, "proj_bias": True}, {}),
    ],
)
def test_model_args_override_the_architecture(name, args, changed):
    found = facts(name, args)
    assert {what: found[what] for what in changed} == changed
    assert "unsupported" not in found


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("vit_small_patch16_224", {"global_pool": ""}, "global_pool is '': it returns tokens, no embedding"),
        ("vit_small_patch16_224", {"global_pool": "max"}, "global_pool is 'max': its head reads the largest"),
        ("vit_small_patch16_224", {"act_layer": "relu"}, "act_layer is relu"),
        ("vit_small_patch16_224", {"norm_layer": "rmsnorm"}, "norm_layer is rmsnorm"),
        ("vit_small_patch16_224", {"proj_bias": False}, "proj_bias is False"),
        ("vit_small_patch16_224", {"attn_layer": "diff"}, "attn_layer is diff"),
        ("vit_small_patch16_224", {"tomorrow": "\x1b[31m"}, "tomorrow is ?[31m"),
        (
            "eva02_small_patch14_224",
            {"rope_type": "mrope"},
            "its rotary positions are of another kind: rope_type mrope",
        ),
        ("eva02_small_patch14_224", {"ref_feat_shape": [7, 8]}, "its rotary positions are of another kind"),
        ("eva02_small_patch14_224", {"use_post_norm": True}, "use_post_norm is True"),
        ("vit_base_patch16_rpn_224", {}, "its blocks are ResPostBlock"),
        ("vit_dlittle_patch16_reg1_gap_256", {}, "its attn is a DiffAttention"),
        ("vit_base_r50_s16_224", {}, "its patch_embed is a HybridEmbed"),
    ],
)
def test_what_cannot_be_read_says_why(name, args, why):
    assert facts(name, args)["unsupported"].startswith(why)
    config = {"architecture": name, "model_args": args}
    reason, where = facts_of({"config.json": config}, {})[0]["unsupported"]
    assert where == f"config.json: {f'model_args.{next(iter(args))}' if args else f'architecture {name}'}"
    assert f"{reason} ({where})".endswith(f"; dvit_infer does not read such models yet ({where})")
    assert reason.isprintable()


def test_towers_of_open_clip_that_timm_does_not_have_say_why():
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_medium_patch16_gpa_256"}}}
    reason, where = facts_of({"open_clip_config.json": config}, {})[0]["unsupported"]
    assert "the nearest of them: vit_medium_patch16_gap_256, " in reason
    assert where == "open_clip_config.json: model_cfg.vision_cfg.timm_model_name"


def test_the_architectures_images_stand_for_a_description_that_is_missing():
    assert "mean" not in facts("vit_small_patch16_224", pretrained_cfg={"std": [0.3] * 3})
    assert "mean" not in facts("vit_small_patch16_224", std=[0.3] * 3)  # as timm wrote it before 2023
    assert "image_size" not in facts("vit_small_patch16_224")  # its position embedding shows it
    assert facts("vit_small_patch16_dinov3")["image_size"] == 256
    stated = {"architecture": "vit_small_patch16_224", "num_classes": 7, "pretrained_cfg": {"mean": [0.1] * 3}}
    found, unused = facts_of({"config.json": stated}, {})
    assert (found["mean"], found["num_classes"]) == (
        ([0.1] * 3, "config.json: pretrained_cfg.mean"),
        (7, "config.json: num_classes"),
    )
    assert found["num_heads"] == (6, "config.json: architecture vit_small_patch16_224")
    assert not unused


def test_names_with_tags_and_names_of_before_are_known():
    assert arch_of("vit_base_patch16_224.augreg_in21k")[0] == "vit_base_patch16_224"
    assert arch_of("vit_base_patch16_224_in21k")[0] == "vit_base_patch16_224"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vit_smal_patch16_224", "; the nearest of them: vit_small_patch16_224, "),
        ("resnet50", "; dvit_infer does not read such models yet$"),
        ("\x1b[31m" + "x" * 10_000, "; dvit_infer does not read such models yet$"),
    ],
)
def test_an_unknown_architecture_is_answered_by_the_nearest_ones(name, nearest):
    with pytest.raises(dvit.InputError, match=f"is none of the 2.. plain vision transformers of timm 1.*{nearest}"):
        timm_facts({"architecture": name})
    found, _ = facts_of({"config.json": {"architecture": name, "pretrained_cfg": {"mean": [0.1] * 3}}}, {})
    assert found["unsupported"][0].isprintable()
    assert found["mean"][0] == [0.1] * 3  # its weights may be of another family


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({"depth": "12"}, "depth"),
        ({"num_heads": -3}, "num_heads"),
        ({"embed_dim": 1 << 40}, "embed_dim"),
        ({"patch_size": [16, 8]}, "patch_size"),
        ({"num_classes": True}, "num_classes"),
    ],
)
def test_values_that_make_no_sense_are_refused(args, what):
    found, _ = facts_of({"config.json": {"architecture": "vit_small_patch16_224", "model_args": args}}, {})
    assert what not in found
    assert found["unsupported"][0].startswith(f"model_args.{what} is ")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timms_modules_say_what_the_file_says():
    path = Path(__file__).parents[2] / "bench" / "timm_archs.py"
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    timm = import_beside_torchvision("timm")
    names = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_base_patch16_siglip_224")
    assert {name: script.entry(timm.create_model(name)) for name in names} == {
        name: timm_archs()[name] for name in names
    }


def test_arch_takes_timms_names_with_tags_and_names_of_before():
    state = {key: w for key, w in timms().items() if "head" not in key}
    for name in ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224_in21k"):
        with pytest.raises(
            dvit.InputError, match=r"architecture vit_tiny_patch16_224 .given. says embed_dim 192, but its weights"
        ):
            dvit.convert(state, arch=name, device="cpu")
    with pytest.raises(dvit.InputError) as caught:
        dvit.convert(state, arch="aimv2_1b_patch14_224", device="cpu")
    why = "it has a norm in patch_embed; dvit_infer does not read such models yet"
    assert str(caught.value) == f"arch: aimv2_1b_patch14_224 is not supported: {why}"
    for name in ("vit_tiny_patch17_224", "resnet50", "", 3):
        with pytest.raises(dvit.InputError, match=f"arch: {name!r} does not exist; these do: "):
            dvit.convert(state, arch=name, device="cpu")
