"""ONNX files in ONNX Runtime: the official answers at every batch size and optimisation level; what is in them."""

import json

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from golden_cases import EVERY_CASE, answers, case_images, official_checkpoint, options, same_kept
from onnx_files import TINY, exported

import dvit_infer as dvit
import dvit_infer.images.synthetic
from dvit_infer.backends.openvino_model import core
from dvit_infer.models.header import HEADER_KEY
from dvit_infer.onnx.building import OnnxBuilder
from dvit_infer.onnx.session import LEVELS, open_session, run_bound, run_session
from dvit_infer.onnx.writer import onnx_model
from dvit_infer.operators.prune_tokens import select
from dvit_infer.parity.verification import RMS_FACTOR

CPU = torch.device("cpu")
TINY_LVVIT = "tiny-lvvit-r0.7-s1"
TOLERANCE = 2e-4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request):
    """A device that ONNX Runtime is there for."""
    if request.param == "cuda":
        onnxruntime = pytest.importorskip("onnxruntime")
        if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")
    return torch.device(request.param, 0) if request.param == "cuda" else CPU


def run(model, images, level=LEVELS[-1]):
    """Logits and kept sets that a file gives, with that much of ONNX Runtime's optimisation."""
    session = open_session(model, CPU, "test", level)
    logits, *kept = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits), [torch.from_numpy(stage) for stage in kept]


def float32_gives_the_official_answer(case_id, where, path):
    model = dvit.load_onnx(exported(case_id, path, kept=True), device=where)
    expected, kept, margin = answers(case_id)
    logits, found = model(case_images(case_id), return_kept=True)
    assert (logits.cpu() - expected).abs().max() <= TOLERANCE
    assert same_kept([stage.cpu() for stage in found], kept, margin)


def float16_is_as_exact_as_plain_float16(case_id, where, path):
    model = dvit.load_onnx(exported(case_id, path, "float16"), device=where)
    image, (expected, kept, _) = case_images(case_id)[:1], answers(case_id)  # plain float16 is slow on a CPU: one image
    reference = dvit.load_reference(official_checkpoint(case_id), **options(case_id)).to(where, torch.float16)
    given = [stage[:1] for stage in kept]
    with torch.no_grad():
        plain = reference.evaluate(image.to(where, torch.float16), [stage.to(where) for stage in given] or None)
    errors = [
        (logits.float().cpu() - expected[:1]).square().mean().sqrt()
        for logits in (model(image, kept=given), plain.logits)
    ]
    assert errors[0] <= RMS_FACTOR * errors[1]


WIDE = ("large", "base", "deit-b", "lvvit_m", "lvvit-m")  # in float16 they take a minute, and are the others, wider


@pytest.mark.parametrize(
    ("case_id", "parity"),  # a case's weights are made once for both
    [
        pytest.param(
            case.id, parity, marks=case.marks or [pytest.mark.slow] * (parity is not float32_gives_the_official_answer)
        )
        for case in EVERY_CASE
        for parity in (float32_gives_the_official_answer, float16_is_as_exact_as_plain_float16)
        if parity is float32_gives_the_official_answer or not any(name in case.id for name in WIDE)
    ],
)
def test_every_official_case(case_id, parity, where, tmp_path):
    parity(case_id, where, tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize("case_id", [TINY, TINY_LVVIT])
def test_any_batch_at_every_level_of_optimisation(case_id, opset, tmp_path):
    path = exported(case_id, tmp_path / "m.onnx", kept=True, opset=opset)
    size = dvit.load_onnx(path, device="cpu").config.image_size
    images = dvit.images.synthetic.sample_images(11, size, seed=5)
    reference = dvit.load_reference(official_checkpoint(case_id), **options(case_id))
    expected = reference.evaluate(images)
    for level in LEVELS:
        start = 0
        for batch in (1, 3, 7):
            part = slice(start, start + batch)
            logits, kept = run(path, images[part], level)
            assert (logits - expected.logits[part]).abs().max() <= TOLERANCE
            assert same_kept(kept, [stage[part] for stage in expected.kept], expected.margin[part])
            start += batch


def test_writing_leaves_the_engine_as_it_was():
    engine = dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY))
    before = engine(case_images(TINY))
    first, second = (onnx_model(engine.graph, uint8=True, kept=True).SerializeToString() for _ in range(2))
    assert torch.equal(engine(case_images(TINY)), before)
    assert first == second


def test_bound_tensors_are_read_and_written_where_they_are(tmp_path):
    session = open_session(exported(TINY, tmp_path / "m.onnx", kept=True), CPU, "test")
    wanted = ["kept_1", "logits"]
    given = {"images": case_images(TINY)}
    for bound, copied in zip(run_bound(session, given, wanted), run_session(session, given, wanted), strict=True):
        assert bound.dtype == copied.dtype
        assert torch.equal(bound, copied)


def test_prune_tokens_is_one_function_of_standard_operators(tmp_path):
    model = onnx.load(exported(TINY, tmp_path / "m.onnx"))
    (function,) = model.functions
    assert (function.domain, function.name) == ("dvit", "prune_tokens")
    assert {node.domain for node in function.node} == {""}
    operators = {node.op_type for node in function.node}
    assert {"TopK", "GatherND"} <= operators
    assert not any("Scatter" in name for name in operators)
    calls = [node for node in model.graph.node if node.domain]
    assert [node.op_type for node in calls] == ["prune_tokens"] * 3
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "dvit": 1}


def test_the_choice_is_the_op_s(tmp_path):
    """Ties, zeros of both signs, NaN and infinities."""
    to = OnnxBuilder(20, torch.float32)
    chosen = select(to, "score", "k")
    value = onnx.helper.make_tensor_value_info
    inputs = [value("score", 1, ("b", "n")), value("k", 7, (1,))]
    graph = onnx.helper.make_graph(to.nodes, "select", inputs, [value(chosen, 7, None)], to.weights)
    opset = [onnx.helper.make_opsetid("", 20)]
    session = open_session(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString(), CPU, ""
    )
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[0.0, -0.0, 1.0, nan, -inf, inf, -0.0, 0.0, nan, 1.0, -3e38, -inf]])
    for k in range(1, scores.shape[1] + 1):
        (index,) = session.run([chosen], {"score": scores.numpy(), "k": np.array([k])})
        assert torch.equal(torch.from_numpy(index), dvit.ops.prune_tokens.select_tokens_ref(scores, k))


def test_layer_norm_softmax_and_scores_stay_float32_in_a_float16_file(tmp_path):
    model = onnx.inliner.inline_local_functions(onnx.load(exported(TINY, tmp_path / "m.onnx", "float16")))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for operator in ("LayerNormalization", "Softmax", "ReduceMean", "TopK"):
        inputs = [node.input[0] for node in model.graph.node if node.op_type == operator]
        assert inputs
        allowed = {onnx.TensorProto.FLOAT} | ({onnx.TensorProto.INT64} if operator == "TopK" else set())
        assert {types[name] for name in inputs} <= allowed
    assert types["blocks.0.attn"] == onnx.TensorProto.FLOAT16
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_what_a_file_says_of_itself(tmp_path):
    path = exported(TINY, tmp_path / "m.onnx", labels={0: "none", 7: "seven"})
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    engine = dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY))
    assert facts["family"] == engine.config.family
    assert json.loads(facts["num_keep"]) == list(engine.config.num_keep)
    assert json.loads(facts["keep_rates"])[0] == pytest.approx(0.7, abs=0.01)
    assert json.loads(facts["labels"]) == {"0": "none", "7": "seven"}
    assert json.loads(facts["preprocessing"])["mean"] == list(engine.config.mean)
    prepared = {"image_size": [224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    assert prepared.items() <= json.loads(facts["preprocessing"]).items()
    assert facts["version"] == dvit.__version__
    assert HEADER_KEY in facts
    model = dvit.load_onnx(path, device="cpu")
    assert model.config == engine.config
    assert model.labels == {0: "none", 7: "seven"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_uint8_images_are_normalised_inside(dtype, tmp_path):
    path = exported(TINY, tmp_path / "m.onnx", dtype, uint8=True)
    engine = dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY))  # a float16 one may round as much
    model = dvit.load_onnx(path, device="cpu")
    images = dvit.images.synthetic.sample_uint8_images(3, engine.config.image_size, seed=3)
    assert (model(images) - engine(images)).abs().max() <= (1e-5 if dtype == "float32" else 2e-2)
    session = open_session(path, CPU, "test")
    (logits,) = session.run(None, {"images": images.permute(0, 2, 3, 1).numpy()})
    assert np.array_equal(logits, model(images).numpy())
    with pytest.raises(ValueError, match="takes uint8 images only"):
        model(images.float())


@pytest.mark.parametrize("case_id", [TINY, TINY_LVVIT])
def test_inlined_it_runs_in_openvino_with_the_same_answers(case_id, tmp_path):
    pytest.importorskip("openvino")
    path = exported(case_id, tmp_path / "m.onnx", inline=True, kept=True)
    model = onnx.load(path)
    assert not model.functions
    assert {entry.domain for entry in model.opset_import} == {""}
    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected, kept, margin = answers(case_id)
    logits, *found = (torch.from_numpy(compiled([case_images(case_id).numpy()])[i]) for i in range(4))
    assert (logits - expected).abs().max() <= TOLERANCE
    assert same_kept([stage.long() for stage in found], kept, margin)


@pytest.mark.parametrize("inline", [False, True])
def test_weights_of_a_large_model_lie_beside_it(inline, tmp_path, monkeypatch):
    monkeypatch.setattr("dvit_infer.onnx.probe.LARGEST", 1 << 16)
    path = exported(TINY, tmp_path / "m.onnx", inline=inline)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 1 << 18
    model = dvit.load_onnx(path, device="cpu")
    report = dvit.verify(model, official_checkpoint(TINY), num_images=2)  # the probe is too large for one message too
    assert report.passed, report
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(dvit.InputError, match=r"m.onnx: its weights are in m.onnx.data, which is missing beside it"):
        dvit.load_onnx(path, device="cpu")


def test_kept_sets_come_out_of_a_file_that_has_no_output_for_them(tmp_path):
    model = dvit.load_onnx(exported(TINY, tmp_path / "m.onnx"), device="cpu")
    expected, kept, margin = answers(TINY)
    logits, found = model(case_images(TINY), return_kept=True)
    assert (logits - expected).abs().max() <= TOLERANCE
    assert same_kept(found, kept, margin)
    other = [stage.clone() for stage in kept]
    for stage in other:
        stage[:] = torch.arange(stage.shape[1])
    reference = dvit.load_reference(official_checkpoint(TINY), **options(TINY))
    expected = reference.evaluate(case_images(TINY), other).logits
    assert (model(case_images(TINY), kept=other) - expected).abs().max() <= TOLERANCE


def test_a_link_finds_weights_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dvit_infer.onnx.probe.LARGEST", 1 << 16)
    (tmp_path / "there").mkdir()
    path = exported(TINY, tmp_path / "there" / "m.onnx")
    (tmp_path / "link.onnx").symlink_to(path)
    before = dvit.load_onnx(tmp_path / "link.onnx", device="cpu")
    assert before(case_images(TINY)).shape == answers(TINY)[0].shape
    digest = list(before.digest(path))
    other = dvit.convert(official_checkpoint("tiny-deit-r0.7-s41-tame"), device="cpu", **options(TINY))
    dvit.export_onnx(other, path)  # other weights in a file beside it are another model
    assert list(dvit.load_onnx(path, device="cpu").digest(path)) != digest
    monkeypatch.setattr("dvit_infer.onnx.probe.LARGEST", 1 << 30)
    dvit.export_onnx(other, path)
    assert not (tmp_path / "there" / "m.onnx.data").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"calibration": [np.zeros((1, 3, 8, 8), np.float32)]}, "calibration: is for quantize='int8'"),
        ({"quantize": "int8", "calibration": [np.zeros((1, 3, 8, 8), np.float32)]}, "calibration: arrays of"),
        ({"quantize": "int8", "calibration": []}, "calibration: has no batch"),
        ({"opset": "20"}, "opset: '20'"),
        ({"opset": 20.0}, "opset: 20.0"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16 cannot be written as ONNX"),
    ],
)
def test_export_says_what_cannot_be(given, says, tmp_path):
    with pytest.raises(dvit.InputError, match=says.replace("'", ".")):
        exported(TINY, tmp_path / "m.onnx", **given)
    assert not list(tmp_path.iterdir())
