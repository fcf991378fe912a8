"""The OpenVINO backend: the reference's answers for every kind; float32 scores; threads."""

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from any_vit import FEW, KINDS, agrees, tiny
from golden_cases import case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.openvino import OpenVinoRunner
from dvit_infer.backends.openvino_model import compile_model, core, openvino_model
from dvit_infer.graph import fold
from dvit_infer.operators.prune_tokens import select
from dvit_infer.ops.prune_tokens import select_tokens_ref

ops = pytest.importorskip("openvino").opset13
from dvit_infer.operators.openvino import OpenVinoBuilder  # noqa: E402

CASE = "tiny-deit-r0.7-s1"
F32, BF16 = ({"INFERENCE_PRECISION_HINT": hint} for hint in ("f32", "bf16"))


def runner(model):
    graph = fold(model.graph())
    return OpenVinoRunner(graph, lambda: graph)


def converted(case_id=CASE, **more):
    return dvit.convert(official_checkpoint(case_id), device="cpu", **options(case_id) | more)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, "random") for kind in KINDS]
    + [pytest.param(FEW[0], method, marks=pytest.mark.slow) for method in ("none", "predictor")]
    + [pytest.param(kind, method, marks=pytest.mark.large) for kind in FEW[1:] for method in ("none", "predictor")],
)
def test_every_kind(kind, method):
    model = tiny(kind, method, size=(24, 40))
    runs = runner(model)
    agrees(runs, model)
    if method != "none":
        images, kept = model.images(3), model.kept(3)
        with torch.no_grad():
            expected = model.reference().evaluate(images, kept).logits
        out = runs.run(images, kept)
        torch.testing.assert_close(out.x, expected, atol=2e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(out.choices, kept, strict=True))


def test_it_is_the_default_and_says_so():
    engine = converted()
    assert isinstance(engine.runner, OpenVinoRunner)
    assert str(engine.graph).splitlines()[-1].startswith("run by OpenVINO 20")
    assert isinstance(converted(backend="openvino").runner, OpenVinoRunner)
    assert type(converted(backend="torch").runner) is CpuRunner
    images = case_images(CASE)
    raw = (images * 40 + 120).clamp(0, 255).to(torch.uint8)
    for given in (images, raw, images.half(), images[:1], images.flip(3)):
        torch.testing.assert_close(engine(given), converted(backend="torch")(given), atol=2e-5, rtol=0)


def test_the_choice_is_the_op_s():
    """Ties, zeros of both signs, NaN and infinities."""
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[0.0, -0.0, 1.0, nan, -inf, inf, -0.0, 0.0, nan, 1.0, -3e38, -inf]])
    scores = torch.cat([scores, torch.randint(0, 4, (5, 12)).float()])
    for k in range(1, scores.shape[1] + 1):
        to, score = OpenVinoBuilder(core()), ops.parameter([-1, 12], np.float32)
        model = pytest.importorskip("openvino").Model([select(to, score.output(0), to.ints(k))], [score], "select")
        found = compile_model(model, F32)([scores.numpy()])[0]
        assert torch.equal(torch.from_numpy(found), select_tokens_ref(scores, k))


@pytest.mark.parametrize(
    ("rows", "width", "half", "leaves"),
    [(64, 1024, False, True), (63, 1024, False, False), (64, 1023, False, False), (64, 1024, True, False)],
)
def test_linears_whose_rows_share_the_sets_of_a_cache_leave_mlas(rows, width, half, leaves):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, rows, width), torch.randn(96, width) / 32, torch.randn(96)
    to, given = OpenVinoBuilder(core(), half=half), ops.parameter([-1, rows, width], np.float32)
    model = pytest.importorskip("openvino").Model([to.linear(given.output(0), "fc2", weight, bias)], [given], "linear")
    compiled = compile_model(model, F32)
    (info,) = (
        info
        for node in compiled.get_runtime_model().get_ordered_ops()
        if (info := node.get_rt_info())["layerType"].astype(str) == "FullyConnected"
    )
    leaves = leaves and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert ("PRelu" in {op.get_type_name() for op in model.get_ops()}) == leaves
    assert not (leaves and "mlas" in info["primitiveType"].astype(str))
    x[0, 1, 0], x[1, 2, 3] = float("nan"), float("inf")
    expected = torch.nn.functional.linear(x, weight, bias)
    found = torch.from_numpy(compiled([x.numpy()])[0])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5, equal_nan=True)


def operators(compiled):
    """(kind, precision, the operators it was made of) of everything that runs."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    names = ("layerType", "runtimePrecision", "originalLayersNames")
    return [tuple(info[name].astype(str) for name in names) for info in nodes]


def scoring(compiled, *kinds):
    return {precision for kind, precision, made_of in operators(compiled) if "prune." in made_of and kind in kinds}


@pytest.mark.skipif("BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="no bfloat16 here")
def test_scores_stay_float32():
    graph = converted(dtype="bfloat16").graph
    compiled = compile_model(openvino_model(graph), BF16)
    assert scoring(compiled, "MVN", "Reduce", "Split") == {"f32"}
    assert {precision for kind, precision, _ in operators(compiled) if kind == "TopK"} <= {"f32", "i32"}
    assert scoring(compiled, "MatMul") == {"f32"}  # the product with a vector that is the score
    blocks = {p for kind, p, made_of in operators(compiled) if "blocks." in made_of and kind == "FullyConnected"}
    assert blocks == {"bf16"}

    quantised = compile_model(openvino_model(converted().graph, int8=True), BF16)
    assert scoring(quantised, "MVN", "Reduce", "Split", "FullyConnected", "MatMul") == {"f32"}


@pytest.mark.parametrize("case_id", [CASE, pytest.param("tiny-lvvit-r0.7-s1", marks=pytest.mark.slow)])
def test_in_bfloat16_it_keeps_what_pytorch_keeps(case_id):
    """As much of the reference's sets as plain PyTorch in bfloat16 does, but for a token in a hundred."""
    checkpoint = official_checkpoint(case_id)
    reports = [
        dvit.verify(converted(case_id, dtype="bfloat16", backend=backend), checkpoint)
        for backend in ("openvino", "torch")
    ]
    assert all(report.passed for report in reports)
    for ours, theirs in zip(*(report.kept_overlap for report in reports), strict=True):
        assert ours > theirs - 0.01


def test_threads_share_an_engine():
    engine, images = converted(), case_images(CASE)
    expected = [engine(images[i : i + 1]) for i in range(len(images))]
    start = threading.Barrier(4)

    def call(worker):
        start.wait()
        return [torch.equal(engine(images[i : i + 1]), expected[i]) for i in range(len(images)) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(same) for same in pool.map(call, range(4)))


def test_hooks_and_nodes_are_pytorchs():
    engine, images = converted(), case_images(CASE)
    _, kept = engine(images, return_kept=True)
    values = engine.node_values(engine.outline.nodes, images, kept)
    assert [node.name for node, _ in values] == [node.name for node in engine.outline.nodes]
    torch.testing.assert_close(values[-1][1], engine(images), atol=2e-5, rtol=0)
    seen = []
    engine.runner.run(images, None, lambda node, out: seen.append(node.name))
    assert seen == [node.name for node in engine.graph.nodes]


def test_copies_and_pickles_give_the_same(tmp_path):
    engine, images = converted(), case_images(CASE)
    for other in (copy.deepcopy(engine), copy.copy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other(images), engine(images))
        assert str(other.graph) == str(engine.graph)


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_that_has_gone(large, tmp_path, monkeypatch):
    """The engine gives every output; its table can be printed; PyTorch's weights of a large model cannot be read."""
    monkeypatch.setattr("dvit_infer.backends.openvino.LEAST_BYTES", 0 if large else 1 << 30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    converted().save(tmp_path / "m.safetensors")
    engine, images = dvit.load(tmp_path / "m.safetensors", device="cpu"), case_images(CASE)
    table = str(engine.graph)
    assert engine.graph.nodes[-1].weights["head.bias"].isfinite().all()
    (tmp_path / "m.safetensors").unlink()
    logits, kept = engine(images, return_kept=True)
    torch.testing.assert_close(engine(images, kept=kept), logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(engine.tokens(images)[0][:, 0], engine.features(images), atol=2e-5, rtol=0)
    assert torch.equal(copy.deepcopy(engine)(images), logits)
    assert str(engine.graph) == table == str(engine.outline)
    if large:
        with pytest.raises(dvit.InputError, match=r"m\.safetensors"):
            engine.runner.run(images, None, lambda node, out: None)


@pytest.mark.parametrize("kind", ["deit", "dinov3", "beit", "clip", "siglip", "eva02"])
def test_all_variants_of_one_model(kind, tmp_path, monkeypatch):
    """As they are kept in the cache: tables of places and int8's inputs are each variant's own."""
    monkeypatch.setattr("dvit_infer.backends.openvino.LEAST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny(kind, "random", size=(24, 40))
    graph = fold(model.graph())
    runs = OpenVinoRunner(graph, lambda: graph, b"key")
    assert len(list((tmp_path / "cache").rglob("model.bin"))) == 1
    agrees(runs, model)
    images, kept = model.images(3), model.kept(3)
    with torch.no_grad():
        expected = model.reference().evaluate(images, kept).logits
    torch.testing.assert_close(runs.run(images, kept).x, expected, atol=2e-5, rtol=0)


def test_under_other_defaults():
    """Default dtype float64, default device meta."""
    images, expected = case_images(CASE), converted()(case_images(CASE))
    torch.set_default_dtype(torch.float64)
    try:
        engine = converted(backend="openvino")
        int8 = converted(dtype="int8", calibrate=images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(engine(images), expected)
    with torch.device("meta"):
        again = converted(dtype="int8", calibrate=images)
    assert torch.equal(int8(images), again(images))


def test_a_call_keeps_no_more_than_its_images_alive():
    engine, many = converted(), torch.randn(200, 3, 224, 224)
    known = weakref.ref(many.untyped_storage())
    engine(many[:2])
    del many
    gc.collect()
    assert known() is None


def test_one_core_for_all_threads(monkeypatch):
    import openvino

    from dvit_infer.backends import openvino_model as module

    made = []

    def slow() -> object:
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    monkeypatch.setattr(module, "_core", [])
    monkeypatch.setattr(openvino, "Core", slow)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: id(module.core()), range(4)))) == len(made) == 1
