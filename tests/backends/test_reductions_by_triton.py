"""EViT and ToMe by the Triton backend: the reference's answers, by how many launches, and what PyTorch runs instead."""

from collections import Counter

import pytest
import torch
from any_vit import agrees, tiny
from kernel_helpers import needs_loops
from launched import launched as launched_by_node

import dvit_infer as dvit
from dvit_infer.backends import triton
from dvit_infer.backends.triton import TritonRunner
from dvit_infer.graph import fold
from dvit_infer.ops.choices import Choices, using
from dvit_infer.reduction.evit import AttentionPrune

pytestmark = [pytest.mark.interpreter, needs_loops]

TRITON, PYTORCH = Choices(otherwise="triton"), Choices(otherwise="pytorch")
SMALL = (24, 16)  # 6 patches
POOLED = {"score": "pooled"}


def runner_of(model, dtype=None):
    return TritonRunner(model.engine(dtype).graph if dtype else fold(model.graph()))


def launched(model, images=1, choices=False):
    with using(TRITON):
        return launched_by_node(runner_of(model), model.images(images), choices)


@pytest.mark.parametrize("prop_attn", [True, False])
def test_a_block_that_merges_takes_seven_launches(prop_attn):
    """Norm with qkv, attention, proj, two for merging, fc1, fc2: sizes, their logarithms and signals are in these."""
    nodes = launched(tiny("deit", "tome", SMALL, {"merge": 1, "prop_attn": prop_attn}, depth=3))
    for block in (0, 1):
        assert len(nodes[f"blocks.{block}.attn"]) == 3
        assert nodes[f"merge.{block}"] == ["_match_tokens_kernel", "_merge_tokens_kernel"]
        assert nodes[f"blocks.{block}.mlp"] == ["_linear_kernel"] * 2
    assert "merge.2" not in nodes  # nothing reads what it would leave
    assert nodes["blocks.2.attn"].count("_linear_kernel") == 3  # the class token's queries are apart
    assert len(nodes["blocks.2.attn"]) == 4


@pytest.mark.parametrize("fuse", [True, False])
def test_a_block_with_evits_step_takes_six_launches(fuse):
    nodes = launched(tiny("deit", "evit", SMALL, {"fuse": fuse}, depth=3))
    for block in (0, 1):
        assert len(nodes[f"blocks.{block}.attn"]) == 3
        assert nodes[f"prune.{block}"] == ["_keep_tokens_kernel"]
        assert nodes[f"blocks.{block}.mlp"] == ["_linear_kernel"] * 2


@pytest.mark.parametrize(("method", "most"), [("tome", 7), ("evit", 6)])
def test_many_rows_take_no_more(method, most):
    """The launch that merges or keeps leaves their statistics, which else would be a launch from 1024 rows on."""
    model = tiny("deit", method, (56, 56), {"merge": 4} if method == "tome" else {}, depth=4, embed_dim=128)
    nodes = launched(model, images=32)
    reduce = "merge" if method == "tome" else "prune"
    first = nodes["blocks.0.attn"]
    assert first == ["_row_stats_kernel", "_linear_kernel", "_attention_online_kernel", "_linear_kernel"]
    launches = [*nodes["blocks.1.attn"], *nodes[f"{reduce}.1"], *nodes["blocks.1.mlp"]]
    assert len(launches) == most
    assert nodes["blocks.0.mlp"] == ["_linear_kernel"] * 2


def test_where_tokens_came_from_is_followed_only_for_those_who_ask(monkeypatch):
    """It costs launches of PyTorch's."""
    seen = []
    monkeypatch.setattr(AttentionPrune, "note", lambda node, *given: seen.append(node.name))
    model = tiny("deit", "evit", SMALL, depth=3)
    launched(model)
    assert seen == []
    launched(model, choices=True)
    assert seen == ["prune.0", "prune.1", "prune.2"]


def test_the_first_merge_has_no_sizes_to_read(monkeypatch):
    """And later ones hand them on from launch to launch."""
    seen, op = [], triton.merge_tokens_with_stats

    def watched(x, keys, sizes, *counts):
        seen.append(sizes)
        return op(x, keys, sizes, *counts)

    monkeypatch.setattr(triton, "merge_tokens_with_stats", watched)
    model = tiny("deit", "tome", SMALL, {"merge": 1}, depth=3)
    with using(PYTORCH):
        runner_of(model).run(model.images(2), return_choices=False)
    assert seen[0] is None
    assert [tuple(sizes.shape) for sizes in seen[1:]] == [(2, 6)]


def ops_called(monkeypatch):
    """How often the runner calls each op of token reduction."""
    calls = Counter()

    def counted(name, op):
        def call(*given, **named):
            calls[name] += 1
            return op(*given, **named)

        return call

    for name in ("attention_with_signal", "keep_tokens_with_stats", "merge_tokens_with_stats"):
        monkeypatch.setattr(triton, name, counted(name, getattr(triton, name)))
    return calls


# Kind, method, settings, and the ops that are called for one image whose features or tokens are read as well.
MERGES, KEEPS = (
    {"attention_with_signal", "merge_tokens_with_stats"},
    {"attention_with_signal", "keep_tokens_with_stats"},
)
CASES = [
    ("deit", "tome", {"merge": 1}, MERGES),
    ("deit", "evit", {}, KEEPS),
    ("deit", "evit", {"fuse": False}, KEEPS),
    ("deit", "evit", POOLED, {"keep_tokens_with_stats"}),
    ("headless-mean", "tome", {"merge": 1}, MERGES),
    ("headless-mean", "evit", POOLED, {"keep_tokens_with_stats"}),
]
AROUND = [case if case[0] == "headless-mean" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]


@pytest.mark.parametrize(("kind", "method", "settings", "called"), [CASES[0], *AROUND])
def test_the_ops_are_called_and_agree_around_the_kernels(kind, method, settings, called, monkeypatch):
    """With PyTorch in place of linears and attention, which are slow to interpret."""
    calls = ops_called(monkeypatch)
    model = tiny(kind, method, SMALL, settings)
    with using(PYTORCH):
        agrees(runner_of(model), model, batches=(1,))
    assert set(calls) == called


@pytest.mark.large
@pytest.mark.parametrize(("kind", "method", "settings", "called"), CASES)
def test_so_do_all_kernels(kind, method, settings, called, monkeypatch):
    calls = ops_called(monkeypatch)
    model = tiny(kind, method, (24, 40), settings, depth=3)
    with using(TRITON):
        agrees(runner_of(model), model, batches=(2,))
    assert set(calls) == called


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.large), torch.float16])
@pytest.mark.parametrize("method", ["evit", "tome"])
def test_statistics_go_from_launch_to_launch(method, dtype):
    """Of a width that both kernels leave them of."""
    model = tiny("deit", method, (24, 40), depth=3, embed_dim=128)
    engine = model.engine(dtype)
    with using(TRITON):
        engine.runner = TritonRunner(engine.graph)
        report = dvit.verify(engine, model.state, num_images=2)
    assert report.passed, report
    assert report.first_difference is None, report


@pytest.mark.parametrize("method", ["evit", "tome"])
def test_given_choices_are_moved_by_pytorch(method, monkeypatch):
    calls = ops_called(monkeypatch)
    model = tiny("deit", method, SMALL)
    images = model.images(3)
    with torch.no_grad():
        own = model.reference().evaluate(images)
        given = [stage.roll(1, 0) for stage in own.kept]
        expected = model.reference().evaluate(images, given)
    with using(PYTORCH):
        found = runner_of(model).run(images, given)
    torch.testing.assert_close(found.x, expected.logits, atol=2e-5, rtol=0)
    assert all(map(torch.equal, found.choices, given))
    assert set(calls) == {"attention_with_signal"}


@pytest.mark.large
@pytest.mark.parametrize(("kind", "method", "settings", "called"), CASES)
def test_float16_is_verified(kind, method, settings, called):
    model = tiny(kind, method, (24, 40), settings)
    engine = model.engine(torch.float16)
    with using(TRITON):
        engine.runner = TritonRunner(engine.graph)
        report = dvit.verify(engine, model.state, num_images=4)
    assert report.passed, report
    assert report.first_difference is None, report


@pytest.mark.parametrize(
    ("kind", "method", "settings", "says"),
    [
        ("deit", "tome", {"merge": 1}, ""),
        ("deit", "evit", {}, ""),
        ("deit", "evit", POOLED, "; PyTorch for attention of a mean query"),
        ("siglip", "tome", {"merge": 1}, ""),
    ],
)
def test_the_table_says_what_pytorch_runs(kind, method, settings, says):
    graph = fold(tiny(kind, method, SMALL, settings).graph())
    for choices in (TRITON, PYTORCH):
        with using(choices):
            assert TritonRunner(graph).runtime.endswith(f"by defaults: none was measured here{says}")


@pytest.mark.parametrize(
    ("method", "size", "says"),
    [
        ("evit", (256, 256), ""),  # 1024 patches
        ("evit", (256, 264), "; PyTorch for choosing among 1057 tokens"),
        ("tome", (256, 512), ""),
        ("tome", (264, 512), "; PyTorch for merging among 2113 tokens"),
    ],
)
def test_so_it_does_beyond_the_kernels_limits(method, size, says):
    """By the largest number of tokens; later stages may have fewer."""
    with using(TRITON):
        runner = runner_of(tiny("deit", method, size, depth=3))
    assert runner.runtime.endswith(f"by defaults: none was measured here{says}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["evit", "tome"])
def test_beyond_the_limits_pytorch_answers(method):
    model = tiny("deit", method, (264, 512), depth=1)
    with using(PYTORCH):
        agrees(runner_of(model), model, batches=(1,))
