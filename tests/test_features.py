"""Features and tokens of an engine against its reference; what it holds, saves and takes along."""

import copy
import gc
import os
import pickle
import shutil
import weakref

import pytest
import torch
from golden_cases import case_images, official_checkpoint, options
from safetensors.torch import load_file

import dvit_infer as dvit
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models import recognised

CASES = ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"]
DISTILLED = "timm-deit_small_distilled_patch16_224"


def converted(case_id, **more):
    return dvit.convert(official_checkpoint(case_id), device="cpu", **options(case_id) | more)


def last_norm(case_id, images, **more):
    """The reference's tokens after its last norm, and the positions of the patches among them."""
    model, seen = dvit.load_reference(official_checkpoint(case_id), **options(case_id) | more), []
    model.norm.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        _, kept = model(images, return_kept=True)
    return seen[0], kept


@pytest.mark.parametrize("case_id", [*CASES, pytest.param(DISTILLED, marks=pytest.mark.slow)])
def test_features_and_tokens_are_the_references(case_id):
    images = case_images(case_id)
    engine, (expected, kept) = converted(case_id), last_norm(case_id, images)
    engine.micro_batch = 2  # so that they come in parts
    prefix = 2 if case_id == DISTILLED else 1
    logits = engine(images)
    features, (tokens, positions) = engine.features(images), engine.tokens(images)
    assert (features.dtype, tokens.dtype, positions.dtype) == (torch.float32, torch.float32, torch.int64)
    torch.testing.assert_close(features, expected[:, :prefix].mean(dim=1), atol=2e-5, rtol=0)
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=0)
    assert positions.shape == (len(images), tokens.shape[1] - prefix)
    if kept:
        assert torch.equal(positions, kept[-1])
    else:
        assert torch.equal(positions[-1], torch.arange(196))
    assert torch.equal(engine(images), logits)


def test_features_of_uint8_images_in_bfloat16_and_of_a_dense_engine():
    images = case_images(CASES[0])
    expected, _ = last_norm(CASES[0], images)
    found = converted(CASES[0], dtype="bfloat16").features(images)
    assert found.dtype == torch.float32
    assert (found - expected[:, 0]).square().mean().sqrt() < 0.05 * expected[:, 0].square().mean().sqrt()
    dense = converted(CASES[0], method="none")
    raw = (images * 50 + 120).clamp(0, 255).to(torch.uint8)
    tokens, positions = dense.tokens(raw)
    torch.testing.assert_close(dense.features(raw), tokens[:, 0])
    assert tokens.shape[1] == 1 + positions.shape[1] == 197


def test_an_onnx_file_gives_logits_only(tmp_path):
    dvit.export_onnx(converted(CASES[0]), tmp_path / "m.onnx")
    engine = dvit.load_onnx(tmp_path / "m.onnx", device="cpu")
    for ask in (engine.features, engine.tokens, engine.feature_map):
        with pytest.raises(dvit.InputError, match=r"m\.onnx gives logits only"):
            ask(case_images(CASES[0]))


def test_run_returns_logits_and_choices_and_warm_up_runs_every_size():
    engine, images = converted(CASES[0]), case_images(CASES[0])
    logits, kept = engine(images, return_kept=True)
    out = engine.run(images)
    assert torch.equal(out.logits, logits)
    assert all(map(torch.equal, out.choices, kept))
    assert torch.equal(engine.run(images, kept).logits, engine(images, kept=kept))
    sizes, run = [], engine.runner.run
    engine.runner.run = lambda images, *given, **named: sizes.append((len(images), images.dtype)) or run(images)
    engine.warm_up((1, 3))
    engine.warm_up([2], uint8=True)
    assert sizes == [(1, torch.float32), (3, torch.float32), (2, torch.uint8)]


@pytest.mark.parametrize("backend", [None, "torch"])
def test_an_engine_holds_one_copy_of_its_weights(backend, checkpoint):
    """Pickled, it is as large as its folded graph; a state dict stays with its owner."""
    for source in (checkpoint, official_checkpoint(CASES[0])):
        engine = dvit.convert(source, device="cpu", backend=backend, assume={"num_heads": 2})
        weights = sum(w.numel() * w.element_size() for node in engine.graph.nodes for w in node.weights.values())
        assert weights < len(pickle.dumps(engine)) < 1.2 * weights + 100_000
    shared = engine._source._state
    assert all(tensor is official_checkpoint(CASES[0])["model"][name] for name, tensor in shared.items())


def test_of_a_training_checkpoint_only_the_weights_are_kept_alive():
    class Moments(dict):
        pass

    content = {"model": dict(official_checkpoint(CASES[0])["model"]), "optimizer": Moments()}
    engine, moments = dvit.convert(content, device="cpu", assume={"num_heads": 2}), weakref.ref(content["optimizer"])
    del content
    gc.collect()
    assert moments() is None
    assert engine.features(sample_images(1, (224, 224))).shape == (1, 64)


def test_a_pickled_engine_saves_from_its_file_but_carries_no_state_dict(checkpoint, tmp_path):
    images = sample_images(2, (224, 224))
    engine = dvit.convert(checkpoint, device="cpu", assume={"num_heads": 2})
    other = pickle.loads(pickle.dumps(engine))
    other.save(tmp_path / "m.safetensors")
    assert torch.equal(dvit.load(tmp_path / "m.safetensors", device="cpu")(images), engine(images))
    engine = converted(CASES[0])
    copy.deepcopy(engine).save(tmp_path / "c.safetensors")
    other = pickle.loads(pickle.dumps(engine))
    assert torch.equal(other(images), engine(images))
    with pytest.raises(dvit.InputError, match="came from a state dict"):
        other.save(tmp_path / "n.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["c.safetensors", "m.safetensors"]


def test_a_source_that_changed_is_not_saved(checkpoint, tmp_path):
    path = tmp_path / "ckpt.pth"
    shutil.copy(checkpoint, path)
    engine = dvit.convert(path, device="cpu", assume={"num_heads": 2})
    os.utime(path, (1, 1))  # touched, but the same weights
    engine.save(tmp_path / "m.safetensors")
    content = torch.load(path, weights_only=False)
    content["model"]["head.bias"] += 1
    torch.save(content, path)
    with pytest.raises(dvit.InputError, match=r"ckpt\.pth: has changed since"):
        engine.save(tmp_path / "n.safetensors")
    path.unlink()
    with pytest.raises(dvit.InputError, match=r"ckpt\.pth: No such file"):
        engine.save(tmp_path / "n.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["head.bias"].add_(1),
        lambda state: state["head.bias"].data.numpy().__iadd__(1),
        lambda state: state["score_predictor.0.out_conv.4.bias"].add_(1),  # of modules that a dense engine lacks
    ],
)
def test_a_state_dict_that_changed_is_not_saved(change, tmp_path):
    state = {key: value.clone() for key, value in official_checkpoint(CASES[0])["model"].items()}
    engine = dvit.convert({"model": state}, device="cpu", method="none", dtype="bfloat16", assume={"num_heads": 2})
    change(state)
    with pytest.raises(dvit.InputError, match="state dict: has changed since"):
        engine.save(tmp_path / "n.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_tensor_that_was_replaced_leaves_the_engine_its_own(tmp_path):
    state = {key: value.clone() for key, value in official_checkpoint(CASES[0])["model"].items()}
    engine = dvit.convert(state, device="cpu", assume={"num_heads": 2})
    expected = state["head.bias"].clone()
    state["head.bias"] = expected + 1
    engine.save(tmp_path / "m.safetensors")
    assert torch.equal(load_file(tmp_path / "m.safetensors")["head.bias"], expected)


def test_a_file_that_is_replaced_while_it_is_converted_is_not_saved(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pth"
    shutil.copy(checkpoint, path)
    recognise = recognised.recognise

    def meanwhile(*given):
        content = torch.load(path, weights_only=False)
        content["model"]["head.bias"] += 1
        torch.save(content, path)
        return recognise(*given)

    monkeypatch.setattr(recognised, "recognise", meanwhile)
    engine = dvit.convert(path, device="cpu", assume={"num_heads": 2})
    with pytest.raises(dvit.InputError, match=r"ckpt\.pth: has changed since"):
        engine.save(tmp_path / "n.safetensors")


def test_positions_of_dense_tokens_are_the_callers_own_and_warm_up_takes_numbers_of_images():
    engine = converted(CASES[0], method="none")
    _, positions = engine.tokens(case_images(CASES[0]))
    positions += 1
    for batches in ([0], [-1], [2.0]):
        with pytest.raises(ValueError, match="batches: "):
            engine.warm_up(batches)
