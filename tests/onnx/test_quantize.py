"""Int8 ONNX models: what stays as it was, how large their errors are; images to calibrate with."""

import logging
import tempfile

import numpy as np
import pytest
import torch
from drawn import draw_all, write_cut, write_text
from golden_cases import official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.images.synthetic import image

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx.numpy_helper import to_array  # noqa: E402

from dvit_infer.onnx.quantize import calibration_batches, quantize_int8  # noqa: E402
from dvit_infer.onnx.writer import onnx_model  # noqa: E402

CASE = "tiny-deit-r0.7-s1"
KINDS = ("dynamic", "static")
OUTPUTS = ("logits", "kept_0", "kept_1", "kept_2")


@pytest.fixture(scope="module")
def engine() -> dvit.Engine:
    return dvit.convert(official_checkpoint(CASE), device="cpu", **options(CASE))


@pytest.fixture(scope="module")
def float32(engine: dvit.Engine) -> onnx.ModelProto:
    model = onnx_model(engine.graph_in(torch.float32), kept=True)
    onnx.helper.set_model_props(model, {"arch": engine.config.arch})
    return model


@pytest.fixture(scope="module")
def quantised(engine: dvit.Engine, float32: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    calibration = [images(engine, 4, seed) for seed in (1, 2)]
    return {"float32": float32, "dynamic": quantize_int8(float32), "static": quantize_int8(float32, calibration)}


def images(engine: dvit.Engine, count: int, seed: int = 0) -> np.ndarray:
    return image(count, engine.config.image_size, seed)


def run(model: onnx.ModelProto, given: np.ndarray, level: str = "ENABLE_ALL") -> list[np.ndarray]:
    settings = ort.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 2
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(OUTPUTS, {"images": given})


def relative_error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Relative rms error."""
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())


def overlap(kept: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(kept, expected, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_linears_change(float32, quantised, kind):
    model = quantised[kind]
    onnx.checker.check_model(model, full_check=True)
    for field in ("ir_version", "opset_import", "metadata_props", "producer_name", "functions"):
        assert getattr(model, field) == getattr(float32, field), field
    for field in ("input", "output", "value_info"):
        assert getattr(model.graph, field) == getattr(float32.graph, field), field
    written = {name for node in model.graph.node for name in node.output}
    assert written >= {value.name for value in float32.graph.value_info}
    assert {node.domain for node in model.graph.node} == {"", "dvit"}  # no operator of ONNX Runtime's own

    before, after = ({t.name: t for t in of.graph.initializer} for of in (float32, model))
    linears = {node.input[1] for node in float32.graph.node if node.op_type == "MatMul"} & set(before)
    assert set(before) - set(after) == linears
    for name in set(before) - linears:  # the predictors' weights among them
        assert np.array_equal(to_array(after[name]), to_array(before[name])), name
    matrices = [t for t in after.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(matrices) == len(linears)


def test_opset_21_and_bytes_as_images(engine):
    float32 = onnx_model(engine.graph_in(torch.float32), kept=True, opset=21, uint8=True)
    given = np.random.default_rng(0).integers(0, 256, (3, *engine.config.image_size, 3), dtype=np.uint8)
    expected = run(float32, given)
    for calibration in (None, [given]):
        model = quantize_int8(float32, calibration)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import == float32.opset_import
        assert relative_error(run(model, given)[0], expected[0]) < 0.1


def test_a_dense_model(engine):
    dense = dvit.convert(official_checkpoint(CASE), device="cpu", method="none", **options(CASE))
    model = onnx_model(dense.graph_in(torch.float32))
    session = ort.InferenceSession(quantize_int8(model).SerializeToString(), providers=["CPUExecutionProvider"])
    expected = dense(torch.from_numpy(images(engine, 3))).numpy()
    assert relative_error(session.run(["logits"], {"images": images(engine, 3)})[0], expected) < 0.05


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_close(engine, float32, quantised, kind, batch):
    given = images(engine, batch, seed=7)
    logits, *kept = run(quantised[kind], given)
    expected, *expected_kept = run(float32, given)
    assert relative_error(logits, expected) < 0.1
    assert all(overlap(ours, theirs) > 0.9 for ours, theirs in zip(kept, expected_kept, strict=True))


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED"])
@pytest.mark.parametrize("kind", KINDS)
def test_optimisation_changes_no_more_than_a_rounding(engine, quantised, kind, level):
    """A last digit of float32 may fall on the other side of a step of int8, by which answers then differ."""
    given = images(engine, 3, seed=7)
    logits, *kept = run(quantised[kind], given, level)
    expected, *expected_kept = run(quantised[kind], given)
    assert relative_error(logits, expected) < 0.05
    assert all(overlap(ours, theirs) > 0.95 for ours, theirs in zip(kept, expected_kept, strict=True))


def test_ranges_fixed_by_calibration_leave_images_independent(engine, quantised):
    given = images(engine, 3, seed=7)
    logits, *kept = run(quantised["static"], np.concatenate([given, 2 * given]))
    alone, *kept_alone = run(quantised["static"], given)
    assert relative_error(logits[:3], alone) < 1e-5
    assert all(np.array_equal(ours[:3], theirs) for ours, theirs in zip(kept, kept_alone, strict=True))


def test_leaves_nothing_behind(engine, float32, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, handlers = float32.SerializeToString(), logging.root.handlers[:]

    def failing():
        yield images(engine, 2)
        raise KeyError("calibration")

    quantize_int8(float32)
    quantize_int8(float32, [images(engine, 2)])
    with pytest.raises(KeyError, match="calibration"):
        quantize_int8(float32, failing())
    with pytest.raises(ValueError, match="has no batch"):
        quantize_int8(float32, [])
    assert not list(tmp_path.iterdir())
    assert float32.SerializeToString() == before
    assert logging.root.handlers == handlers
    assert logging.root.manager.disable == 0
    assert capfd.readouterr() == ("", "")


def test_calibration_images_are_those_the_model_takes(engine, tmp_path):
    for name in ("a", "b/c"):
        draw_all(tmp_path / name, 10)
    write_text(tmp_path / "a" / "text.png")
    write_cut(tmp_path / "a" / "cut.jpg")
    height, width = engine.config.image_size
    floats = list(calibration_batches(tmp_path, engine.config))
    pixels = list(calibration_batches(tmp_path, engine.config, uint8=True))
    assert sum(map(len, floats)) == sum(map(len, pixels)) == 20
    assert {batch.shape[1:] for batch in floats} == {(3, height, width)}
    assert {batch.shape[1:] for batch in pixels} == {(height, width, 3)}
    assert {batch.dtype for batch in pixels} == {np.dtype(np.uint8)}
    mean, std = np.float32(engine.config.mean), np.float32(engine.config.std)
    expected = ((np.concatenate(pixels) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(np.concatenate(floats), expected, atol=1e-6)
    few = np.concatenate(list(calibration_batches(tmp_path, engine.config, count=6)))
    assert len(few) <= 6
    quantize_int8(onnx_model(engine.graph_in(torch.float32)), floats)


def test_a_folder_that_cannot_calibrate_is_named(engine, tmp_path):
    with pytest.raises(dvit.InputError, match=r"^calibrate: .*nowhere: there is no such"):
        calibration_batches(tmp_path / "nowhere", engine.config)
    with pytest.raises(dvit.InputError, match=f"^calibrate: {tmp_path}: no image"):
        calibration_batches(tmp_path, engine.config)
    write_text(tmp_path / "text.png")
    with pytest.raises(dvit.InputError, match=f"^calibrate: {tmp_path}: none of 1 images can be read"):
        list(calibration_batches(tmp_path, engine.config))
