"""EViT and ToMe by the OpenVINO backend: every output of every kind, given choices, bfloat16, int8, and its cache."""

from dataclasses import replace

import pytest
import torch
from any_vit import CPU, FEW, agrees, every_reduction, tiny

import dvit_infer as dvit
from dvit_infer.backends.openvino import OpenVinoRunner
from dvit_infer.backends.openvino_model import openvino_model
from dvit_infer.backends.ranges import activation_ranges
from dvit_infer.graph import fold
from dvit_infer.graph.reductions import Reduce
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.source import WeightSource
from dvit_infer.operators.attention import EXACT

pytest.importorskip("openvino")
from dvit_infer.operators.openvino import OpenVinoBuilder

ODD, EVEN = (24, 40), (24, 56)  # with a class token 16 and 22 tokens, without one 15 and 21
TOLERANCE = 2e-5

EVERY = every_reduction(("deit", 0), ("beit", 1))


def runner_of(model):
    graph = fold(model.graph())
    return OpenVinoRunner(graph, lambda: graph)


def evaluated(model, images, kept=None):
    with torch.no_grad():
        return model.reference().evaluate(images, kept)


def check_given(runner, model, batch=3):
    """Another image's choices are made."""
    images = model.images(batch)
    given = [stage.roll(1, 0) for stage in evaluated(model, images).kept]
    found, expected = runner.run(images, given), evaluated(model, images, given)
    torch.testing.assert_close(found.x, expected.logits, atol=TOLERANCE, rtol=0)
    assert all(map(torch.equal, found.choices, given))


@pytest.mark.parametrize(("kind", "method", "settings"), EVERY)
def test_it_answers_as_the_reference(kind, method, settings):
    """Batches of two sizes, one after the other; logits without choices as well."""
    model = tiny(kind, method, ODD, settings)
    runner, images = runner_of(model), model.images(3)
    agrees(runner, model)
    expected = evaluated(model, images)
    assert torch.equal(runner.run(images, output="tokens").positions, expected.positions)
    plain = runner.run(images, return_choices=False)
    torch.testing.assert_close(plain.x, expected.logits, atol=TOLERANCE, rtol=0)
    assert plain.choices == []
    check_given(runner, model)


@pytest.mark.large
@pytest.mark.parametrize("method", ["evit", "tome"])
@pytest.mark.parametrize("kind", FEW)
def test_so_it_does_at_another_size(kind, method):
    model = tiny(kind, method, EVEN, depth=3)
    runner = runner_of(model)
    agrees(runner, model)
    check_given(runner, model)


@pytest.mark.parametrize("method", ["evit", "tome"])
def test_where_only_the_class_token_is_read_the_last_choice_moves_nothing(method):
    """It is returned nevertheless, and for all tokens it is made."""
    model = tiny("deit", method, ODD, {"merge": 2} if method == "tome" else {})
    runner = runner_of(model)
    last = [node for node in fold(model.graph()).nodes if isinstance(node, Reduce)][-1]
    assert last.rows == 1
    images = model.images(2)
    assert len(runner.run(images).choices) == 2
    assert runner.run(images, output="features").x.shape == (2, 64)
    assert runner.run(images, output="tokens").x.shape[1] == last.left


@pytest.fixture
def in_pairs(monkeypatch):
    """Models are written as for bfloat16, where products take pairs of rows, and run in float32."""
    init = OpenVinoBuilder.__init__
    monkeypatch.setattr(OpenVinoBuilder, "__init__", lambda to, *given, half: init(to, *given, half=True))


@pytest.mark.parametrize("prop_attn", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["deit", pytest.param("headless-mean", marks=pytest.mark.slow)]
)  # an even and an odd number of tokens
def test_a_row_of_size_0_changes_nothing(kind, prop_attn, in_pairs):
    model = tiny(kind, "tome", ODD, {"merge": 3, "prop_attn": prop_attn}, depth=3)
    tokens = [node.tokens % 2 for node in fold(model.graph()).nodes if isinstance(node, Reduce)]
    assert set(tokens) == {0, 1}
    runner = runner_of(model)
    agrees(runner, model)
    check_given(runner, model)


def kinds_of_operators(graph):
    model = openvino_model(graph)
    return {op.get_type_name() for op in model.get_ops() if op.get_friendly_name().startswith("merge.")}


def test_rows_are_added_in_bfloat16_only():
    graph = fold(tiny("deit", "tome", ODD, {"merge": 3}, depth=3).graph())
    assert "Pad" not in kinds_of_operators(graph)
    assert "Pad" in kinds_of_operators(graph.to(graph.device, torch.bfloat16))


BFLOAT16 = [
    ("deit", "tome", {"merge": 3}),
    ("deit", "evit", {}),
    ("deit", "tome", {"merge": 3, "prop_attn": False}),
    ("headless-mean", "tome", {"merge": 3}),
    ("headless-mean", "evit", {"score": "pooled"}),
]


@pytest.mark.parametrize("size", [ODD, pytest.param(EVEN, marks=pytest.mark.large)], ids=["odd", "even"])
@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [BFLOAT16[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in BFLOAT16[1:])],
)
def test_bfloat16_is_verified(kind, method, settings, size):
    model = tiny(kind, method, size, settings, depth=3)
    report = dvit.verify(model.engine(torch.bfloat16, "openvino"), model.state, num_images=8)
    assert report.passed, report


@pytest.mark.large
@pytest.mark.parametrize("method", ["evit", "tome"])
@pytest.mark.parametrize("kind", FEW)
def test_bfloat16_of_every_kind_is_verified(kind, method):
    model = tiny(kind, method, ODD)
    report = dvit.verify(model.engine(torch.bfloat16, "openvino"), model.state, num_images=8)
    assert report.passed, report


def int8_engine(model, static):
    config = model.config
    if static:
        config = replace(config, ranges=tuple(activation_ranges(fold(model.graph()), [model.images(4)])))
    checkpoint = read_checkpoint(model.state)
    source = WeightSource(model.state, checkpoint)
    return dvit.Engine(config, checkpoint, [], CPU, torch.float32, source, None, True)


@pytest.mark.parametrize("static", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("deit", "tome"), pytest.param("deit", "evit", marks=pytest.mark.slow)]
    + [pytest.param("beit", "tome", marks=pytest.mark.slow)]
    + [
        pytest.param(*case, marks=pytest.mark.large)
        for case in (("beit", "evit"), ("eva02", "tome"), ("eva02", "evit"))
    ],
)
def test_int8_is_close_and_verified(kind, method, static):
    """With the reference's choices; linears of few channels are coarse."""
    model = tiny(kind, method, ODD)
    engine, images = int8_engine(model, static), model.images(4)
    expected = evaluated(model, images)
    error = engine(images, kept=expected.kept) - expected.logits
    assert 0 < error.square().mean().sqrt() < 0.1 * expected.logits.square().mean().sqrt()
    assert dvit.verify(engine, model.state, num_images=4).passed


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_the_keys_that_decide_merging_are_not_int8(static):
    engine = int8_engine(tiny("deit", "tome", ODD), static)
    written = openvino_model(engine.graph, int8=True)
    constants = {
        op.get_friendly_name(): op for op in written.get_ops() if op.get_type_name() == "Constant" and op.outputs()
    }
    exact = [constants[name] for name in constants if f"/{EXACT}.weight" in name]
    assert len(exact) == 2
    for constant in exact:
        assert constant.get_element_type().get_type_name() == "f32"
        (product,) = (target.get_node() for target in constant.output(0).get_target_inputs())
        assert product.get_type_name() == "MatMul"
        assert product.input_value(0).get_node().get_type_name() != "FakeQuantize"
    assert constants["blocks.0.attn/k.weight"].get_element_type().get_type_name() == "i8"


@pytest.mark.parametrize(
    ("method", "settings"), [("tome", {"merge": 3}), pytest.param("evit", {}, marks=pytest.mark.slow)]
)
def test_a_model_from_the_cache_gives_the_same(method, settings, tmp_path, monkeypatch):
    """Of every variant, which share their weights there."""
    monkeypatch.setattr("dvit_infer.backends.openvino.LEAST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny("deit", method, ODD, settings)
    graph = fold(model.graph())
    first = OpenVinoRunner(graph, lambda: graph, b"key")
    monkeypatch.setattr("dvit_infer.backends.openvino.openvino_model", None)  # not called
    again = OpenVinoRunner(graph, lambda: graph, b"key")
    images = model.images(3)
    for runner in (first, again):
        agrees(runner, model, batches=(3,))
        check_given(runner, model)
    assert torch.equal(first.run(images).x, again.run(images).x)
