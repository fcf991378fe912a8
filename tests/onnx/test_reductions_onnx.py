"""EViT and ToMe as ONNX files: the reference's answers, kept sets as outputs or by a probe, what is in the files."""

import numpy as np
import onnx
import pytest
import torch
from any_vit import FEW, REDUCTIONS, every_reduction, tiny
from onnx.numpy_helper import to_array

import dvit_infer as dvit
from dvit_infer.graph import fold
from dvit_infer.images.synthetic import sample_uint8_images
from dvit_infer.onnx.quantize import quantize_int8
from dvit_infer.onnx.session import LEVELS, open_session
from dvit_infer.onnx.writer import onnx_model
from dvit_infer.operators.attention import EXACT

CPU = torch.device("cpu")
SIZE = (24, 40)  # 15 patches
TOLERANCE = 2e-5

EVERY = every_reduction(("deit", 0), ("qk-norm", 2), ("beit", 1))
OPSETS = [17, 18, 20, 21]


def written(model, path, **given):
    dvit.export_onnx(model.engine(backend="torch"), path, **given)
    return dvit.load_onnx(path, device="cpu")


def evaluated(model, images, kept=None):
    with torch.no_grad():
        return model.reference().evaluate(images, kept)


def check(found, model, batch=3):
    """Logits, choices, and another image's choices."""
    images = model.images(batch)
    expected = evaluated(model, images)
    logits, kept = found(images, return_kept=True)
    torch.testing.assert_close(logits, expected.logits, atol=TOLERANCE, rtol=0)
    assert [stage.dtype for stage in kept] == [torch.int64] * len(expected.kept)
    assert all(map(torch.equal, kept, expected.kept))
    given = [stage.roll(1, 0) for stage in expected.kept]
    other = evaluated(model, images, given).logits
    torch.testing.assert_close(found(images, kept=given), other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "method", "settings"), EVERY)
def test_it_answers_as_the_reference(kind, method, settings, tmp_path):
    """With kept sets as outputs, and without: a probe then tells them. Every node's value can be read."""
    model = tiny(kind, method, SIZE, settings)
    for kept in (True, False):
        found = written(model, tmp_path / "m.onnx", kept=kept)
        check(found, model)
    report = dvit.verify(found, model.state, num_images=2)
    assert report.passed, report
    assert report.first_difference is None, report


@pytest.mark.parametrize("method", ["evit", "tome"])
def test_kept_sets_have_the_shapes_of_the_method(method, tmp_path):
    """Of a merge, the group of every patch; of EViT, without the fused token."""
    model = tiny("deit", method, SIZE)
    written(model, tmp_path / "m.onnx", kept=True)
    outputs = {value.name: value.type.tensor_type for value in onnx.load(tmp_path / "m.onnx").graph.output}
    counts = (15, 15) if method == "tome" else model.config.num_keep
    for i, count in enumerate(counts):
        batch, width = outputs[f"kept_{i}"].shape.dim
        assert batch.dim_param
        assert width.dim_value == count
        assert outputs[f"kept_{i}"].elem_type == onnx.TensorProto.INT64
    assert list(outputs) == ["logits", "kept_0", "kept_1"]


def file_of(method, opset=20, dtype=torch.float32, **given):
    """A file with every part of a method: class and patch rows, places that are gathered, an odd number of tokens."""
    model = tiny("beit", method, SIZE, {"merge": 3} if method == "tome" else {})
    return onnx_model(fold(model.graph()).to(CPU, dtype), opset=opset, kept=True, **given)


@pytest.mark.parametrize("method", ["evit", "tome"])
@pytest.mark.parametrize("opset", OPSETS)
def test_files_are_valid_and_of_operators_that_runtimes_know(opset, method):
    """None of this project's own, and none that scatters with a reduction, which old runtimes lack."""
    for dtype in (torch.float32, torch.float16):
        model = file_of(method, opset, dtype, uint8=dtype == torch.float16)
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
        assert not model.functions
        scatters = [node for node in model.graph.node if node.op_type.startswith("Scatter")]
        assert all(attribute.name != "reduction" for node in scatters for attribute in node.attribute)
        assert {node.op_type for node in scatters} == ({"ScatterElements"} if method == "evit" else set())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "settings"), [("beit", *reduction) for reduction in REDUCTIONS])
@pytest.mark.parametrize("opset", [OPSETS[0], *(pytest.param(opset, marks=pytest.mark.large) for opset in OPSETS[1:])])
def test_every_opset_answers(opset, kind, method, settings, tmp_path):
    """At every level of ONNX Runtime's optimisation; inlined as well."""
    model = tiny(kind, method, SIZE, settings)
    images, expected = model.images(3), evaluated(model, model.images(3))
    for inline in (False, True):
        check(written(model, tmp_path / "m.onnx", opset=opset, inline=inline, kept=True), model)
    for level in LEVELS:
        session = open_session(tmp_path / "m.onnx", CPU, "test", level)
        logits, *kept = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=TOLERANCE)
        assert all(np.array_equal(a, b) for a, b in zip(kept, expected.kept, strict=True))


@pytest.mark.parametrize("opset", [20, pytest.param(17, marks=pytest.mark.large)])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("deit", "tome")]
    + [pytest.param(kind, method, marks=pytest.mark.slow) for kind in FEW for method in ("evit", "tome")],
)
def test_float16_is_verified(kind, method, opset, tmp_path):
    model = tiny(kind, method, SIZE)
    found = written(model, tmp_path / "m.onnx", opset=opset, dtype="float16", kept=True)
    report = dvit.verify(found, model.state, num_images=4)
    assert report.passed, report
    assert report.first_difference is None, report


@pytest.mark.parametrize("method", ["tome", pytest.param("evit", marks=pytest.mark.slow)])
def test_bytes_as_images(method, tmp_path):
    model = tiny("deit", method, SIZE)
    images = sample_uint8_images(3, SIZE, seed=3)
    found = written(model, tmp_path / "m.onnx", uint8=True, kept=True)
    logits, kept = found(images, return_kept=True)
    expected, own = model.engine(backend="torch")(images, return_kept=True)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert all(map(torch.equal, kept, own))


@pytest.mark.parametrize("static", [pytest.param(True, marks=pytest.mark.slow), False], ids=["static", "dynamic"])
@pytest.mark.parametrize("method", ["tome", pytest.param("evit", marks=pytest.mark.slow)])
def test_int8_keeps_what_decides_in_float32(method, static, tmp_path):
    model = tiny("deit", method, SIZE)
    float32 = onnx_model(fold(model.graph()), kept=True)
    images = model.images(4)
    quantised = quantize_int8(float32, [images.numpy()] if static else None)
    onnx.checker.check_model(quantised, full_check=True)
    before, after = ({tensor.name: tensor for tensor in of.graph.initializer} for of in (float32, quantised))
    exact = [name for name in before if name.endswith((f"/{EXACT}.weight", f"/{EXACT}.bias"))]
    assert len(exact) == (4 if method == "tome" else 0)
    assert all(np.array_equal(to_array(after[name]), to_array(before[name])) for name in exact)
    assert "blocks.0.attn/k.weight" not in after  # which is int8
    (tmp_path / "m.onnx").write_bytes(quantised.SerializeToString())
    outputs = open_session(tmp_path / "m.onnx", CPU, "test").run(None, {"images": images.numpy()})
    assert [out.shape for out in outputs[1:]] == [tuple(stage.shape) for stage in evaluated(model, images).kept]


@pytest.mark.slow
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("method", ["evit", "tome"])
@pytest.mark.parametrize("kind", [FEW[0], *(pytest.param(kind, marks=pytest.mark.large) for kind in FEW[1:])])
def test_int8_is_close_and_verified(kind, method, static, tmp_path):
    """With the reference's choices; linears of few channels are coarse."""
    model = tiny(kind, method)
    images = model.images(4)
    calibration = [images.numpy()] if static else None
    found = written(model, tmp_path / "m.onnx", quantize="int8", calibration=calibration, kept=True)
    expected = evaluated(model, images)
    error = found(images, kept=expected.kept) - expected.logits
    assert error.square().mean().sqrt() < 0.1 * expected.logits.square().mean().sqrt()
    assert dvit.verify(found, model.state, num_images=4).passed
