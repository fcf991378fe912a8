"""Saved files: a header is not trusted, and files of format 1 load and answer as they did."""

import json

import numpy as np
import pytest
import torch
from golden_cases import HERE, case_images, state_dict
from safetensors import safe_open
from safetensors.torch import save_file

import dvit_infer as dvit

LATER = ("crop_pct", "crop_mode", "interpolation")  # fields that headers did not have at first
LVVIT, DEIT = HERE / "version1-dense-lvvit.safetensors", HERE / "version1-deit.onnx"


def body(**facts):
    return lambda h: h["config"]["body"].update(facts)


def reduction(**facts):
    return lambda h: [h["config"][part].update(facts) for part in ("reduction", "learned")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"]["body"].pop("num_heads"), "does not say num_heads"),
        (body(num_heads=None), "does not say num_heads"),
        (body(num_heads=3), "depth: 4 blocks of 3 heads are impossible"),
        (body(depth=99), "depth is 99"),
        (body(depth=float("nan")), "depth"),
        (lambda h: h["config"].update(family={}), "family"),
        (body(mlp_dim="x"), "mlp_dim"),
        (body(skip_lam=3.0), "skip_lam"),
        (body(eps=10**400), "eps"),
        (body(surprise=1), "'surprise' is not known"),
        (lambda h: h["config"].update(body=[]), "does not say body|is not an object"),
        (lambda h: h["config"].update(surprise=1), "'surprise' is not known"),
        (lambda h: h["config"].pop("image_size"), "does not say image_size"),
        (lambda h: h["config"].update(image_size=[225, 225]), "image_size"),
        (lambda h: h["config"].update(weights="q\n"), "weights"),
        (lambda h: h["config"].update(interpolation="random"), "interpolation: 'random' is not one of"),
        (lambda h: h["config"].update(crop_mode=[1]), "crop_mode: '1' is not one of"),
        (reduction(settings={"keep_rate": 0, "predictor_eps": 1e-5}), "keep_rate"),
        (reduction(settings={"keep_rate": 0.5, "predictor_eps": 1e-5}), "do not keep what"),
        (reduction(settings={"keep_rate": 0.7}), "settings"),
        (reduction(settings=3), "not a list"),
        (reduction(stages=[{"block": 1}, {"block": 2}]), "prune_at: 2 given"),
        (reduction(stages=[{"block": b, "where": "after_attention"} for b in (1, 2, 3)]), "do not keep what"),
        (reduction(stages=[]), "prune_at: no block is given"),
        (reduction(method=[]), "method: "),
        (reduction(method="none"), "a dense model has no stages"),
        (lambda h: h["config"]["learned"].update(method="random"), "method: 'random' is not one of"),
        (lambda h: h["config"].pop("learned"), "its header says learned is dense"),
        (reduction(stages=[{"block": 9}]), "prune_at"),
        (reduction(stages=[{"keep": 9}]), "does not say block"),
        (reduction(method="q"), r"m\.safetensors: .*method: 'q'"),
        (reduction(num_patches=3), "num_patches is 3, the image has 196"),
        (reduction(num_patches=False), "num_patches is False"),
        (lambda h: h.update(config=[]), "config"),
        (lambda h: h.update(format=3), "format is 3"),
        (lambda h: h.update(format=True), "format is True"),
        (lambda h: h.clear(), "header"),
    ],
)
def test_a_saved_files_header_is_not_trusted(change, message, tmp_path):
    path = tmp_path / "m.safetensors"
    dvit.convert(state_dict("tiny-deit", 1), device="cpu", assume={"num_heads": 2}).save(path)
    rewrite(path, path, change)
    with pytest.raises(dvit.InputError, match=message):
        dvit.load(path, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].pop("num_heads"), "does not say num_heads"),
        (lambda h: h["config"].update(depth=99), "depth is 99"),
        (lambda h: h["config"].update(keep_rate=0), "keep_rate"),
        (lambda h: h["config"].update(prune_at=3), "prune_at"),
        (lambda h: h["config"].update(prune_at=[1, 2]), "prune_at: 2 given"),
        (lambda h: h["config"].update(prune_at=[]), "its header says learned is dense"),
        (lambda h: h["config"].update(mean=None), "does not say mean"),
        (lambda h: h["config"].update(body={}), "damaged at 'body'"),
        (lambda h: h["config"].update(method=[]), "method: "),
        (lambda h: h["config"].update(method="q"), "method: 'q'"),
        (lambda h: h["config"].update(surprise=1), "'surprise' is not known"),
    ],
)
def test_nor_is_one_of_format_1(change, message, tmp_path):
    rewrite(LVVIT, tmp_path / "m.safetensors", change)
    with pytest.raises(dvit.InputError, match=message):
        dvit.load(tmp_path / "m.safetensors", device="cpu")


def rewrite(path, out, change):
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["dvit_infer"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(header)
    save_file(tensors, out, {"dvit_infer": json.dumps(header)})


def test_fields_that_a_header_lacks_take_their_default(tmp_path):
    path = tmp_path / "m.safetensors"
    engine = dvit.convert(state_dict("tiny-deit", 1), device="cpu", assume={"num_heads": 2})
    engine.save(path)
    rewrite(path, path, lambda h: [[h["config"].pop(f) for f in LATER], h["config"]["body"].pop("skip_lam")])
    assert dvit.load(path, device="cpu").config == engine.config


def answers():
    with np.load(HERE / "version1.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def test_a_file_of_format_1_answers_as_it_did(tmp_path):
    """It was saved dense, with a keep rate and blocks that its file alone knows; saved again, it still is."""
    expected, images = answers(), case_images("tiny-lvvit-r0.7-s1")[:2]
    dense, pruned = dvit.load(LVVIT, device="cpu"), dvit.load(LVVIT, device="cpu", method="predictor")
    assert str(dense.config.reduction) == "dense"
    assert dense.config.learned == pruned.config.reduction
    assert str(pruned.config.reduction) == "predictor 0.6: 9,5,3 of 16"
    assert pruned.config.reduction.blocks == (0, 2, 3)
    assert (dense(images) - expected["dense"]).abs().max() < 1e-5
    logits, kept = pruned(images, return_kept=True)
    assert (logits - expected["pruned"]).abs().max() < 1e-5
    assert all(torch.equal(stage, expected[f"kept{s}"]) for s, stage in enumerate(kept))
    dense.save(tmp_path / "again.safetensors")
    assert torch.equal(dvit.load(tmp_path / "again.safetensors", device="cpu")(images), dense(images))
    again = dvit.load(tmp_path / "again.safetensors", device="cpu", method="predictor")
    assert again.config == pruned.config
    assert torch.equal(again(images), logits)


def test_so_does_an_onnx_file_of_format_1():
    engine = dvit.load_onnx(DEIT, device="cpu")
    expected, images = answers(), case_images("tiny-deit-r0.7-s1")[:2]
    assert str(engine.config.reduction) == "predictor 0.7: 137,96,67 of 196"
    logits, kept = engine(images, return_kept=True)
    assert (logits - expected["onnx"]).abs().max() < 2e-3  # a float16 model
    assert all(torch.equal(stage, expected[f"onnx_kept{s}"]) for s, stage in enumerate(kept))
    report = dvit.verify(engine, state_dict("tiny-deit", 1), num_images=4)
    assert report.wrong_weight is None
    assert report.passed


def test_a_config_answers_to_the_names_that_it_had():
    config = dvit.load(LVVIT, device="cpu").config
    assert (config.method, config.keep_rate, config.prune_at, config.num_keep) == ("none", 0.6, (0, 2, 3), ())
    assert (config.embed_dim, config.num_heads, config.skip_lam, config.predictor_eps) == (64, 2, 2.0, 1e-5)
    with pytest.raises(AttributeError, match="no 'window'"):
        config.window  # noqa: B018
