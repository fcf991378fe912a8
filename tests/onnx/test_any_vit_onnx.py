"""Every kind of vision transformer as an ONNX file: the reference's answers in ONNX Runtime, in old opsets too."""

import json

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from any_vit import KINDS, every_kind, tiny
from PIL import Image

import dvit_infer as dvit
from dvit_infer.backends.openvino_model import core
from dvit_infer.cli import bench, convert, predict
from dvit_infer.graph import fold
from dvit_infer.images.synthetic import sample_uint8_images
from dvit_infer.models.header import HEADER_KEY
from dvit_infer.onnx.session import LEVELS, open_session
from dvit_infer.onnx.writer import onnx_model

CPU = torch.device("cpu")
QUICK = ("clip", "dinov3", "eva02", "beit", "qk-norm", "siglip")  # together every operator that is written
SOME = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def written(model, path, **given):
    """The model's ONNX file, loaded."""
    dvit.export_onnx(model.engine(), path, kept=True, **given)
    return dvit.load_onnx(path, device="cpu")


@pytest.mark.parametrize(
    ("method", "opset"),
    [("predictor", 17), *(pytest.param(method, 20, marks=pytest.mark.large) for method in ("predictor", "none"))],
)
@pytest.mark.parametrize("kind", SOME)
def test_the_references_answers(kind, method, opset, tmp_path):
    """Also of every node, whose values can be read, with the same kept sets."""
    model = tiny(kind, method, size=(24, 40))
    found = written(model, tmp_path / "m.onnx", opset=opset)
    with torch.no_grad():
        expected = model.reference().evaluate(model.images(3))
    logits, kept = found(model.images(3), return_kept=True)
    torch.testing.assert_close(logits, expected.logits, atol=2e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected.kept, strict=True))
    torch.testing.assert_close(found(model.images(3)[1:2]), expected.logits[1:2], atol=2e-5, rtol=0)
    report = dvit.verify(found, model.state, num_images=2)
    assert report.passed, report
    assert report.first_difference is None, report
    nodes = fold(model.graph()).nodes
    assert [node for node, _ in found.node_values(nodes, model.images(1), kept=[k[:1] for k in kept])] == list(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, pytest.param(17, marks=pytest.mark.large)])
@pytest.mark.parametrize("kind", every_kind(*QUICK))
def test_float16(kind, opset, tmp_path):
    model = tiny(kind, "predictor")
    report = dvit.verify(written(model, tmp_path / "m.onnx", opset=opset, dtype="float16"), model.state, num_images=4)
    assert report.passed, report
    assert report.first_difference is None, report


@pytest.mark.parametrize("kind", SOME)
def test_norms_softmax_rotation_and_pooling_are_float32_in_a_float16_file(kind):
    model = onnx.inliner.inline_local_functions(onnx_model(tiny(kind).engine(torch.float16).graph, opset=20))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    inside = {"LayerNormalization", "Softmax", "ReduceMean", "Sigmoid", "Tanh", "Split"}
    inputs = [node.input[0] for node in model.graph.node if node.op_type in inside]
    assert {types[name] for name in inputs} == {onnx.TensorProto.FLOAT}
    products = [node.output[0] for node in model.graph.node if node.op_type == "MatMul"]
    assert {types[name] for name in products} == {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
@pytest.mark.parametrize("static", [True, pytest.param(False, marks=pytest.mark.large)])
@pytest.mark.parametrize("kind", every_kind(*QUICK))
def test_int8(kind, static, tmp_path):
    """Linears of every kind; the scores and the rest stay float32."""
    model = tiny(kind, "predictor")
    images = model.images(4)
    calibration = [images.numpy()] if static else None
    found = written(model, tmp_path / "m.onnx", quantize="int8", calibration=calibration)
    with torch.no_grad():
        expected = model.reference().evaluate(images)
    error = found(images, kept=expected.kept) - expected.logits
    assert error.square().mean().sqrt() < 0.1 * expected.logits.square().mean().sqrt()
    assert dvit.verify(found, model.state, num_images=4).passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eva02", "beit", "mixed"])
def test_places_of_given_tokens_at_every_level_of_optimisation(kind, tmp_path):
    """Each image keeps other tokens, and its places follow."""
    model = tiny(kind, "predictor")
    found = written(model, tmp_path / "m.onnx")
    images, kept = model.images(3), model.kept(3)
    with torch.no_grad():
        expected = model.reference().evaluate(images, kept)
        own = model.reference().evaluate(images)
    torch.testing.assert_close(found(images, kept=kept), expected.logits, atol=2e-5, rtol=0)
    for level in LEVELS:
        (logits,) = open_session(tmp_path / "m.onnx", CPU, "test", level).run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, own.logits.numpy(), atol=2e-5)


def test_tables_that_blocks_share_are_stored_once():
    def sizes(kind):
        weights = onnx_model(fold(tiny(kind).graph())).graph.initializer
        return sorted(w.name for w in weights if w.name.endswith(("/sin", "/cos", "/pair_bias")))

    assert sizes("eva02") == ["blocks.0.attn/cos", "blocks.0.attn/sin"]
    assert sizes("beit") == ["blocks.0.attn/pair_bias", "blocks.1.attn/pair_bias"]
    assert len(sizes("mixed")) == 4
    assert sizes("deit") == []


def test_an_unfolded_graph_is_not_written():
    for kind, node in (("clip", "blocks.0.attn"), ("siglip", "blocks.0.attn"), ("eva02", "blocks.0.attn")):
        with pytest.raises(ValueError, match=f"{node} is not folded"):
            onnx_model(tiny(kind).graph())


@pytest.mark.parametrize("kind", ["dinov3", "deit"])
def test_a_control_is_written(kind, tmp_path):
    model = tiny(kind, "random")
    dvit.export_onnx(model.engine(), tmp_path / "m.onnx", kept=True)
    loaded = dvit.load_onnx(tmp_path / "m.onnx", device="cpu")
    assert dvit.verify(loaded, model.state, num_images=3).passed
    kept, ours = (of(model.images(), return_kept=True)[1] for of in (loaded, model.engine()))
    assert all(torch.equal(a, b) for a, b in zip(kept, ours, strict=True))


def test_a_model_without_classes_gives_its_embedding(tmp_path, monkeypatch, capsys):
    """And the commands say so or take it."""
    monkeypatch.chdir(tmp_path)
    model = tiny("clip")
    model.engine().save("m.safetensors")
    assert convert.main(["m.safetensors", "--format", "onnx", "--device", "cpu", "-o", "m.onnx", "--uint8"]) == 0
    assert "parity passed: clip, dense" in capsys.readouterr().out
    found = dvit.load_onnx("m.onnx", device="cpu")
    images = sample_uint8_images(2, model.config.image_size)
    embedding = found(images)
    assert embedding.shape == (2, 40)
    assert torch.equal(found.features(images), embedding)
    torch.testing.assert_close(embedding, model.engine()(images), atol=2e-5, rtol=0)
    with pytest.raises(dvit.InputError, match=r"tokens: m.onnx gives logits only"):
        found.tokens(images)
    Image.new("RGB", (8, 8)).save("image.png")
    assert predict.main(["m.onnx", "image.png", "--device", "cpu"]) == 2
    assert "clip has no classifier" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_without_classes_is_measured(tmp_path):
    written(tiny("clip"), tmp_path / "m.onnx")
    given = [str(tmp_path / "m.onnx"), "--batch", "1", "--device", "cpu", "--json", str(tmp_path / "b.json")]
    assert bench.main(given) == 0
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["model"] == "clip"


def test_an_embedding_of_another_width_than_the_headers_is_found(tmp_path):
    path = tmp_path / "m.onnx"
    written(tiny("clip"), path)
    model = onnx.load(path)
    header = next(entry for entry in model.metadata_props if entry.key == HEADER_KEY)
    header.value = header.value.replace('"projection": 40', '"projection": 41')
    onnx.save(model, path)
    with pytest.raises(dvit.InputError, match=r"its header says logits are \[41\], its graph says \[40\]"):
        dvit.load_onnx(path, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", every_kind(*QUICK))
def test_inlined_in_openvino(kind, tmp_path):
    pytest.importorskip("openvino")
    model = tiny(kind, "predictor")
    written(model, tmp_path / "m.onnx", inline=True)
    compiled = core().compile_model(tmp_path / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model.reference().evaluate(model.images(2))
    logits, *kept = (torch.from_numpy(compiled([model.images(2).numpy()])[i]) for i in range(3))
    torch.testing.assert_close(logits, expected.logits, atol=2e-4, rtol=0)
    assert all(torch.equal(a.long(), b) for a, b in zip(kept, expected.kept, strict=True))
