"""Recognising: from keys and shapes alone, with what was read, assumed and given told apart."""

import argparse

import numpy as np
import pytest
import torch
from golden_cases import CASES, EVERY_CASE, official_checkpoint, options, state_dict

import dvit_infer as dvit
from dvit_infer.config import Config
from dvit_infer.models.checkpoint import Checkpoint, read_checkpoint
from dvit_infer.models.example import example_shapes
from dvit_infer.models.reading import Note
from dvit_infer.models.registry import build_reference, recognise
from dvit_infer.models.vit.archs import ARCHS

NAMES = {
    "dynamicvit-deit-256-r0.7-s1": "dynamicvit-deit-256",
    "dynamicvit-deit-s-r0.7-s1": "dynamicvit-deit-s",
    "dynamicvit-lvvit-s-r0.7-s1": "dynamicvit-lvvit-s",
    "timm-deit_tiny_patch16_224": "deit-t",
    "timm-deit_small_distilled_patch16_224": "deit-s-distilled",
    "tlt-lvvit_t": "lvvit-t",
    "tlt-lvvit_m": "lvvit-m",
    "tiny-deit-r0.7-s1": "dynamicvit-deit-64x4",
}


def config_of(source, arch=None, method=None, image_size=None, **given) -> tuple[Config, dict[str, Note]]:
    config, notes = recognise(read_checkpoint(source), arch, given, {"method": method, "image_size": image_size})
    return config, {note.what: note for note in notes}


@pytest.mark.parametrize("case_id", [case for case in EVERY_CASE if case.id in NAMES])
def test_names_and_heads(case_id):
    case = CASES[case_id]
    config, notes = config_of(official_checkpoint(case_id), **options(case_id).get("assume", {}))
    assert config.arch == NAMES[case_id]
    assert config.num_heads == case.get("num_heads", config.num_heads)
    assert config.skip_lam == case.get("skip_lam", config.skip_lam)
    assert notes["arch"].how == "read"
    assert config.num_keep == tuple(case.get("kept", ()))
    assert config.num_classes == (10 if "tiny-" in case_id else 1000)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_named_architecture_is_recognised_from_its_shapes(arch):
    shapes = example_shapes(arch)
    checkpoint = Checkpoint("shapes", {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    config, _ = recognise(checkpoint, None, {}, {})
    sizes = ARCHS[arch]
    found = (config.arch, config.num_heads, config.depth, config.skip_lam, len(config.prune_at), config.num_prefix)
    assert found == (arch, sizes.num_heads, sizes.depth, sizes.skip_lam, sizes.num_predictors, sizes.num_prefix)


def test_what_the_file_says_is_read_and_what_it_does_not_is_assumed():
    config, notes = config_of(official_checkpoint("dynamicvit-deit-s-r0.7-s1"))
    assert (config.keep_rate, notes["keep_rate"].how) == (0.7, "read")
    assert "base_rate" in notes["keep_rate"].why
    assert notes["num_heads"].how == notes["prune_at"].how == "assumed"
    bare, notes = config_of(official_checkpoint("dynamicvit-deit-s-r0.7-s1")["model"])
    assert (bare.keep_rate, notes["keep_rate"].how) == (0.7, "assumed")
    half, notes = config_of(official_checkpoint("dynamicvit-deit-s-r0.7-s1"), keep_rate=0.5)
    assert (half.keep_rate, notes["keep_rate"].how) == (0.5, "given")
    assert half.num_keep == (98, 49, 24)


def test_our_own_training_files_say_everything_in_args():
    args = argparse.Namespace(num_heads=2, prune_at=[0, 1, 2], skip_lam=3.0, base_rate=0.9)
    config, notes = config_of({"model": state_dict("tiny-lvvit", 1), "args": args})
    assert (config.num_heads, config.prune_at, config.skip_lam, config.keep_rate) == (2, (0, 1, 2), 3.0, 0.9)
    assert {notes[what].how for what in ("num_heads", "prune_at", "skip_lam", "keep_rate")} == {"read"}
    given, _ = config_of(
        {"model": state_dict("tiny-lvvit", 1), "args": args}, num_heads=4, skip_lam=1.0, prune_at=(1, 2, 3)
    )
    assert (given.num_heads, given.prune_at, given.skip_lam) == (4, (1, 2, 3), 1.0)


@pytest.mark.parametrize(("rate", "kept"), [(0.7, (137, 96, 67)), (0.5, (98, 49, 24)), (0.9, (176, 158, 142))])
def test_keep_counts_are_the_official_ones(rate, kept):
    assert config_of(official_checkpoint("tiny-deit-r0.7-s1"), keep_rate=rate)[0].num_keep == kept


def test_listed_architectures():
    names = dvit.list_archs()
    for name in ("dynamicvit-deit-t", "dynamicvit-deit-b", "dynamicvit-lvvit-m", "deit-b-distilled", "lvvit-l"):
        assert name in names


@pytest.mark.parametrize(
    "key",
    [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "blocks.0.norm1.weight",
        "blocks.3.mlp.fc2.bias",
        "blocks.2.attn.qkv.weight",
        "norm.weight",
        "head.weight",
        "head.bias",
        "score_predictor.1.in_conv.0.weight",
        "score_predictor.2.out_conv.4.bias",
    ],
)
def test_a_missing_or_misshapen_key_is_named(key):
    state = state_dict("tiny-deit", 1)
    without = {k: v for k, v in state.items() if k != key}
    with pytest.raises(dvit.InputError, match=f"missing key {key}"):
        dvit.convert({"model": without}, assume={"num_heads": 2})
    for wrong in (state[key][..., :-1], state[key][None], torch.zeros(0)):
        with pytest.raises(dvit.InputError, match=key.split(".")[0]):
            dvit.convert({"model": state | {key: wrong}}, assume={"num_heads": 2})


@pytest.mark.parametrize("key", ["blocks.0.ls1.gamma", "foo", "head.extra"])
def test_an_unexpected_key_is_named(key):
    with pytest.raises(dvit.InputError, match=f"unexpected key {key}"):
        dvit.convert({"model": state_dict("tiny-deit", 1) | {key: torch.ones(64)}}, assume={"num_heads": 2})


def test_lvvit_keys_that_do_not_belong_are_named():
    state, assume = state_dict("tiny-lvvit", 1), {"num_heads": 2, "skip_lam": 2.0}
    with pytest.raises(dvit.InputError, match=r"unexpected key blocks\.0\.attn\.qkv\.bias"):
        dvit.convert(state | {"blocks.0.attn.qkv.bias": torch.zeros(192)}, assume=assume)
    for key in ("aux_head.weight", "patch_embed.bn2.running_var", "patch_embed.conv1.weight"):
        with pytest.raises(dvit.InputError, match=f"missing key {key}"):
            dvit.convert({k: v for k, v in state.items() if k != key}, assume=assume)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet50"}, r"arch: 'resnet50' does not exist.*dynamicvit-deit-s"),
        ({"arch": "lvvit-s"}, "arch: lvvit-s was requested"),
        ({"arch": "deit-s"}, "score predictors"),
        ({"arch": "dynamicvit-deit-s"}, r"missing key blocks\.4\."),
        ({"keep_rate": 0}, "keep_rate: 0"),
        ({"keep_rate": 1.5}, "keep_rate: 1.5"),
        ({"keep_rate": float("nan")}, "keep_rate: nan"),
        ({"keep_rate": "0.7"}, "keep_rate: '0.7'"),
        ({"keep_rate": 0.1}, "keep_rate: a keep rate of 0.1 leaves no patch token of the 196 .* at stage 2"),
        ({"prune_at": (3, 3, 3)}, "prune_at: 3,3,3 is not strictly increasing"),
        ({"prune_at": (1, 2, 4)}, "prune_at: there is no block 4"),
        ({"prune_at": (-1, 1, 2)}, "prune_at: there is no block -1"),
        ({"prune_at": (1, 2)}, "prune_at: 2 given"),
        ({"image_size": 230}, "image_size: 230x230 is not a multiple of the patch size 16"),
        ({"image_size": (224, 100)}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 16}, "image_size: .* leaves no patch token of the 1 of a 16x16 image"),
        ({"image_size": (224, 224, 3)}, "image_size"),
        ({"image_size": 1 << 20}, "image_size"),
        ({"method": "ats"}, "method: 'ats' is not one of predictor, evit, tome, random, none"),
        ({"assume": {"num_heads": 3}}, "num_heads: 3 does not divide"),
        ({"assume": {"num_heads": 0}}, "num_heads"),
        ({"assume": {"nonsense": 1}}, "assume: 'nonsense'"),
        ({"assume": {"mean": (1, 2)}}, "mean"),
        ({"assume": {"std": (1.0, 0.0, 1.0)}}, "std"),
        ({"assume": {"eps": -1.0}}, "eps"),
        ({"assume": {"weights": "model_ema"}}, "weights='model_ema'"),
        ({"assume": {"trained_size": (208, 224)}}, "trained_size"),
        ({"assume": {"trained_size": 0}}, "trained_size"),
        ({"assume": {"skip_lam": 2.0}}, "skip_lam: means nothing for dynamicvit-deit"),
        ({"assume": {3: 4}}, "assume: 3"),
        ({"assume": "num_heads=2"}, "assume: a dict"),
        ({"arch": ["deit-s"]}, "arch: "),
        ({"image_size": (16, 1 << 20)}, "image_size: .* too large"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    chosen = {"assume": {"num_heads": 2}} | arguments
    with pytest.raises(dvit.InputError, match=message) as caught:
        dvit.convert(official_checkpoint("tiny-deit-r0.7-s1"), **chosen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [{"base_rate": 7.0}, {"base_rate": "x"}, {"num_heads": 2.5}, {"prune_at": "3,6,9"}, {"mean": ["a", "b", "c"]}],
)
def test_nonsense_in_the_files_args_is_named(said):
    with pytest.raises(dvit.InputError, match=next(iter(said)).replace("base_rate", "keep_rate")):
        dvit.convert({"model": state_dict("tiny-deit", 1), "args": {"num_heads": 2} | said})


def test_pruning_options_mean_nothing_without_predictors():
    dense = official_checkpoint("timm-deit_tiny_patch16_224")
    for arguments in ({"keep_rate": 0.7}, {"prune_at": (3, 6, 9)}, {"method": "predictor"}):
        with pytest.raises(dvit.InputError, match=f"{next(iter(arguments))}: .*predictors"):
            dvit.convert(dense, **arguments)


def test_a_grid_that_is_not_square_has_to_be_said(tmp_path):
    state = state_dict("tiny-lvvit", 1)
    state["pos_embed"] = torch.randn(1, 1 + 4 * 8, 64)
    assume = {"num_heads": 2, "skip_lam": 2.0}
    with pytest.raises(dvit.InputError, match="trained_size"):
        dvit.convert(state, assume=assume)
    engine = dvit.convert(state, assume=assume | {"trained_size": (64, 128)}, device="cpu")
    assert engine.config.grid == (4, 8)
    engine.save(tmp_path / "m.safetensors")
    assert dvit.load(tmp_path / "m.safetensors", device="cpu").config == engine.config


def test_an_unknown_family_is_said_with_the_known_ones():
    with pytest.raises(dvit.InputError, match=r"no known family.*layer1.*dynamicvit-deit-s"):
        dvit.convert({"layer1.weight": torch.ones(3)})


@pytest.mark.parametrize(
    "key", ["blocks.99999999999.norm1.weight", "blocks.4000.norm1.weight", "score_predictor.700.x"]
)
def test_made_up_block_numbers_build_nothing(key):
    with pytest.raises(dvit.InputError):
        dvit.convert(state_dict("tiny-deit", 1) | {key: torch.ones(64)}, assume={"num_heads": 2})


def test_float64_and_float16_sources_give_float32_references():
    for dtype in (torch.float64, torch.float16):
        state = {k: v.to(dtype) for k, v in state_dict("tiny-deit", 1).items()}
        model = build_reference(config_of(state, num_heads=2)[0], read_checkpoint(state))
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_trainers_other_arguments_are_not_taken_for_facts_about_the_model():
    args = {"num_heads": 2, "eps": 1e-8, "method": "distill", "image_size": 256, "mean": "imagenet", "std": 0.02}
    config, notes = config_of({"model": state_dict("tiny-deit", 1), "args": args})
    assert (config.eps, config.method, config.image_size, config.std[0]) == (1e-6, "predictor", (224, 224), 0.229)
    assert notes["method"].how == "read"
    own = config_of({"model": state_dict("tiny-deit", 1), "args": args | {"mean": (0.5, 0.5, 0.5), "num_heads": None}})
    assert own[0].mean == (0.5, 0.5, 0.5)
    assert own[1]["num_heads"].how == "assumed"


@pytest.mark.parametrize(("depth", "skip_lam"), [(4, 2.0), (12, 1.0), (16, 2.0), (24, 3.0)])
def test_skip_lam_is_assumed_by_depth(depth, skip_lam):
    state = state_dict("tiny-lvvit", 1)
    block = {k.removeprefix("blocks.0."): v for k, v in state.items() if k.startswith("blocks.0.")}
    state = {k: v for k, v in state.items() if not k.startswith("blocks.")}
    state |= {f"blocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}
    config, notes = config_of(state, num_heads=2)
    assert (config.skip_lam, notes["skip_lam"].how) == (skip_lam, "assumed")


def test_numpy_numbers_are_numbers():
    chosen = {"num_heads": np.int64(2), "keep_rate": np.float32(0.5), "prune_at": range(1, 4)}
    config, _ = config_of(state_dict("tiny-deit", 1), image_size=np.int64(192), **chosen)
    assert (config.num_heads, config.keep_rate, config.prune_at, config.image_size) == (2, 0.5, (1, 2, 3), (192, 192))


def test_a_loaded_state_dict_is_copied():
    state = state_dict("tiny-deit", 1)
    engine = dvit.convert(state, device="cpu", assume={"num_heads": 2})
    model = dvit.load_reference(state, assume={"num_heads": 2})
    before = model.head.weight.clone()
    state["head.weight"].zero_()
    assert torch.equal(model.head.weight, before)
    assert dvit.verify(engine, state_dict("tiny-deit", 1), num_images=2).passed


def test_too_many_predictors_and_heads_without_rows_are_named():
    state = state_dict("tiny-deit", 1)
    with pytest.raises(dvit.InputError, match=r"score_predictor\.7: there are only 4 blocks"):
        dvit.convert(state | {"score_predictor.7.in_conv.0.weight": torch.ones(64)})
    empty = {"head.weight": torch.zeros(0, 64), "head.bias": torch.zeros(0)}
    with pytest.raises(dvit.InputError, match=r"head\.weight has shape \(0, 64\)"):
        dvit.convert(state | empty)


@pytest.mark.parametrize("key", ["head.weight", "head.bias"])
def test_of_two_head_tensors_that_disagree_both_are_named(key):
    state = state_dict("tiny-deit", 1)
    with pytest.raises(dvit.InputError, match=r"head\.bias.*head\.weight"):
        dvit.convert(state | {key: state[key][:9]}, assume={"num_heads": 2})
