"""Parity of ONNX files: what is wrong in one is found, in the file itself and in weights of any dtype."""

import onnx
import pytest
from golden_cases import official_checkpoint
from onnx_files import TINY, exported

import dvit_infer as dvit


def test_verify_finds_what_is_wrong_in_a_file(tmp_path):
    path = exported(TINY, tmp_path / "m.onnx", kept=True)
    assert dvit.verify(dvit.load_onnx(path, device="cpu"), official_checkpoint(TINY), num_images=2).passed
    model = onnx.load(path)
    (weight,) = [w for w in model.graph.initializer if w.name == "blocks.2.mlp/fc1.weight"]
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, ::3] *= 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    report = dvit.verify(dvit.load_onnx(path, device="cpu"), official_checkpoint(TINY), num_images=2)
    assert not report.passed
    assert "blocks.2.mlp/fc1.weight" in report.wrong_weight
    assert report.first_difference.startswith("blocks.2.mlp")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kept", [False, True])
def test_verify_judges_the_file_itself(dtype, kept, tmp_path, monkeypatch):
    """Not only the probe, which is another model with the same weights."""
    model = dvit.load_onnx(exported(TINY, tmp_path / "m.onnx", dtype, kept=kept), device="cpu")
    assert dvit.verify(model, official_checkpoint(TINY), num_images=3).passed

    class Wrong:
        def __init__(self, session):
            self.session = session

        def run(self, *given):
            logits, *others = self.session.run(*given)
            return [logits + 0.05, *others]

    monkeypatch.setattr(model.runner, "session", Wrong(model.runner.session))
    report = dvit.verify(model, official_checkpoint(TINY), num_images=3)
    assert any(failure.startswith("logits") for failure in report.failures)


def test_verify_looks_at_quantised_weights(tmp_path):
    path = exported(TINY, tmp_path / "m.onnx", quantize="int8")
    assert dvit.verify(dvit.load_onnx(path, device="cpu"), official_checkpoint(TINY), num_images=2).passed
    model = onnx.load(path)
    (weight,) = [w for w in model.graph.initializer if w.name == "blocks.2.mlp/fc1.weight_quantized"]
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, :4] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    report = dvit.verify(dvit.load_onnx(path, device="cpu"), official_checkpoint(TINY), num_images=2)
    assert "blocks.2.mlp/fc1.weight" in report.wrong_weight
