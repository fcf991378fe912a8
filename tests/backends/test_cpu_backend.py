"""The CPU backend: all linears give the golden outputs; a wrong one is not chosen; buffers belong to a runner."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from any_vit import FEW, KINDS, agrees, tiny
from golden_cases import answers, case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends import cpu
from dvit_infer.backends.cpu import CpuRunner, Linear
from dvit_infer.graph import fold
from dvit_infer.models.registry import build_graph
from dvit_infer.ops.attention import attention_ref

FLOAT32 = [Linear(torch.float32, prepacked=False), Linear(torch.float32, prepacked=True)]
CASES = ["tiny-deit-r0.7-s1", "tiny-lvvit-r0.7-s1", "timm-deit_tiny_patch16_224-at-192x256"]


def converted(case_id: str, linear: Linear, dtype: str = "float32") -> dvit.Engine:
    engine = dvit.convert(official_checkpoint(case_id), device="cpu", dtype=dtype, **options(case_id))
    engine.runner = CpuRunner(engine.graph, linear)
    return engine


@pytest.fixture(autouse=True)
def _probe_anew():
    cpu.fastest_linear.cache_clear()
    yield
    cpu.fastest_linear.cache_clear()


@pytest.mark.parametrize("linear", FLOAT32, ids=str)
@pytest.mark.parametrize("case_id", CASES)
def test_all_linears_give_the_golden_outputs(case_id, linear):
    engine = converted(case_id, linear)
    expected, expected_kept, _ = answers(case_id)
    images = case_images(case_id)
    logits, kept = engine(images, return_kept=True)
    assert (logits - expected).abs().max() < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept, strict=True))
    assert (engine(images, kept=kept) - expected).abs().max() < 2e-5
    assert (engine(images[:1]) - expected[:1]).abs().max() < 2e-5  # the buffers are larger than that now
    assert torch.equal(engine(images), logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "linear"),
    [
        ("bfloat16", Linear(torch.float32, prepacked=False)),
        ("bfloat16", Linear(torch.float32, prepacked=True)),
        ("bfloat16", Linear(torch.bfloat16, prepacked=False)),
        ("bfloat16", Linear(torch.bfloat16, prepacked=True)),
        ("float16", Linear(torch.float32, prepacked=False)),
        ("float16", Linear(torch.float16, prepacked=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("case_id", [*CASES[:2], pytest.param(CASES[2], marks=pytest.mark.large)])
def test_reduced_precision_passes_verify(case_id, dtype, linear):
    if linear == Linear(torch.bfloat16, True) and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    report = dvit.verify(converted(case_id, linear, dtype), official_checkpoint(case_id), num_images=16)
    assert report.passed, str(report)
    if linear.dtype == torch.float32 and report.plain_rms_error > 0:  # only weights and images are rounded
        assert report.rms_error < report.plain_rms_error


METHODS = [("tome", {}), ("evit", {}), ("evit", {"fuse": False}), ("tome", {"prop_attn": False})]


@pytest.mark.parametrize("linear", FLOAT32, ids=str)
@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [("deit", *METHODS[0]), ("headless-mean", *METHODS[1])]
    + [
        pytest.param(kind, *case, marks=pytest.mark.slow if kind in FEW else pytest.mark.large)
        for kind in KINDS
        for case in (METHODS if kind in FEW else METHODS[:2])
    ],
)
def test_all_linears_take_reduced_tokens(kind, method, settings, linear):
    """Also with another image's choices."""
    model = tiny(kind, method, settings=settings)
    runner = CpuRunner(fold(model.graph()), linear)
    agrees(runner, model)
    images = model.images(3)
    with torch.no_grad():
        given = [stage.roll(1, 0) for stage in model.reference().evaluate(images).kept]
        expected = model.reference().evaluate(images, given)
    torch.testing.assert_close(runner.run(images, given).x, expected.logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("deit", "tome")]
    + [pytest.param(kind, method, marks=pytest.mark.slow) for kind in FEW for method in ("evit", "tome")],
)
def test_reduced_tokens_in_bfloat16_are_verified(kind, method, prepacked):
    """Where attention with the logarithms of sizes is a softmax of its own."""
    if prepacked and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    model = tiny(kind, method)
    engine = model.engine(torch.bfloat16, "torch")
    for linear in (Linear(torch.bfloat16, prepacked), Linear(torch.float32, prepacked)):
        engine.runner = CpuRunner(engine.graph, linear)
        report = dvit.verify(engine, model.state, num_images=8)
        assert report.passed, report
        assert report.first_difference is None, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bias_of_a_key_is_added_to_its_scores(dtype):
    """By every way of attention; as much as for a key that is there more often."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 2, 16, generator=generator).to(dtype)
    sizes = torch.tensor([[1.0, 3, 1, 2, 1, 1, 5], [1, 1, 1, 1, 1, 1, 1]])
    runner = CpuRunner(fold(tiny("deit").graph()), FLOAT32[0])
    found = runner.mix(q, k, v, 0.25, sizes.log())
    for i in range(2):
        times = sizes[i].long()
        often = (part[i : i + 1].double().repeat_interleave(times, dim=1) for part in (k, v))
        expected = attention_ref(q[i : i + 1].double(), *often, 0.25)
        rms = (found[i : i + 1].double() - expected).square().mean().sqrt()
        assert rms < 2 * torch.finfo(dtype).eps


def test_without_the_private_operators_it_falls_back(monkeypatch):
    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(cpu, "_pack", missing)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not cpu.fastest_linear(dtype, 2).prepacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", ["zeros", "nan", "no bias"])
def test_a_candidate_with_wrong_outputs_is_not_chosen(wrong, dtype, monkeypatch):
    prepacked = cpu._prepacked

    def sloppy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool) -> torch.Tensor:
        if wrong == "no bias":
            return prepacked(x, weight, None, gelu)
        return x.new_full((len(x), len(weight)), 0.0 if wrong == "zeros" else float("nan"))

    monkeypatch.setattr(cpu, "_prepacked", sloppy)
    monkeypatch.setattr(cpu, "MIN_SPEEDUP", 0.0)  # the last valid candidate is taken
    assert not cpu.fastest_linear(dtype, 2).prepacked


def test_the_choice_does_not_depend_on_the_callers_modes(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_SPEEDUP", 0.0)
    for dtype in (torch.float32, torch.bfloat16):
        outside = cpu.fastest_linear(dtype, 2)
        cpu.fastest_linear.cache_clear()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            assert cpu.fastest_linear(dtype, 2) == outside
        assert outside.dtype == torch.float32  # the last that is tried


@pytest.mark.parametrize("linear", FLOAT32, ids=str)
def test_inference_mode_once_does_not_break_the_next_call(linear):
    engine, images = converted("tiny-deit-r0.7-s1", linear), case_images("tiny-deit-r0.7-s1")
    with torch.inference_mode():
        first = engine(images[:1])
    engine(images)
    assert torch.equal(engine(images[:1]), first)
    with torch.inference_mode():
        assert torch.equal(engine(images[:1]), first)


def test_the_clearly_faster_way_is_taken_and_shown(monkeypatch):
    seconds = {FLOAT32[0]: 1.0, FLOAT32[1]: 0.9}
    monkeypatch.setattr(cpu, "time_linears", lambda *given: seconds)
    assert cpu.fastest_linear(torch.float32, 2) == Linear(torch.float32, prepacked=True)
    engine = dvit.convert(
        official_checkpoint("tiny-deit-r0.7-s1"), device="cpu", backend="torch", assume={"num_heads": 2}
    )
    assert str(engine.graph).endswith("run by PyTorch, linears by oneDNN, prepacked, in float32")


@pytest.mark.parametrize("linear", FLOAT32, ids=str)
def test_threads_do_not_share_buffers(linear):
    engine = converted("tiny-deit-r0.7-s1", linear)
    batches = [torch.randn(b, 3, 224, 224, generator=torch.Generator().manual_seed(b)) for b in (1, 2, 3, 5)]
    expected = [engine(images) for images in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(engine, batches), expected, strict=True):
                assert (found - wanted).abs().max() < 1e-5


def test_answers_outlive_the_next_call_and_images_stay_as_they_were():
    engine = converted("tiny-deit-r0.7-s1", FLOAT32[0])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    logits, kept = engine(images, return_kept=True)
    remembered = [t.clone() for t in (logits, *kept)]
    engine(-images)
    assert torch.equal(images, before)
    assert all(torch.equal(a, b) for a, b in zip((logits, *kept), remembered, strict=True))


def test_what_it_holds_is_counted():
    engine = converted("tiny-deit-r0.7-s1", FLOAT32[0])
    assert engine.runner.buffer_bytes == 0  # float32 by matmul takes the graph's weights as they are
    engine(torch.randn(1, 3, 224, 224))
    assert engine.runner.buffer_bytes == (197 * 4 * 64 + 196 * 32) * 4  # an MLP's and a predictor's hidden channels
    upcast = converted("tiny-deit-r0.7-s1", FLOAT32[0], "bfloat16")
    matrices = sum(w.numel() for node in upcast.graph.nodes for w in node.weights.values() if w.dtype == torch.bfloat16)
    assert upcast.runner.buffer_bytes == 4 * matrices


@pytest.mark.parametrize("linear", FLOAT32, ids=str)
def test_an_engine_can_be_copied_and_pickled(linear):
    engine, images = converted("tiny-deit-r0.7-s1", linear), case_images("tiny-deit-r0.7-s1")
    logits = engine(images)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other(images), logits)


def test_an_unfolded_graph_runs_too():
    engine = converted("timm-deit_tiny_patch16_224", FLOAT32[0])
    plain = dvit.load_reference(official_checkpoint("timm-deit_tiny_patch16_224"))
    graph = build_graph(plain, engine.config)
    images = case_images("timm-deit_tiny_patch16_224")
    for linear in FLOAT32:
        logits = CpuRunner(replace(graph, runtime=""), linear).run(images).x
        assert (logits - engine(images)).abs().max() < 2e-5
