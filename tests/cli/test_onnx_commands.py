"""The commands with ONNX files: what dvit-convert writes, what the others run and refuse."""

import json
import re
from pathlib import Path

import onnx
import pytest
from commands import TINY as TINY_FACTS
from commands import fails
from drawn import draw_all
from onnx import TensorProto
from onnx_files import TINY, a_checkpoint, a_model, foreign, in_a_folder  # noqa: F401 (fixtures are found by being there)

import dvit_infer as dvit
from dvit_infer.cli import bench, convert, eval, predict, viz


def test_convert_writes_and_verifies(checkpoint, tmp_path, capsys):
    given = [
        "--format",
        "onnx",
        "--dtype",
        "float16",
        "--opset",
        "21",
        "--kept",
        "--uint8",
        "--inline",
        "--json",
        "j.json",
    ]
    (tmp_path / "names.json").write_text(json.dumps(["zero", "one"]))
    assert convert.main([str(checkpoint), *TINY_FACTS, *given, "--classes", "names.json"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"parity passed: dynamicvit-deit-64x4, .*; 8 images, float16 on cpu\n", out)
    assert "wrote ckpt.dvit.onnx" in out
    assert json.loads((tmp_path / "j.json").read_text())["parity"]["passed"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.dvit.onnx", "j.json", "names.json"]
    found = onnx.load(tmp_path / "ckpt.dvit.onnx")
    assert [value.name for value in found.graph.output] == ["logits", "kept_0", "kept_1", "kept_2"]
    assert found.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert not found.functions
    assert found.opset_import[0].version == 21


def test_a_saved_file_becomes_onnx_too(checkpoint, capsys):
    assert convert.main([str(checkpoint), *TINY_FACTS, "--no-verify"]) == 0
    assert convert.main(["ckpt.dvit.safetensors", "--format", "onnx", "--device", "cpu"]) == 0
    assert "wrote ckpt.dvit.onnx" in capsys.readouterr().out


def test_a_file_that_does_not_pass_is_not_written(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dvit_infer.parity.verification.LOGIT_TOLERANCE", 0.0)
    assert convert.main([str(checkpoint), *TINY_FACTS, "--format", "onnx"]) == 1
    assert "the engine does not agree with the reference" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--format", "onnx", "--opset", "16"], "--opset: 16; 17 to 21 can be written"),
        (["--format", "onnx", "--dtype", "bfloat16"], "--dtype: bfloat16 cannot be written as ONNX"),
        (["--format", "onnx", "--quantize", "int4"], "--quantize: 'int4' is not known; int8 is"),
        (["--format", "onnx", "--quantize", "int8", "--dtype", "float16"], "--quantize: int8 starts from float32"),
        (["--format", "onnx", "--calibrate", "."], "--calibrate: is for --quantize int8"),
        (["--format", "onnx", "--quantize", "int8", "--calibrate", "."], "--calibrate: "),
        (["--format", "onnx", "-o", "nowhere/m.onnx"], "there is no folder"),
        (["--uint8"], "--uint8: is for --format onnx"),
        (["--opset", "20"], "--opset: is for --format onnx"),
    ],
)
def test_convert_says_what_cannot_be(checkpoint, given, says, capsys):
    assert says in fails(convert, [checkpoint, *TINY_FACTS, *given], capsys)


def test_convert_names_a_node_that_onnx_does_not_know(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("dvit_infer.graph.nodes.Mlp.kind", "mixer")
    monkeypatch.setattr("dvit_infer.backends.torch.TorchRunner.mixer", lambda *given: None, raising=False)
    line = fails(convert, [checkpoint, *TINY_FACTS, "--format", "onnx"], capsys)
    assert "--format: blocks.0.mlp, a node of kind 'mixer', cannot be written as ONNX" in line


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(checkpoint, model, package, capsys, monkeypatch):
    find = dvit.utils.packages.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    line = fails(convert, [checkpoint, *TINY_FACTS, "--format", "onnx"], capsys)
    assert f"needs {package}, not installed; run pip install 'dvit-infer[onnx]'" in line
    if package == "onnxruntime":
        line = fails(bench, [model], capsys)
        assert "pip install 'dvit-infer[onnx]'" in line


@pytest.mark.parametrize("command", [bench, eval, predict, viz])
@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"", "is empty"), (b"\x08\x0ahello" * 9, "cannot load it"), ("cut", "cannot load it")],
)
def test_a_damaged_file_is_told_in_one_line(command, content, says, model, capsys, tmp_path):
    draw_all(tmp_path / "images" / "a", 1)
    if content is not None:
        (tmp_path / "bad.onnx").write_bytes(model.read_bytes()[:30000] if content == "cut" else content)
    line = fails(command, ["bad.onnx", *([] if command is bench else ["images"])], capsys)
    assert "bad.onnx" in line
    assert says in line


def test_eval_predict_and_viz_run_a_file_as_the_engine(model, checkpoint, capsys, tmp_path):
    for label, name in enumerate(("a", "b")):
        draw_all(tmp_path / "images" / name, 3, label)
    answers = {}
    for source in (model, checkpoint):
        more = [] if source is model else ["--assume", "num_heads=2"]
        given = ["--device", "cpu", "--workers", "0", *more]
        assert eval.main([str(source), "images", *given, "--json", "e.json"]) == 0
        (row,) = json.loads(Path("e.json").read_text())["rows"]
        capsys.readouterr()
        assert predict.main([str(source), "images", "--kept", *given]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        answers[source] = row["top1"], [(line["image"], line["kept"], line["top5"][0]["class"]) for line in lines]
        assert viz.main([str(source), "images/a/000.png", *given, "-o", "v.png"]) == 0
    assert answers[model] == answers[checkpoint]


@pytest.mark.parametrize("command", [eval, predict])
def test_what_a_file_is_cannot_be_changed(command, model, capsys, tmp_path):
    draw_all(tmp_path / "images" / "a", 1)
    line = fails(command, [model, "images", "--keep-rate", "0.5"], capsys)
    assert "--keep-rate: " in line
    assert "convert the checkpoint again" in line
    assert "was not written by dvit-convert" in fails(command, [foreign("f.onnx"), "images"], capsys)
    if command is eval:
        line = fails(command, [model, "images", "--against-reference"], capsys)
        assert "--against-reference: " in line


def test_a_header_that_lies_is_found_out(checkpoint, capsys, tmp_path):
    draw_all(tmp_path / "images" / "a", 1)
    with_kept = tmp_path / "k.onnx"
    given = [*TINY_FACTS, "--format", "onnx", "--kept", "--no-verify", "-o", str(with_kept)]
    assert convert.main([str(checkpoint), *given]) == 0
    capsys.readouterr()
    for before, after, says in (
        ('"num_classes": 10', '"num_classes": 11', "its header says logits are [11]"),
        (
            '"patch_size": 16',
            '"patch_size": "16"',
            "is invalid: patch_size: '16' is not a positive integer",
        ),
        ('"format": 2', '"format": 3', "its format is 3"),
        ('"patch_size": 16', '"patch_size": 1000000000', "is not a multiple of the patch size"),
        ('"depth": 4', '"depth": -1', "depth: -1"),
        ('"num_heads": 2', '"num_heads": 0', "num_heads: 0"),
        ('"keep_rate": 0.7', '"keep_rate": 1e308', "keep_rate: 1e+308"),
        ('"keep_rate": 0.7', '"keep_rate": 0.5', "its stages do not keep what its settings say"),
        ('"block": 2', '"block": 1', "is not strictly increasing"),
        ('"family": "deit"', '"family": "zzz"', "family: 'zzz' is not known"),
    ):
        content = onnx.load(with_kept)
        (entry,) = [entry for entry in content.metadata_props if entry.key == "dvit_infer"]
        assert before in entry.value
        entry.value = entry.value.replace(before, after)
        onnx.save(content, "lies.onnx")
        assert says in fails(eval, ["lies.onnx", "images"], capsys)


def test_an_input_of_a_wrong_shape_is_told(model):
    loaded = dvit.load_onnx(model, device="cpu")
    images = dvit.images.synthetic.sample_images(2, (32, 32))
    with pytest.raises(ValueError, match=r"images: shape \(2, 3, 32, 32\)"):
        loaded(images)
    with pytest.raises(dvit.InputError, match="images: ONNX Runtime: Got invalid dimensions"):
        dvit.onnx.session.run_session(loaded.runner.session, {"images": images}, ["logits"])


@pytest.mark.slow
def test_int8_is_written_with_the_flips_it_caused(checkpoint, capsys, tmp_path):
    given = ["--format", "onnx", "--quantize", "int8", "--kept", "--json", "j.json"]
    assert convert.main([str(checkpoint), *TINY_FACTS, *given]) == 0
    out = capsys.readouterr().out
    assert re.search(r"parity passed: .*; 64 images, int8 on cpu\n", out)
    assert "all follow from the file, to half a step" in out
    parity = json.loads(Path("j.json").read_text())["parity"]
    assert 0.5 < parity["top1_agreement"] <= 1
    assert all(0.9 < overlap <= 1 for overlap in parity["kept_overlap"])
    assert parity["max_error"] > 0
    found = onnx.load("ckpt.dvit.onnx")
    assert {"MatMulInteger"} <= {node.op_type for node in found.graph.node}
    assert {weight.data_type for weight in found.graph.initializer if "prune" in weight.name} == {TensorProto.FLOAT}


def test_predict_needs_the_file_alone(model, capsys, tmp_path, monkeypatch):
    draw_all(tmp_path / "images", 1)
    monkeypatch.setattr("dvit_infer.onnx.probe.probed", lambda *given: pytest.fail("a second model was made"))
    assert predict.main([str(model), "images", "--device", "cpu", "--workers", "0"]) == 0
    assert "top5" in capsys.readouterr().out
