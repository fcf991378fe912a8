"""What is assumed about preprocessing is said by every command that reads images."""

import json
from pathlib import Path

import pytest
import torch
from commands import fails
from drawn import draw_all
from golden_cases import state_dict

import dvit_infer as dvit
from dvit_infer.cli import convert, eval, predict, viz

pytestmark = pytest.mark.usefixtures("_empty_folder")
OPTIONS = ["--assume", "num_heads=2", "--device", "cpu", "--image-size", "64", "--workers", "0"]
CONFIG = json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}})
SAID = (
    "warning: d.pth: mean, std and crop_pct are assumed to be ImageNet's and the family's; "
    "--assume mean=R:G:B,std=R:G:B,crop_pct=X, or a config.json beside it, says otherwise\n"
)


def dense() -> dict[str, torch.Tensor]:
    return {key: w for key, w in state_dict("tiny-deit", 1).items() if "predictor" not in key}


@pytest.fixture
def _files(_empty_folder):
    torch.save(dense(), "d.pth")
    for name in "abcdefghij":  # as many as the model has classes: nothing else to warn of
        draw_all(Path("photos", name), 1)


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("command", [eval, predict])
def test_what_is_assumed_is_a_warning_until_it_is_stated(command, capsys):
    argv = ["d.pth", "photos", *OPTIONS]
    assert command.main(argv) == 0
    assert capsys.readouterr().err == SAID
    facts = "num_heads=2,mean=0.5:0.5:0.5,std=0.5:0.5:0.5"
    assert command.main(["d.pth", "photos", *OPTIONS[2:], "--assume", facts]) == 0
    assert capsys.readouterr().err == (
        "warning: d.pth: crop_pct is assumed to be the family's; "
        "--assume crop_pct=X, or a config.json beside it, says otherwise\n"
    )
    assert command.main(["d.pth", "photos", *OPTIONS[2:], "--assume", facts, "--crop-pct", "1"]) == 0
    assert capsys.readouterr().err == ""
    Path("config.json").write_text(CONFIG)
    assert command.main(argv) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_files")
def test_viz_says_it_too_and_errors_stay_the_last_line(capsys):
    assert viz.main(["d.pth", "photos/a/000.png", *OPTIONS, "--method", "random"]) == 0
    assert capsys.readouterr().err == SAID
    assert "photos/none" in fails(eval, ["d.pth", "photos/none", *OPTIONS], capsys)


@pytest.mark.usefixtures("_files")
def test_files_that_were_made_of_it_remember(capsys):
    assert convert.main(["d.pth", "--assume", "num_heads=2", "--image-size", "64", "--no-verify"]) == 0
    assert predict.main(["d.dvit.safetensors", "photos", "--device", "cpu", "--workers", "0"]) == 0
    assert "warning: d.dvit.safetensors: mean, std and crop_pct are assumed" in capsys.readouterr().err
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    engine = dvit.load("d.dvit.safetensors", device="cpu")
    dvit.export_onnx(engine, "d.onnx")
    facts = {prop.key: prop.value for prop in onnx.load("d.onnx").metadata_props}
    assert json.loads(facts["preprocessing"])["assumed"] == ["mean", "std", "crop_pct"]
    assert predict.main(["d.onnx", "photos", "--device", "cpu", "--workers", "0"]) == 0
    assert "dvit-convert --assume mean=R:G:B" in capsys.readouterr().err
    Path("config.json").write_text(CONFIG)
    dvit.export_onnx(dvit.convert("d.pth", assume={"num_heads": 2}, device="cpu"), "d.onnx")
    facts = {prop.key: prop.value for prop in onnx.load("d.onnx").metadata_props}
    assert "assumed" not in json.loads(facts["preprocessing"])


@pytest.mark.usefixtures("_files")
def test_what_the_type_of_the_model_implies_is_said_to_be_that(capsys):
    Path("config.json").write_text(json.dumps({"model_type": "vit"}))
    assert predict.main(["d.pth", "photos", *OPTIONS]) == 0
    said = "warning: d.pth: mean, std and crop_pct are assumed to be those of its type; "
    assert capsys.readouterr().err.startswith(said)
    Path("config.json").write_text(json.dumps({"model_type": "deit"}))
    assert predict.main(["d.pth", "photos", *OPTIONS]) == 0
    assert "are assumed to be ImageNet's and those of its type; " in capsys.readouterr().err


@pytest.mark.usefixtures("_files")
def test_how_images_are_resized_is_given_and_shown(capsys):
    facts = "num_heads=2,mean=0.5:0.5:0.5,std=0.5:0.5:0.5,interpolation=bilinear,crop_mode=squash"
    assert eval.main(["d.pth", "photos", *OPTIONS[2:], "--assume", facts]) == 0
    out, err = capsys.readouterr()
    assert "images 64x64, warped, bilinear\n" in out
    assert err == ""
    assert eval.main(["d.pth", "photos", *OPTIONS[2:], "--assume", facts, "--crop-pct", "0.5"]) == 0
    assert "images 64x64, warped, crop 0.5, bilinear\n" in capsys.readouterr().out
    wrong = fails(eval, ["d.pth", "photos", *OPTIONS[2:], "--assume", "num_heads=2,interpolation=7"], capsys)
    assert wrong.startswith("error: --assume interpolation: '7' is not one of nearest, ")
    wrong = fails(eval, ["d.pth", "photos", *OPTIONS[2:], "--assume", "num_heads=2,crop_mode=border"], capsys)
    assert wrong.startswith("error: --assume crop_mode: 'border' is not one of center, ")


@pytest.mark.usefixtures("_files")
def test_an_onnx_file_resizes_images_as_its_source_did(capsys):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    facts = {"num_heads": 2, "interpolation": "bilinear", "crop_mode": "squash"}
    dvit.export_onnx(dvit.convert("d.pth", assume=facts, image_size=64, device="cpu"), "d.onnx")
    said = json.loads({prop.key: prop.value for prop in onnx.load("d.onnx").metadata_props}["preprocessing"])
    expected = {"crop_pct": 1.0, "crop_mode": "squash", "warp": True, "interpolation": "bilinear"}
    assert expected.items() <= said.items()
    assert eval.main(["d.onnx", "photos", "--device", "cpu", "--workers", "0"]) == 0
    assert "images 64x64, warped, bilinear\n" in capsys.readouterr().out


def test_official_files_need_no_warning(checkpoint, capsys):
    for name in "abcdefghij":  # as many as the model has classes: nothing else to warn of
        draw_all(Path("photos", name), 1)
    assert eval.main([str(checkpoint), "photos", *OPTIONS]) == 0
    assert capsys.readouterr().err == ""
