"""The commands with ONNX files: what they write, run and refuse."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import TINY as TINY_FACTS
from commands import fails
from drawn import draw_all
from golden_cases import official_checkpoint
from onnx import TensorProto, helper, numpy_helper

import dvit_infer as dvit
from dvit_infer.cli import bench, convert, eval, predict, viz

TINY = "tiny-deit-r0.7-s1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import torch

    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pth"
    torch.save(official_checkpoint(TINY), path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    assert convert.main([str(checkpoint), *TINY_FACTS, "--format", "onnx", "-o", str(path)]) == 0
    return path


def foreign(path, shape=("b", 3, 32, 32), element=TensorProto.FLOAT, inputs=1):
    """An ONNX file of another origin: pictures' means, times a matrix."""
    value = helper.make_tensor_value_info
    channels = 1 if shape[1] == 1 else 3
    weight = numpy_helper.from_array(np.arange(7.0 * channels, dtype=np.float32).reshape(channels, 7), "w")
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    nodes = [
        helper.make_node("Cast", ["x0"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [value(f"x{i}", element, shape) for i in range(inputs)],
        [value("y", TensorProto.FLOAT, None)],
        [weight, axes],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
    assert "parity passed: 8 pictures, float16 on cpu" in out
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
    monkeypatch.setattr("dvit_infer.parity.LOGIT_TOLERANCE", 0.0)
    assert convert.main([str(checkpoint), *TINY_FACTS, "--format", "onnx"]) == 1
    assert "the engine's answers are not the reference's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--format", "onnx", "--opset", "19"], "--opset: 19; 20 or 21 can be written"),
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
    assert "--format: no ONNX is known for blocks.0.mlp, a node of kind 'mixer'" in line


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(checkpoint, model, package, capsys, monkeypatch):
    find = dvit.packages.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    line = fails(convert, [checkpoint, *TINY_FACTS, "--format", "onnx"], capsys)
    assert f"needs {package}, not installed; pip install 'dvit-infer[onnx]' would do" in line
    if package == "onnxruntime":
        line = fails(bench, [model], capsys)
        assert "pip install 'dvit-infer[onnx]'" in line


def test_bench_runs_a_file(model, capsys):
    given = ["--batch", "1,3", "--seconds", "0", "--compare", "onnxruntime,openvino", "--device", "cpu"]
    assert bench.main([str(model), *given, "--json", "b.json", "--report", "b.html"]) == 0
    out = capsys.readouterr().out
    assert "not known: whether its answers are right" in out
    assert "all runtimes agree" in out
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert [(row["how"], row["batch"]) for row in rows] == [
        (how, batch) for batch in (1, 3) for how in ("onnxruntime", "openvino")
    ]
    assert all(row["gflops"] and row["params"] and row["max_logit_error"] is None for row in rows)


@pytest.mark.parametrize(
    ("shape", "element", "says"),
    [
        (("b", 3, 32, 32), TensorProto.FLOAT, "of another origin; float32"),
        ((2, 3, 32, 32), TensorProto.FLOAT16, "of another origin; float16"),
        (("b", 3, "h", "w"), TensorProto.FLOAT, "its size is open, 224x224 is assumed"),
        (("b", 32, 16, 3), TensorProto.UINT8, "of another origin; uint8"),
    ],
)
def test_bench_runs_a_foreign_file_and_says_what_it_cannot_know(shape, element, says, capsys):
    path = foreign("f.onnx", shape, element) if shape[-1] != 3 else foreign_last("f.onnx", shape)
    assert bench.main([path, "--seconds", "0", "--device", "cpu", "--json", "b.json", "--report", "b.html"]) == 0
    out = capsys.readouterr().out
    assert says in out
    assert "not known: its multiply-adds, its weights, what it prunes, whether its answers are right" in out
    (row,) = json.loads(Path("b.json").read_text())["rows"]
    assert (row["how"], row["gflops"], row["keep_rate"]) == ("onnxruntime", None, None)


def foreign_last(path, shape):
    """The same with the channels last."""
    model = onnx.load(foreign(path, shape, TensorProto.UINT8))
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([1, 2]), "axes"))
    onnx.save(model, path)
    return path


def changed(path, facts=None, output=None):
    """A foreign file with other metadata, or another first output."""
    found = onnx.load(foreign(path))
    helper.set_model_props(found, facts or {})
    if output is not None:
        nodes, shape = output
        found.graph.node.extend(nodes)
        found.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", *shape))
    onnx.save(found, path)
    return path


def test_bench_takes_no_number_on_trust(capsys):
    changed("f.onnx", {"gflops": "x", "keep_rate": "abc", "params": "9" * 5000, "arch": "\x1b[31mred\nline"})
    assert bench.main(["f.onnx", "--seconds", "0", "--device", "cpu", "--json", "b.json"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    (row,) = json.loads(Path("b.json").read_text())["rows"]
    assert (row["gflops"], row["keep_rate"]) == (None, None)


@pytest.mark.parametrize(
    ("nodes", "shape", "says"),
    [
        ([helper.make_node("ArgMax", ["y"], ["z"], axis=1)], (TensorProto.INT64, None), "no logits"),
        ([helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0)], (TensorProto.FLOAT, ()), "no logits"),
        ([helper.make_node("Log", ["n"], ["z"])], (TensorProto.FLOAT, None), "it answers NaN or Inf"),
    ],
)
def test_bench_says_what_no_logits_are(nodes, shape, says, capsys):
    absolute = [helper.make_node("Abs", ["y"], ["a"]), helper.make_node("Neg", ["a"], ["n"])]
    changed("f.onnx", output=([*absolute, *nodes], shape))
    line = fails(bench, ["f.onnx", "--seconds", "0", "--device", "cpu"], capsys)
    assert "f.onnx" in line
    assert says in line


def test_bench_finds_that_a_runtime_agrees_with_itself(capsys):
    changed("f.onnx", output=([helper.make_node("Sub", ["y", "y"], ["z"])], (TensorProto.FLOAT, None)))
    given = ["--seconds", "0", "--device", "cpu", "--compare", "onnxruntime,openvino"]
    assert bench.main(["f.onnx", *given]) == 0
    assert "all runtimes agree" in capsys.readouterr().out


def test_bench_says_when_runtimes_do_not_agree(model, capsys, monkeypatch):
    from dvit_infer import peers

    monkeypatch.setattr(
        peers, "openvino_call", lambda *given: lambda images: dvit.load_onnx(model, device="cpu")(-images)
    )
    given = ["--batch", "2", "--seconds", "0", "--compare", "onnxruntime,openvino", "--device", "cpu"]
    assert bench.main([str(model), *given]) == 1
    assert "do NOT agree" in capsys.readouterr().out


@pytest.mark.parametrize("command", [bench, eval, predict, viz])
@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"", "is empty"), (b"\x08\x0ahello" * 9, "cannot load it"), ("cut", "cannot load it")],
)
def test_a_damaged_file_is_told_in_one_line(command, content, says, model, capsys, tmp_path):
    draw_all(tmp_path / "pictures" / "a", 1)
    if content is not None:
        (tmp_path / "bad.onnx").write_bytes(model.read_bytes()[:30000] if content == "cut" else content)
    line = fails(command, ["bad.onnx", *([] if command is bench else ["pictures"])], capsys)
    assert "bad.onnx" in line
    assert says in line


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--compare", "reference"], "--compare: 'reference' needs the checkpoint"),
        (["--sweep", "0.5:0.9:0.1"], "--sweep: "),
        (["--nodes"], "--nodes: "),
        (["--dtype", "float16"], "--dtype: "),
    ],
)
def test_bench_says_what_a_file_cannot_do(model, given, says, capsys):
    assert says in fails(bench, [model, *given], capsys)


def test_bench_refuses_what_takes_no_pictures(capsys):
    foreign("f.onnx", inputs=2)
    assert "one input (B, 3, H, W)" in fails(bench, ["f.onnx"], capsys)
    foreign("f.onnx", ("b", 1, 32, 32))
    assert "three channels" in fails(bench, ["f.onnx"], capsys)
    foreign("f.onnx", element=TensorProto.INT64)
    assert "no picture's" in fails(bench, ["f.onnx"], capsys)
    path = foreign("f.onnx", (2, 3, 32, 32))
    assert "--batch: f.onnx takes 2 pictures at a time, not 8" in fails(bench, [path, "--batch", "8"], capsys)


def test_eval_predict_and_viz_run_a_file_as_the_engine(model, checkpoint, capsys, tmp_path):
    for label, name in enumerate(("a", "b")):
        draw_all(tmp_path / "pictures" / name, 3, label)
    answers = {}
    for source in (model, checkpoint):
        more = [] if source is model else ["--assume", "num_heads=2"]
        given = ["--device", "cpu", "--workers", "0", *more]
        assert eval.main([str(source), "pictures", *given, "--json", "e.json"]) == 0
        (row,) = json.loads(Path("e.json").read_text())["rows"]
        capsys.readouterr()
        assert predict.main([str(source), "pictures", "--kept", *given]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        answers[source] = row["top1"], [(line["image"], line["kept"], line["top5"][0]["class"]) for line in lines]
        assert viz.main([str(source), "pictures/a/000.png", *given, "-o", "v.png"]) == 0
    assert answers[model] == answers[checkpoint]


@pytest.mark.parametrize("command", [eval, predict])
def test_what_a_file_is_cannot_be_changed(command, model, capsys, tmp_path):
    draw_all(tmp_path / "pictures" / "a", 1)
    line = fails(command, [model, "pictures", "--keep-rate", "0.5"], capsys)
    assert "--keep-rate: " in line
    assert "convert the checkpoint anew" in line
    assert "was not written by dvit-convert" in fails(command, [foreign("f.onnx"), "pictures"], capsys)
    if command is eval:
        line = fails(command, [model, "pictures", "--against-reference"], capsys)
        assert "--against-reference: " in line


def test_a_header_that_lies_is_found_out(checkpoint, capsys, tmp_path):
    draw_all(tmp_path / "pictures" / "a", 1)
    with_kept = tmp_path / "k.onnx"
    given = [*TINY_FACTS, "--format", "onnx", "--kept", "--no-verify", "-o", str(with_kept)]
    assert convert.main([str(checkpoint), *given]) == 0
    capsys.readouterr()
    for before, after, says in (
        ('"num_classes": 10', '"num_classes": 11', "its header says logits are [11]"),
        (
            '"patch_size": 16',
            '"patch_size": "16"',
            "cannot be true: patch_size: '16' is no positive whole number",
        ),
        ('"format": 1', '"format": 2', "its format is 2"),
        ('"patch_size": 16', '"patch_size": 1000000000', "is no multiple of the patch size"),
        ('"depth": 4', '"depth": -1', "depth: -1"),
        ('"num_heads": 2', '"num_heads": 0', "num_heads: 0"),
        ('"keep_rate": 0.7', '"keep_rate": 1e308', "keep_rate: 1e+308"),
        ('"keep_rate": 0.7', '"keep_rate": 0.5', "its header says kept_0 are [98]"),
        ('"prune_at": [1, 2, 3]', '"prune_at": [3, 2, 1]', "is not strictly increasing"),
        ('"family": "deit"', '"family": "zzz"', "family: 'zzz' is not known"),
    ):
        content = onnx.load(with_kept)
        (entry,) = [entry for entry in content.metadata_props if entry.key == "dvit_infer"]
        assert before in entry.value
        entry.value = entry.value.replace(before, after)
        onnx.save(content, "lies.onnx")
        assert says in fails(eval, ["lies.onnx", "pictures"], capsys)


def test_an_input_of_a_wrong_shape_is_told(model):
    loaded = dvit.load_onnx(model, device="cpu")
    images = dvit.images.sample_images(2, (32, 32))
    with pytest.raises(ValueError, match=r"images: shape \(2, 3, 32, 32\)"):
        loaded(images)
    with pytest.raises(dvit.InputError, match="images: ONNX Runtime: Got invalid dimensions"):
        dvit.backends.onnxruntime.run_session(loaded.runner.session, {"images": images}, ["logits"])


def test_ways_of_dvit_bench_with_a_checkpoint(checkpoint, capsys):
    import torch

    content = official_checkpoint(TINY)
    content["args"].num_heads = 2
    torch.save(content, "own.pth")
    assert (
        bench.main(["own.pth", "--batch", "2", "--seconds", "0", "--device", "cpu", "--compare", "onnx,onnx-int8"]) == 0
    )
    out = capsys.readouterr().out
    assert "onnxruntime (converted)" in out
    assert "onnxruntime (int8)" in out
    assert "engine: PyTorch" in out


def test_int8_is_written_with_the_flips_it_caused(checkpoint, capsys, tmp_path):
    given = ["--format", "onnx", "--quantize", "int8", "--kept", "--json", "j.json"]
    assert convert.main([str(checkpoint), *TINY_FACTS, *given]) == 0
    out = capsys.readouterr().out
    assert "parity passed: 64 pictures, int8 on cpu" in out
    assert "all follow from the file, to half a step" in out
    parity = json.loads(Path("j.json").read_text())["parity"]
    assert 0.5 < parity["top1_agreement"] <= 1
    assert all(0.9 < overlap <= 1 for overlap in parity["kept_overlap"])
    assert parity["max_error"] > 0
    found = onnx.load("ckpt.dvit.onnx")
    assert {"MatMulInteger"} <= {node.op_type for node in found.graph.node}
    assert {weight.data_type for weight in found.graph.initializer if "prune" in weight.name} == {TensorProto.FLOAT}


def test_predict_needs_the_file_alone(model, capsys, tmp_path, monkeypatch):
    draw_all(tmp_path / "pictures", 1)
    monkeypatch.setattr("dvit_infer.onnx_file.probed", lambda *given: pytest.fail("a second model was made"))
    assert predict.main([str(model), "pictures", "--device", "cpu", "--workers", "0"]) == 0
    assert "top5" in capsys.readouterr().out
