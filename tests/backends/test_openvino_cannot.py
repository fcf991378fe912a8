"""What the OpenVINO backend cannot run, or not here: PyTorch runs it, and says why."""

import pickle
import sys

import pytest
import torch
from golden_cases import case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends import runner_for
from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.openvino_model import why_not_openvino

pytest.importorskip("openvino")

CASE = "tiny-deit-r0.7-s1"


def converted(**more):
    return dvit.convert(official_checkpoint(CASE), device="cpu", **options(CASE) | more)


def test_without_openvino_pytorch_runs_it_and_one_line_says_what_is_faster(monkeypatch):
    pickled = pickle.dumps(converted())
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it raises ModuleNotFoundError
    engine = converted()
    assert type(engine.runner) is CpuRunner
    hint = "openvino would be faster; run pip install 'dvit-infer[cpu]'"
    assert str(engine.graph).splitlines()[-1].endswith(f"({hint})")
    for given, what in (({"backend": "openvino"}, "backend"), ({"dtype": "int8"}, "dtype")):
        with pytest.raises(dvit.InputError, match=rf"^{what}: openvino is not installed; run pip install"):
            converted(**given)
    other = pickle.loads(pickled)
    torch.testing.assert_close(other(case_images(CASE)), engine(case_images(CASE)), atol=2e-5, rtol=0)
    assert str(other.graph) == str(engine.graph)


def test_an_openvino_without_what_it_needs(monkeypatch, tmp_path):
    """Is not taken for none."""
    (tmp_path / "openvino.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino")
    assert why_not_openvino(converted().graph) == "openvino cannot be imported: No module named 'what_it_needs'"


def test_a_damaged_openvino(monkeypatch, tmp_path):
    (tmp_path / "openvino.py").write_text("raise OSError('libtbb.so.12: cannot open shared object file\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino")
    said = "openvino cannot be imported: libtbb.so.12: cannot open shared object file"
    assert why_not_openvino(converted().graph) == said
    assert f"({said})" in str(converted().graph)


def test_a_node_that_it_does_not_know(monkeypatch):
    monkeypatch.setattr("dvit_infer.graph.nodes.Mlp.kind", "mixer")
    monkeypatch.setattr("dvit_infer.backends.torch.TorchRunner.mixer", CpuRunner.mlp, raising=False)
    said = "blocks.0.mlp, a node of kind 'mixer', cannot be written for openvino"
    engine = converted()
    assert type(engine.runner) is CpuRunner
    assert str(engine.graph).endswith(f"({said})")
    with pytest.raises(dvit.InputError, match=f"^backend: {said}"):
        converted(backend="openvino")


def test_a_model_that_openvino_cannot_compile(monkeypatch):
    def fails(*given):
        raise RuntimeError(
            "Exception from src/inference/src/cpp/core.cpp:117:\nCheck 'x' failed at y:\nno such thing\n"
        )

    monkeypatch.setattr("dvit_infer.backends.openvino.compile_model", fails)
    assert "(openvino cannot compile dynamicvit-deit-64x4: Check 'x' failed at y:)" in str(converted().graph)
    with pytest.raises(dvit.InputError, match=r"^backend: openvino cannot compile"):
        converted(backend="openvino")


def test_an_openvino_that_is_too_old(monkeypatch):
    monkeypatch.setattr("dvit_infer.backends.openvino_model.version", lambda: (2023, 1))
    assert "(openvino 2023.1 is too old; 2025.4 or later runs it)" in str(converted().graph)
    with pytest.raises(dvit.InputError, match=r"^backend: openvino 2023\.1 is too old"):
        converted(backend="openvino")


def test_backends_that_do_not_fit():
    graph = converted().graph
    for given, said in {
        ("onnx", False): "backend: 'onnx' is not one of torch, triton, openvino",
        ("triton", False): "backend: triton runs on NVIDIA GPUs",
        ("torch", True): "dtype: int8 is run by openvino on CPUs, not by backend torch",
    }.items():
        with pytest.raises(dvit.InputError, match=f"^{said}"):
            runner_for(graph, given[0], int8=given[1])
    with pytest.raises(dvit.InputError, match=r"^backend: openvino runs float32 and bfloat16, not float16"):
        converted(dtype="float16", backend="openvino")
    assert type(converted(dtype="float16").runner) is CpuRunner
    meta = graph.to(torch.device("meta"), torch.float32)
    with pytest.raises(dvit.InputError, match=r"^backend: openvino runs on CPUs, not on meta"):
        runner_for(meta, "openvino")
    with pytest.raises(dvit.InputError, match=r"^dtype: int8 is run by openvino on CPUs, not by meta"):
        runner_for(meta, int8=True)


def test_with_dvit_prune_pytorch_runs_it(monkeypatch):
    monkeypatch.setenv("DVIT_PRUNE", "native")
    with pytest.raises(dvit.InputError, match=r"^backend: openvino has prune_tokens of its own"):
        converted(backend="openvino")


def test_out_of_memory_is_said(monkeypatch):
    engine = converted()

    def fails(request, inputs):
        raise RuntimeError("Exception from src/x.cpp:1:\nstd::bad_alloc")

    monkeypatch.setattr(engine.runner, "_infer", fails)
    with pytest.raises(MemoryError):
        engine(case_images(CASE))
