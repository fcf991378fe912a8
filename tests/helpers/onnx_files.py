"""ONNX files for tests: of golden cases, one that dvit-convert wrote, and some of another origin."""

import numpy as np
import onnx
import pytest
import torch
from commands import TINY as TINY_FACTS
from golden_cases import official_checkpoint, options
from onnx import TensorProto, helper, numpy_helper

import dvit_infer as dvit
from dvit_infer.cli import convert

TINY = "tiny-deit-r0.7-s1"


@pytest.fixture(scope="module", name="checkpoint")
def a_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pth"
    torch.save(official_checkpoint(TINY), path)
    return path


@pytest.fixture(scope="module", name="model")
def a_model(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    assert convert.main([str(checkpoint), *TINY_FACTS, "--format", "onnx", "-o", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def exported(case_id, path, dtype="float32", **given):
    """The case's checkpoint as an ONNX file at `path`."""
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", **options(case_id))
    dvit.export_onnx(engine, path, dtype=dtype, **given)
    return path


def foreign(path, shape=("b", 3, 32, 32), element=TensorProto.FLOAT, inputs=1):
    """An ONNX file of another origin: images' means, times a matrix."""
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
