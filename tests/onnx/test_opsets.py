"""Every opset that can be written: valid, of the stated IR version, and with the engine's answers in ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from golden_cases import answers, case_images, official_checkpoint, options, same_kept

import dvit_infer as dvit
import dvit_infer.images.synthetic
from dvit_infer.backends.openvino_model import core
from dvit_infer.onnx.export import OPENVINO_HINT
from dvit_infer.onnx.opsets import IR_VERSIONS
from dvit_infer.onnx.session import LEVELS, open_session

CPU = torch.device("cpu")
CASES = ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1"]
# Of the official float32 answers; a float16 file is compared with them too.
TOLERANCE = {"float32": 2e-4, "float16": 2e-2}


def engine_of(case_id):
    return dvit.convert(official_checkpoint(case_id), device="cpu", **options(case_id))


def exported(case_id, path, **given):
    dvit.export_onnx(engine_of(case_id), path, kept=True, **given)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


@pytest.mark.parametrize("inline", [False, pytest.param(True, marks=pytest.mark.large)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("opset", IR_VERSIONS)
@pytest.mark.parametrize("case_id", CASES)
def test_every_opset_gives_the_official_answers(case_id, opset, dtype, inline, tmp_path):
    model = exported(case_id, tmp_path / "m.onnx", dtype=dtype, opset=opset, inline=inline)
    assert model.ir_version == IR_VERSIONS[opset]
    assert next(entry.version for entry in model.opset_import if not entry.domain) == opset
    assert bool(model.functions) != inline
    expected, kept, margin = answers(case_id)
    images = case_images(case_id).numpy().astype(dtype)
    for level in (LEVELS[0], LEVELS[-1]):
        session = open_session(tmp_path / "m.onnx", CPU, "test", level)
        logits, *found = (torch.from_numpy(out) for out in session.run(None, {"images": images}))
        assert (logits - expected).abs().max() <= TOLERANCE[dtype]
        if dtype == "float32":
            assert same_kept(found, kept, margin)


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_a_file_of_any_opset_is_verified(opset, tmp_path):
    """Also its weights, among them the constants of a GELU that is written out."""
    exported(CASES[0], tmp_path / "m.onnx", opset=opset, inline=True)
    report = dvit.verify(dvit.load_onnx(tmp_path / "m.onnx", device="cpu"), official_checkpoint(CASES[0]), num_images=2)
    assert report.passed, report


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_bytes_as_images(opset, tmp_path):
    engine = engine_of(CASES[1])
    exported(CASES[1], tmp_path / "m.onnx", opset=opset, uint8=True)
    images = dvit.images.synthetic.sample_uint8_images(3, engine.config.image_size, seed=3)
    model = dvit.load_onnx(tmp_path / "m.onnx", device="cpu")
    assert (model(images) - engine(images)).abs().max() <= 2e-4


@pytest.mark.large
@pytest.mark.parametrize("opset", IR_VERSIONS)
@pytest.mark.parametrize("static", [False, True])
def test_int8_in_every_opset(static, opset, tmp_path):
    images = case_images(CASES[0])
    calibration = [images.numpy()] if static else None
    model = exported(CASES[0], tmp_path / "m.onnx", opset=opset, quantize="int8", calibration=calibration)
    assert model.ir_version == IR_VERSIONS[opset]
    found = dvit.load_onnx(tmp_path / "m.onnx", device="cpu")(images, kept=answers(CASES[0])[1])
    assert (found - answers(CASES[0])[0]).abs().max() <= 0.2


def operators(model):
    return {node.op_type for node in [*model.graph.node, *(node for f in model.functions for node in f.node)]}


@pytest.mark.parametrize(("opset", "written_out"), [(17, True), (19, True), (20, False), (21, False)])
def test_gelu_is_written_out_where_the_opset_lacks_it(opset, written_out, tmp_path):
    model = exported(CASES[0], tmp_path / "m.onnx", opset=opset)
    assert ("Erf" in operators(model)) == written_out
    assert ("Gelu" in operators(model)) != written_out


@pytest.mark.parametrize("opset", [17, 18, 19])
def test_norms_have_a_bias_for_old_runtimes(opset, tmp_path):
    model = exported(CASES[0], tmp_path / "m.onnx", opset=opset)
    nodes = [*model.graph.node, *model.functions[0].node]
    assert {len(node.input) for node in nodes if node.op_type == "LayerNormalization"} == {3}


def test_a_written_out_gelu_is_exact_in_float16(tmp_path):
    """As exact as the operator: it computes in float32."""
    images, errors = case_images(CASES[0]).half().numpy(), []
    for opset in (19, 20):
        exported(CASES[0], tmp_path / "m.onnx", opset=opset, dtype="float16")
        logits = open_session(tmp_path / "m.onnx", CPU, "test").run(["logits"], {"images": images})[0]
        errors.append(np.sqrt(np.square(logits - answers(CASES[0])[0].numpy()).mean()))
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_openvino_with_the_hint_of_the_file(opset, tmp_path):
    pytest.importorskip("openvino")
    model = exported(CASES[0], tmp_path / "m.onnx", opset=opset, inline=True)
    hint = {entry.key: entry.value for entry in model.metadata_props}["openvino_hint"]
    assert hint == OPENVINO_HINT
    read = core().read_model(tmp_path / "m.onnx")
    assert read.get_rt_info(["framework", "openvino_hint"]).value == hint
    name, value = hint.split("=")
    compiled = core().compile_model(read, "CPU", {name: value})
    expected, kept, margin = answers(CASES[0])
    logits, *found = (torch.from_numpy(compiled([case_images(CASES[0]).numpy()])[i]) for i in range(4))
    assert (logits - expected).abs().max() <= TOLERANCE["float32"]
    assert same_kept([stage.long() for stage in found], kept, margin)


@pytest.mark.parametrize("opset", [16, 22, 0, -1, 17.0, "17", True, None])
def test_other_opsets_are_refused(opset, tmp_path):
    with pytest.raises(dvit.InputError, match=r"^opset: .*; 17 to 21 can be written$"):
        dvit.export_onnx(engine_of(CASES[0]), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
