"""The commands on a folder in Hugging Face's layout, and on the file that is saved of it."""

import json
from pathlib import Path

import pytest
from commands import fails, lines, run
from drawn import draw_all
from golden_vits import config_of, write
from safetensors import safe_open

import dvit_infer as dvit
from dvit_infer.cli import bench, convert, eval, predict, viz

pytestmark = pytest.mark.usefixtures("_empty_folder")
CPU = ["--device", "cpu"]
READING = [*CPU, "--workers", "0"]
NAMES = {str(i): f"animal {i}" for i in range(64)}


@pytest.fixture
def folder(_empty_folder) -> str:
    """A folder as people download it, with names of classes and a processor."""
    path = write("hf-vit-tiny", Path("tiny-vit"))
    (path / "config.json").write_text(json.dumps((config_of("hf-vit-tiny") or {}) | {"id2label": NAMES}))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}, "resample": 3}
    processor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


def test_a_folder_is_converted_predicted_and_evaluated(folder, capsys):
    assert convert.main([folder, *CPU, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert "parity passed: vit-96x4, dense; 8 images, float32 on cpu" in out
    assert "config.json: num_attention_heads" in out
    saved = "tiny-vit.dvit.safetensors"
    found = json.loads(Path("found.json").read_text())
    assert found["parity"]["passed"] is True
    assert found["config"]["mean"] == [0.4, 0.5, 0.6]
    assert (found["config"]["crop_mode"], found["config"]["interpolation"]) == ("squash", "bicubic")
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["dvit_infer"])["labels"]["7"] == "animal 7"
    draw_all(Path("photos/animal 3"), 2)
    draw_all(Path("photos/animal 5"), 2, 2)
    answers = []
    for model in (folder, saved):
        assert predict.main([model, "photos", *READING]) == 0
        answers.append([line["top5"] for line in lines(capsys.readouterr().out)])
        assert len(answers[-1]) == 4
        assert all(a["label"] == NAMES[str(a["class"])] for top in answers[-1] for a in top)
        assert eval.main([model, "photos", *READING, "--json", "eval.json"]) == 0
        assert json.loads(Path("eval.json").read_text())["rows"][0]["images"] == 4
        capsys.readouterr()
    assert answers[0] == answers[1]


def test_a_folder_is_drawn_where_it_drops_patches(folder, capsys):
    draw_all(Path("photos"), 2)
    assert "nothing to draw" in fails(viz, [folder, "photos", *READING], capsys)
    convert_options = ["--method", "random", "--keep-rate", "0.6", "--prune-at", "1,2"]
    assert convert.main([folder, *CPU, *convert_options, "--no-verify", "-o", "less.safetensors"]) == 0
    assert viz.main(["less.safetensors", "photos", *READING, "-o", "kept.png"]) == 0
    assert viz.main(["less.safetensors", "photos", *READING, "--heat-map", "-o", "heat.png"]) == 0
    assert "wrote kept.png" in capsys.readouterr().out
    assert Path("heat.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_folder_and_its_saved_file_are_measured(folder, capsys):
    dvit.convert(folder, device="cpu").save("saved.safetensors")
    for model in (folder, "saved.safetensors"):
        assert bench.main([model, *CPU, "--batch", "1", "--seconds", "0.1", "--json", "rows.json"]) == 0
        rows = json.loads(Path("rows.json").read_text())["rows"]
        assert [row["runtime"] for row in rows] == ["reference", "dense"]
        assert all(row["max_logit_error"] < 1e-4 and row["gmacs"] > 0 for row in rows)
    assert "all candidates compute the same function" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["hf-clip-proj-tiny", "hf-siglip-tiny", "hf-dinov3-tiny"])
def test_a_model_without_classes_is_converted_and_measured_but_predicts_none(case, capsys):
    folder = str(write(case, Path("model")))
    assert convert.main([folder, *CPU]) == 0
    out = capsys.readouterr().out
    assert "parity passed" in out
    assert "no classifier" in out
    assert dvit.load("model.dvit.safetensors", device="cpu").config.num_classes == 0
    draw_all(Path("photos/a"), 2)
    assert "has no classifier" in fails(predict, [folder, "photos", *READING], capsys)
    assert eval.main([folder, "photos", "--knn", "1", *READING]) == 0
    if case == "hf-dinov3-tiny":
        assert bench.main([folder, *CPU, "--batch", "1", "--seconds", "0.1"]) == 0


@pytest.mark.slow
def test_other_owners_files_are_converted(capsys):
    told = {"npz-siglip-perblock-map": [], "dinov2-hub-tiny": ["--assume", "num_heads=3"],
            "openclip-tiny-quickgelu": ["--assume", "num_heads=3,act=quick_gelu"],
            "timm-eva02_tiny_patch14_224-d4-tame": []}  # fmt: skip
    for case, given in told.items():
        source = write(case, Path(case))
        assert convert.main([str(source), *CPU, *given, "-o", f"{case}.safetensors"]) == 0
        assert "parity passed" in capsys.readouterr().out
    assert convert.main(["dinov2-hub-tiny/model.pth", *CPU, "--image-size", "56x112", "--assume",
                         "num_heads=3,resample=timm", "-o", "a.safetensors"]) == 0  # fmt: skip
    assert "bicubic with antialiasing, as timm, from 84x84 to 56x112" in capsys.readouterr().out


@pytest.mark.large
def test_a_folder_of_vit_b_is_converted_and_verified(tmp_path):
    source = write("hf-vit-base", tmp_path / "m")
    done = run("-m", "dvit_infer.cli.convert", str(source), *CPU, "-o", "out.safetensors", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "parity passed" in done.stdout
    assert dvit.load("out.safetensors", device="cpu").config.arch == "vit-768x12"
