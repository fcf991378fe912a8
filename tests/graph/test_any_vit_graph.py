"""Every kind of vision transformer: the graph's MACs are fvcore's count of the reference; what folding leaves."""

import logging

import pytest
import torch
from any_vit import KINDS, tiny
from fvcore.nn import FlopCountAnalysis

from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph import fold
from dvit_infer.graph.nodes import Attention, Mlp, Norm

logging.getLogger("fvcore").setLevel(logging.ERROR)


@pytest.mark.parametrize(
    "method", ["none", *(pytest.param(method, marks=pytest.mark.slow) for method in ("random", "predictor"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_fvcores(kind, method):
    """Rotation, tables, sums and activations count nothing; a LayerNorm counts five for an element."""
    model = tiny(kind, method)
    graph = model.graph()
    count = FlopCountAnalysis(model.reference(), model.images(1))
    by_module = count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    assert graph.macs == by_module[""]
    for i in range(2):
        for node, parts in ((f"blocks.{i}.attn", ("attn", "norm1")), (f"blocks.{i}.mlp", ("mlp", "norm2"))):
            ours = next(n.macs for n in graph.nodes if n.name == node)
            assert ours == sum(by_module[f"blocks.{i}.{part}"] for part in parts)


@pytest.mark.parametrize("method", ["none", "random"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_folding_changes_no_answer(kind, method):
    """Nor features and tokens, at an odd size, alone and in a batch; every kept set is the reference's."""
    model = tiny(kind, method, size=(40, 24))
    graph, images = model.graph(), model.images(3)
    expected = model.reference().evaluate(images)
    assert expected.logits.std() > 0.5
    for some in (graph, fold(graph)):
        runner = TorchRunner(some)
        for output, want in (("logits", expected.logits), ("features", expected.features), ("tokens", expected.tokens)):
            found = runner.run(images, output=output).x
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, want, atol=2e-5, rtol=0)
        alone = runner.run(images[1:2]).x
        torch.testing.assert_close(alone, expected.logits[1:2], atol=2e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(runner.run(images).choices, expected.kept, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov3", "eva02", "mixed", "beit"])
def test_places_are_those_of_the_tokens_that_stay(kind):
    """Which differ by image when kept sets are given."""
    model = tiny(kind, "predictor")
    images, kept = model.images(3), model.kept(3)
    expected = model.reference().evaluate(images, kept)
    found = TorchRunner(fold(model.graph())).run(images, kept)
    torch.testing.assert_close(found.x, expected.logits, atol=2e-5, rtol=0)


def test_what_is_folded_is_noted():
    notes = {kind: [set(node.folded) for node in fold(tiny(kind).graph()).nodes] for kind in KINDS}
    assert {"LayerNorm", "layer scale", "class rows only"} <= notes["dinov2-registers"][-2]
    assert {"LayerNorm", "inner LayerNorm", "rotary pairs"} <= notes["eva02"][1]
    assert "quick GELU" in notes["clip"][-2]
    assert notes["siglip"][-1] == {"latent query"}
    for kind in KINDS:
        for node in fold(tiny(kind).graph()).nodes:
            assert isinstance(node, Norm) or not any(key.startswith(("norm.", "inner_norm.")) for key in node.weights)
            if isinstance(node, Attention):
                assert node.scale == 1.0
                assert node.rope_half or "sin" not in node.weights
            if isinstance(node, Mlp):
                assert node.act != "quick_gelu"


def test_the_last_block_is_for_the_rows_that_are_read():
    for kind, (facts, _) in KINDS.items():
        last = [node for node in fold(tiny(kind).graph()).nodes if isinstance(node, Attention)][-1]
        few = 2 if kind.startswith("distilled") else 1
        assert last.rows == (few if facts.get("pool", "token") == "token" else last.tokens)


@pytest.mark.parametrize("head_dim", [72, 80, 88, 104])
@torch.no_grad()
def test_heads_of_any_size(head_dim):
    model = tiny("eva02-token", embed_dim=2 * head_dim)
    images = model.images(1)
    found = TorchRunner(fold(model.graph())).run(images).x
    torch.testing.assert_close(found, model.reference().evaluate(images).logits, atol=2e-5, rtol=0)
