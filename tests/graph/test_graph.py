"""The graph's MACs agree with fvcore and with the published counts; folding changes no output."""

import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from golden_cases import EVERY_CASE, FLOPS, answers, case_images, official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph import Graph, fold
from dvit_infer.graph.nodes import Attention, Mlp
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.registry import build_graph, build_reference, recognise

logging.getLogger("fvcore").setLevel(logging.ERROR)


def unfolded(case_id: str, **given) -> tuple[torch.nn.Module, Graph]:
    chosen = options(case_id)
    checkpoint = read_checkpoint(official_checkpoint(case_id))
    config, _ = recognise(checkpoint, None, chosen.get("assume", {}) | given, {"image_size": chosen.get("image_size")})
    model = build_reference(config, checkpoint)
    return model, build_graph(model, config)


@pytest.mark.parametrize("case_id", [case for case in EVERY_CASE if "large" not in case.id and "tame" not in case.id])
def test_macs_agree_with_fvcore_node_by_node_in_sum(case_id):
    model, graph = unfolded(case_id)
    count = (
        FlopCountAnalysis(model, case_images(case_id)[:1])
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
    )
    assert graph.macs == pytest.approx(count.total(), rel=1e-3)
    by_module = count.by_module()
    for i in range(len(model.blocks)):
        ours = sum(node.macs for node in graph.nodes if node.name.startswith(f"blocks.{i}."))
        assert ours == pytest.approx(by_module[f"blocks.{i}"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    ["dynamicvit-deit-256", "dynamicvit-deit-s", "dynamicvit-deit-b", "dynamicvit-lvvit-s", "dynamicvit-lvvit-m"],
)
def test_macs_agree_with_the_official_models(variant):
    checkpoint = read_checkpoint(official_checkpoint(f"{variant}-r0.7-s1"))
    for rate, gmacs in FLOPS[variant]["gmacs"].items():
        config, _ = recognise(checkpoint, None, {"keep_rate": float(rate)}, {})
        model = build_reference(config, checkpoint)
        assert build_graph(model, config).gmacs == pytest.approx(gmacs, rel=2e-4)
        assert sum(p.numel() for p in model.parameters()) == FLOPS[variant]["params"]


@pytest.mark.slow
def test_the_class_rows_and_the_mean_half_save_what_they_should():
    for arch, ratio in (("dynamicvit-deit-s", 1.495), ("dynamicvit-deit-b", 1.485)):
        checkpoint = example_checkpoint(arch)
        pruned, dense = dvit.convert(checkpoint, device="cpu"), dvit.convert(checkpoint, device="cpu", method="none")
        assert dense.graph.macs / pruned.graph.macs == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize(
    "case_id", ["tiny-deit-r0.7-s41-tame", "tiny-lvvit-r0.7-s41-tame", "timm-deit_tiny_patch16_224"]
)
@torch.no_grad()
def test_folded_and_unfolded_graphs_give_the_golden_answer(case_id):
    _, graph = unfolded(case_id)
    logits, _, _ = answers(case_id)
    assert (TorchRunner(fold(graph)).run(case_images(case_id)).x - logits).abs().max() < 2e-5
    if not graph.config.num_keep:  # an unfolded predictor is no operand of the op
        assert (TorchRunner(graph).run(case_images(case_id)).x - logits).abs().max() < 2e-5


def test_what_is_folded_is_gone_and_noted():
    _, graph = unfolded("tiny-lvvit-r0.7-s1")
    folded = fold(graph)
    for node in folded.nodes:
        assert not any(key.startswith(("norm.", "bn.")) for key in node.weights)
        if isinstance(node, Attention):
            assert (node.scale, node.residual_scale) == (1.0, 1.0)
            assert node.folded == ("LayerNorm", "softmax scale", "1/skip_lam")
            assert node.rows == node.tokens  # the auxiliary head reads every patch
    assert fold(folded).nodes == folded.nodes
    assert folded.macs < graph.macs


def test_only_prefix_rows_go_through_the_last_block():
    for case_id, rows in (("tiny-deit-r0.7-s1", 1), ("timm-deit_small_distilled_patch16_224", 2)):
        *_, attention, mlp, head = dvit.convert(
            official_checkpoint(case_id), device="cpu", **options(case_id)
        ).graph.nodes
        assert isinstance(attention, Attention)
        assert isinstance(mlp, Mlp)
        assert (attention.rows, mlp.tokens) == (rows, rows)
        assert attention.tokens > rows
        assert head.in_shape[0] == rows


def test_the_table_can_be_read():
    checkpoint = official_checkpoint("tiny-deit-r0.7-s1")
    engine = dvit.convert(checkpoint, device="cpu", backend="torch", assume={"num_heads": 2})
    text = str(engine.graph)
    lines = text.splitlines()
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1].startswith("run by PyTorch, linears by ")
    assert max(map(len, lines)) <= 160
    for node in engine.graph.nodes:
        assert node.name in text
    assert f"{engine.graph.macs / 1e6:.1f}" in text
    assert "137,96,67 of 196" in text


def test_bytes_are_activations_and_weights():
    engine = dvit.convert(official_checkpoint("tiny-deit-r0.7-s1"), device="cpu", assume={"num_heads": 2})
    mlp = next(node for node in engine.graph.nodes if node.name == "blocks.0.mlp")
    weights = 64 * 256 * 2 + 256 + 64
    assert mlp.bytes_moved(3, 4) == 4 * (3 * 2 * 197 * 64 + weights)
