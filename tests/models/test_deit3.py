"""Layer scale, no position for the class token, no qkv bias: as timm answers, exact in the graph, kept in a file."""

import json

import numpy as np
import pytest
import torch
from golden_cases import HERE, case_images, state_dict

import dvit_infer as dvit
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.evaluate.predictions import model_id
from dvit_infer.graph import fold
from dvit_infer.images.synthetic import image
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.fill import fill
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.models.registry import build_graph, build_reference
from dvit_infer.training.student import make_pair

HEADS = {"num_heads": 2}
# timm's DeiT III (1.0.31), seed 5; the head's weights times 3.5.
GOLDEN = {"timm-deit3_medium_patch16_224-d4": None, "timm-deit3_small_patch16_224-d4-at-160x256": (160, 256)}
PARTS = ("layer scale", "bare patches", "no qkv bias")


def variant(*parts: str, predictors: bool = False) -> dict[str, torch.Tensor]:
    """The tiny DeiT with some of `PARTS`."""
    state = state_dict("tiny-deit", 1)
    if not predictors:
        state = {key: w for key, w in state.items() if "predictor" not in key}
    if "layer scale" in parts:
        names = [f"blocks.{i}.ls{j}.gamma" for i in range(4) for j in (1, 2)]
        state |= {name: torch.from_numpy(fill(name, (64,), 1)) for name in names}
    if "bare patches" in parts:
        state["pos_embed"] = state["pos_embed"][:, 1:]
    if "no qkv bias" in parts:
        state = {key: w for key, w in state.items() if not key.endswith("qkv.bias")}
    return state


@pytest.mark.parametrize("case", GOLDEN)
def test_deit3_answers_as_in_timm(case):
    shapes = json.loads((HERE / "keys" / f"{case}.json").read_text())
    state = {key: torch.from_numpy(fill(key, tuple(shape), 5)) for key, (_, shape) in shapes.items()}
    state |= {key: w * 3.5 for key, w in state.items() if key.startswith("head.")}
    engine = dvit.convert(state, device="cpu", image_size=GOLDEN[case])
    images = torch.from_numpy(image(2, engine.config.image_size, 5))
    expected = torch.from_numpy(np.load(HERE / f"{case}.npz")["logits"])
    assert (engine(images) - expected).abs().max() < 2e-5
    assert (engine.config.body.layer_scale, engine.config.body.no_embed_class) == (True, True)
    assert preprocess_for(engine.config).crop_pct == 1.0


@pytest.mark.parametrize("parts", [PARTS, *((part,) for part in PARTS)], ids="+".join)
def test_it_is_verified_saved_and_pruned(parts, tmp_path):
    state = variant(*parts, predictors=True)
    engine = dvit.convert(state, assume=HEADS, device="cpu")
    report = dvit.verify(engine, state, num_images=2)
    assert report.passed, report
    assert report.first_difference is None
    assert engine.config.num_keep == (137, 96, 67)
    half = dvit.convert(state, assume=HEADS, device="cpu", dtype="bfloat16")
    assert dvit.verify(half, state, num_images=2).passed
    engine.save(tmp_path / "m.safetensors")
    again = dvit.load(tmp_path / "m.safetensors", device="cpu")
    images = case_images("tiny-deit-r0.7-s1")[:2]
    assert again.config == engine.config
    assert torch.equal(again(images), engine(images))
    assert dvit.convert(state, assume=HEADS, device="cpu", image_size=(96, 128))(images[..., :96, :128]).shape == (
        2,
        10,
    )


def test_the_unfolded_graph_scales_by_channel_too():
    checkpoint = read_checkpoint(variant("layer scale"))
    config = dvit.convert(checkpoint.state, assume=HEADS, device="cpu").config
    model = build_reference(config, checkpoint)
    graph, images = build_graph(model, config), case_images("tiny-deit-r0.7-s1")[:2]
    expected = model.evaluate(images).logits
    for one in (graph, fold(graph)):
        assert (TorchRunner(one).run(images).x - expected).abs().max() < 2e-5
    assert not any("gamma" in node.weights for node in fold(graph).nodes)
    assert fold(graph).nodes[1].folded[-1] == "layer scale"


def test_deit3s_own_names_of_layer_scale_are_read():
    state = variant("layer scale")
    own = {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): w for key, w in state.items()}
    images = case_images("tiny-deit-r0.7-s1")[:2]
    ours, theirs = (dvit.convert(s, assume=HEADS, device="cpu") for s in (state, own))
    assert torch.equal(ours(images), theirs(images))
    assert model_id(ours, state, preprocess_for(ours.config)) == model_id(theirs, own, preprocess_for(theirs.config))


def test_a_factor_or_bias_that_only_some_blocks_have_is_named():
    state = variant("layer scale")
    del state["blocks.2.ls2.gamma"]
    with pytest.raises(dvit.InputError, match=r"missing key blocks\.2\.ls2\.gamma"):
        dvit.convert(state, assume=HEADS)
    state = variant()
    del state["blocks.2.attn.qkv.bias"]
    with pytest.raises(dvit.InputError, match=r"missing key blocks\.2\.attn\.qkv\.bias"):
        dvit.convert(state, assume=HEADS)


def test_a_size_that_the_position_embedding_cannot_have_is_refused():
    """64 rows: 8x8 patches without a class row, or 7x9 with one; what the caller states must not decide in silence."""
    state = variant() | {"pos_embed": variant()["pos_embed"][:, :64]}
    engine = dvit.convert(state, assume=HEADS, device="cpu")
    assert (engine.config.grid, engine.config.body.no_embed_class) == ((8, 8), True)
    note = next(note for note in engine.notes if note.what == "trained_size")
    assert "none for the class token (DeiT III's layout: 64 rows)" in note.why
    with pytest.raises(
        dvit.InputError, match=r"trained_size: 112x144 has 63 .* 8x8 patches .*128x128; assume no_embed"
    ):
        dvit.convert(state, assume=HEADS | {"trained_size": (112, 144)})
    with pytest.raises(dvit.InputError, match=r"80x80 has 25 patches, other than the 63 .* other than 64 without"):
        dvit.convert(state, assume=HEADS | {"trained_size": (80, 80)})
    seven = HEADS | {"trained_size": (112, 144), "no_embed_class": 0}
    assert dvit.convert(state, assume=seven, device="cpu").config.grid == (7, 9)
    with pytest.raises(dvit.InputError, match="no_embed_class: 'yes' is not 0 or 1"):
        dvit.convert(state, assume=HEADS | {"no_embed_class": "yes"})
    with pytest.raises(dvit.InputError, match="63 patch positions, or 64 if none is the class token's"):
        dvit.convert(state, assume=HEADS | {"no_embed_class": 0})
    wide = variant() | {"pos_embed": variant()["pos_embed"][:, :32]}
    engine = dvit.convert(wide, assume=HEADS | {"trained_size": (64, 128)}, device="cpu")
    assert engine.config.body.no_embed_class
    assert dvit.verify(engine, wide, num_images=2).passed


def test_such_a_model_can_be_trained_into_a_dynamic_one(tmp_path):
    state = variant(*PARTS)
    torch.save({"model": state}, tmp_path / "dense.pth")
    pair = make_pair(tmp_path / "dense.pth", 0.7, assume=HEADS)
    body = pair.config.body
    assert (body.layer_scale, body.no_embed_class, body.no_qkv_bias) == (True, True, True)
    images = case_images("tiny-deit-r0.7-s1")[:2]
    assert pair.student.train()(images).pred.shape == (2, 10)
    odd = state | {"pos_embed": variant()["pos_embed"][:, :64]}
    torch.save({"model": odd}, tmp_path / "odd.pth")
    seven = HEADS | {"trained_size": (112, 144), "no_embed_class": 0}
    assert make_pair(tmp_path / "odd.pth", 0.7, assume=seven).config.grid == (7, 9)
