"""dvit-bench with ONNX files of any origin, and the ways that run ONNX beside others."""

import json
from pathlib import Path

import pytest
from commands import fails, run
from golden_cases import official_checkpoint
from onnx import TensorProto, helper
from onnx_files import TINY, a_checkpoint, a_model, changed, foreign, foreign_last, in_a_folder  # noqa: F401 (fixtures are found by being there)

import dvit_infer as dvit
from dvit_infer.cli import bench

pytestmark = pytest.mark.slow  # as a whole: each of them runs commands for half a second


@pytest.mark.slow
def test_bench_runs_a_file(model, capsys):
    given = ["--batch", "1,3", "--seconds", "0", "--compare", "onnxruntime,openvino", "--device", "cpu"]
    assert bench.main([str(model), *given, "--json", "b.json", "--report", "b.html"]) == 0
    out = capsys.readouterr().out
    assert "not known: whether its outputs are correct" in out
    assert "all runtimes agree" in out
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert [(row["runtime"], row["batch"]) for row in rows] == [
        (runtime, batch) for batch in (1, 3) for runtime in ("onnxruntime", "openvino")
    ]
    assert all(row["gmacs"] and row["params"] and row["max_logit_error"] is None for row in rows)


@pytest.mark.parametrize(
    ("shape", "element", "says"),
    [
        (("b", 3, 32, 32), TensorProto.FLOAT, "of another origin; float32"),
        pytest.param((2, 3, 32, 32), TensorProto.FLOAT16, "of another origin; float16", marks=pytest.mark.slow),
        pytest.param(("b", 3, "h", "w"), TensorProto.FLOAT, "its size is open, 224x224", marks=pytest.mark.slow),
        (("b", 32, 16, 3), TensorProto.UINT8, "of another origin; uint8"),
    ],
)
def test_bench_runs_a_foreign_file_and_says_what_it_cannot_know(shape, element, says, capsys):
    path = foreign("f.onnx", shape, element) if shape[-1] != 3 else foreign_last("f.onnx", shape)
    assert bench.main([path, "--seconds", "0", "--device", "cpu", "--json", "b.json", "--report", "b.html"]) == 0
    out = capsys.readouterr().out
    assert says in out
    assert "not known: its MACs, its weights, what it prunes, whether its outputs are correct" in out
    (row,) = json.loads(Path("b.json").read_text())["rows"]
    assert (row["runtime"], row["gmacs"], row["keep_rate"]) == ("onnxruntime", None, None)


def test_bench_takes_no_number_on_trust(capsys):
    changed("f.onnx", {"gflops": "x", "keep_rate": "abc", "params": "9" * 5000, "arch": "\x1b[31mred\nline"})
    assert bench.main(["f.onnx", "--seconds", "0", "--device", "cpu", "--json", "b.json"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    (row,) = json.loads(Path("b.json").read_text())["rows"]
    assert (row["gmacs"], row["keep_rate"]) == (None, None)


@pytest.mark.parametrize(
    ("nodes", "shape", "says"),
    [
        ([helper.make_node("ArgMax", ["y"], ["z"], axis=1)], (TensorProto.INT64, None), "no logits"),
        ([helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0)], (TensorProto.FLOAT, ()), "no logits"),
        ([helper.make_node("Log", ["n"], ["z"])], (TensorProto.FLOAT, None), "its output has NaN or Inf"),
    ],
)
def test_bench_says_what_no_logits_are(nodes, shape, says, capsys):
    absolute = [helper.make_node("Abs", ["y"], ["a"]), helper.make_node("Neg", ["a"], ["n"])]
    changed("f.onnx", output=([*absolute, *nodes], shape))
    line = fails(bench, ["f.onnx", "--seconds", "0", "--device", "cpu"], capsys)
    assert "f.onnx" in line
    assert says in line


@pytest.mark.slow
def test_bench_finds_that_a_runtime_agrees_with_itself(capsys):
    changed("f.onnx", output=([helper.make_node("Sub", ["y", "y"], ["z"])], (TensorProto.FLOAT, None)))
    given = ["--seconds", "0", "--device", "cpu", "--compare", "onnxruntime,openvino"]
    assert bench.main(["f.onnx", *given]) == 0
    assert "all runtimes agree" in capsys.readouterr().out


def test_bench_says_when_runtimes_do_not_agree(model, capsys, monkeypatch):
    from dvit_infer.benchmark import peers

    monkeypatch.setattr(
        peers, "openvino_call", lambda *given: lambda images: dvit.load_onnx(model, device="cpu")(-images)
    )
    given = ["--batch", "2", "--seconds", "0", "--compare", "onnxruntime,openvino", "--device", "cpu"]
    assert bench.main([str(model), *given]) == 1
    assert "do NOT agree" in capsys.readouterr().out


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


def test_bench_refuses_what_takes_no_images(capsys):
    foreign("f.onnx", inputs=2)
    assert "one input (B, 3, H, W)" in fails(bench, ["f.onnx"], capsys)
    foreign("f.onnx", ("b", 1, 32, 32))
    assert "three channels" in fails(bench, ["f.onnx"], capsys)
    foreign("f.onnx", element=TensorProto.INT64)
    assert "no image's" in fails(bench, ["f.onnx"], capsys)
    path = foreign("f.onnx", (2, 3, 32, 32))
    assert "--batch: f.onnx takes 2 images at a time, not 8" in fails(bench, [path, "--batch", "8"], capsys)


@pytest.mark.slow
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
    assert "engine: OpenVINO" in out


SIGNAL_AFTERWARDS = """
import signal, sys, threading
from pathlib import Path
from dvit_infer.benchmark.peers import openvino_call

calls = [openvino_call(Path(sys.argv[1]), "f32") for _ in range(2)]
calls.pop(0)
gone = threading.Thread(target=calls.clear)
gone.start()
gone.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.slow
def test_a_signal_after_openvino_is_handled(tmp_path):
    pytest.importorskip("openvino")
    done = run("-c", SIGNAL_AFTERWARDS, str(foreign(tmp_path / "m.onnx")))
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
