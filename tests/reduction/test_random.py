"""The reduction 'random': drawn once, the same for every image and batch; with any weights; saved and loaded."""

import argparse
import itertools
import json

import pytest
import torch
from golden_cases import case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.cli import convert
from dvit_infer.images.synthetic import sample_images

PRUNED, DENSE, LVVIT = "tiny-deit-r0.7-s1", "timm-deit_tiny_patch16_224", "tiny-lvvit-r0.7-s1"


def converted(case_id, **more):
    return dvit.convert(official_checkpoint(case_id), device="cpu", **{"method": "random"} | options(case_id) | more)


@pytest.mark.parametrize("case_id", [PRUNED, DENSE, LVVIT])
def test_it_runs_on_any_weights_and_is_verified(case_id):
    engine = converted(case_id)
    report = dvit.verify(engine, official_checkpoint(case_id), num_images=4)
    assert report.passed, report
    assert min(report.kept_compared) == 4


def test_positions_are_the_same_for_every_image_and_batch_and_nested():
    engine, again = converted(PRUNED), converted(PRUNED)
    images = sample_images(5, (224, 224))
    logits, kept = engine(images, return_kept=True)
    assert [stage.shape for stage in kept] == [(5, 137), (5, 96), (5, 67)]
    for stage in kept:
        assert torch.equal(stage, stage[:1].expand_as(stage))
        assert (stage.diff(dim=1) > 0).all()
    for before, after in itertools.pairwise(kept):
        assert torch.isin(after, before).all()
    one, alone = again(images[3:4], return_kept=True)
    torch.testing.assert_close(one, logits[3:4], atol=5e-5, rtol=0)
    assert all(torch.equal(a, b[:1]) for a, b in zip(alone, kept, strict=True))
    assert kept[0][0].tolist() != list(range(137))


def test_keep_rate_and_blocks_reach_it_and_a_file_of_it_keeps_its_own_predictors(tmp_path):
    engine = converted(PRUNED, keep_rate=0.5, prune_at=(0, 3))
    assert (str(engine.config.reduction), engine.config.reduction.blocks) == ("random 0.5: 98,49 of 196", (0, 3))
    assert str(engine.config.learned) == "predictor 0.7: 137,96,67 of 196"
    engine.save(tmp_path / "m.safetensors")
    images = case_images(PRUNED)
    assert torch.equal(dvit.load(tmp_path / "m.safetensors", device="cpu")(images), engine(images))
    other = dvit.load(tmp_path / "m.safetensors", device="cpu", method="predictor")
    plain = dvit.convert(official_checkpoint(PRUNED), device="cpu", **options(PRUNED))
    assert other.config.reduction == plain.config.reduction
    assert torch.equal(other(images), plain(images))
    dense = dvit.load(tmp_path / "m.safetensors", device="cpu", method="none")
    assert str(dense.config.reduction) == "dense"


def test_the_files_own_reduction_survives_while_another_runs(tmp_path):
    args = argparse.Namespace(base_rate=0.5, prune_at=[0, 2, 3], num_heads=2, dvit_infer={"predictor_eps": 1e-6})
    content = {"model": official_checkpoint(PRUNED)["model"], "args": args}
    dvit.convert(content, device="cpu", method="random", keep_rate=0.8).save(tmp_path / "m.safetensors")
    found = dvit.load(tmp_path / "m.safetensors", device="cpu", method="predictor").config
    assert found.reduction == dvit.convert(content, device="cpu").config.reduction
    assert (str(found.reduction), found.reduction.blocks) == ("predictor 0.5: 98,49,24 of 196", (0, 2, 3))
    assert found.predictor_eps == 1e-6


def test_weights_of_predictors_that_do_not_run_are_not_counted_and_not_trained():
    runs, dense, pruned = (converted(PRUNED, method=method) for method in ("random", "none", "predictor"))
    assert runs.params == dense.params < pruned.params
    reference = dvit.load_reference(official_checkpoint(PRUNED), method="random", **options(PRUNED))
    with pytest.raises(NotImplementedError, match="cannot be trained"):
        reference.train()(sample_images(1, (224, 224)))


def test_under_another_default_device():
    with torch.device("meta"):
        engine = converted(PRUNED)
    assert engine(sample_images(1, (224, 224))).isfinite().all()


def test_the_reference_has_it_too():
    reference = dvit.load_reference(official_checkpoint(DENSE), method="random", keep_rate=0.6)
    images = sample_images(2, (224, 224))
    with torch.no_grad():
        logits, kept = reference(images, return_kept=True)
    expected, expected_kept = converted(DENSE, keep_rate=0.6)(images, return_kept=True)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
    assert all(map(torch.equal, kept, expected_kept))


def test_bad_input_is_named():
    with pytest.raises(dvit.InputError, match="leaves no patch token"):
        converted(LVVIT, keep_rate=0.1)
    with pytest.raises(dvit.InputError, match="prune_at: there is no block 4"):
        converted(PRUNED, prune_at=(1, 4))
    with pytest.raises(dvit.InputError, match="prune_at: no block is given"):
        converted(PRUNED, prune_at=())
    for method in ([], ["random"], 3):
        with pytest.raises(dvit.InputError, match=r"method: .* is not one of predictor, evit, tome, random, none"):
            dvit.convert(official_checkpoint(PRUNED), device="cpu", method=method, **options(PRUNED))
    with pytest.raises(dvit.InputError, match="'predictor' needs score predictors"):
        dvit.convert(official_checkpoint(DENSE), device="cpu", method="predictor")
    with pytest.raises(dvit.InputError, match="keep_rate: state dict holds no score predictors"):
        dvit.convert(official_checkpoint(DENSE), device="cpu", keep_rate=0.5)


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(checkpoint), "--method", "random", "--assume", "num_heads=2"]
    assert convert.main([*argv, "--json", "m.json"]) == 0
    out = capsys.readouterr().out
    assert "parity passed" in out
    assert json.loads((tmp_path / "m.json").read_text())["config"]["method"] == "random"
    assert convert.main([*argv, "--format", "onnx"]) == 0
    assert "parity passed" in capsys.readouterr().out
