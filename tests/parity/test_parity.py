"""verify passes for every family and dtype, and fails for whatever an engine may get wrong."""

from dataclasses import replace

import pytest
import torch
from golden_cases import official_checkpoint, options

import dvit_infer as dvit
from dvit_infer.backends.state import State
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph.heads import Head
from dvit_infer.graph.reductions import Prune
from dvit_infer.parity import verification as parity
from dvit_infer.utils.devices import DTYPES

TINY = "tiny-deit-r0.7-s1"
CASES = [TINY, "tiny-deit-r0.7-s41-tame", "tiny-lvvit-r0.7-s1", "timm-deit_tiny_patch16_224-at-192x256"]


def converted(case_id: str = TINY, dtype: str = "float32", **given) -> dvit.Engine:
    device = given.pop("device", "cpu")
    return dvit.convert(official_checkpoint(case_id), device=device, dtype=dtype, **options(case_id) | given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case_id", [*CASES[:3], pytest.param(CASES[3], marks=pytest.mark.large)])
def test_passes(case_id, dtype, device):
    report = dvit.verify(converted(case_id, dtype, device=device), official_checkpoint(case_id), num_images=16)
    assert report.passed, str(report)
    assert report.first_difference is None
    assert report.num_images == 16
    assert len(report.kept_equal) == (3 if "tiny-" in case_id else 0)
    if dtype == "float32":
        assert report.kept_equal == report.kept_compared
        assert sum(report.kept_compared) > 30 or not report.kept_equal


def test_passes_for_the_dense_counterpart_and_other_rates():
    for given in ({"method": "none"}, {"keep_rate": 0.5}, {"keep_rate": 1.0}, {"prune_at": (0, 1, 3)}):
        assert dvit.verify(converted(**given), official_checkpoint(TINY), num_images=4).passed


def test_another_set_of_weights_is_verified_against_itself(tmp_path):
    checkpoint = official_checkpoint(TINY)
    both = checkpoint | {"model_ema": {k: v * 1.1 for k, v in checkpoint["model"].items()}}
    engine = dvit.convert(both, device="cpu", assume={"num_heads": 2, "weights": "model_ema"})
    assert engine.config.weights == "model_ema"
    assert dvit.verify(engine, both, num_images=4).passed
    engine.save(tmp_path / "m.safetensors")
    saved = dvit.load(tmp_path / "m.safetensors", device="cpu", backend="torch")
    assert dvit.verify(saved, both, num_images=4).passed
    assert not dvit.verify(replace_weights(saved), both, num_images=4).passed


def replace_weights(engine: dvit.Engine) -> dvit.Engine:
    engine.graph.nodes[1].weights["proj.weight"].mul_(1.01)
    return engine


def names(engine: dvit.Engine) -> list[tuple[str, str]]:
    """A node and one of its tensors, for every tensor that a kind of node has: the last such node."""
    last = {(type(node), key): node.name for node in engine.graph.nodes for key in node.weights}
    return [(name, key) for (_, key), name in last.items()]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.large)])
@pytest.mark.parametrize(
    ("node", "key"),  # of the others, whose check is the same, in the slow tests
    [pytest.param(*name, marks=[pytest.mark.slow] * (at % 3 > 0)) for at, name in enumerate(names(converted()))],
)
def test_one_value_of_a_weight_changed_by_one_percent_is_caught(node, key, dtype):
    engine = converted(dtype=dtype, backend="torch")
    tensor = next(n for n in engine.graph.nodes if n.name == node).weights[key].view(-1)
    tensor[tensor.abs().argmax()] *= 1.01
    report = dvit.verify(engine, official_checkpoint(TINY), num_images=2)
    assert not report.passed
    assert report.wrong_weight.startswith(f"{node} {key}")


def test_one_weight_changed_in_the_saved_file_is_caught(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    converted().save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["blocks.2.mlp.fc1.weight"] = tensors["blocks.2.mlp.fc1.weight"] * 1.01
    save_file(tensors, tmp_path / "m.safetensors", header)
    report = dvit.verify(dvit.load(tmp_path / "m.safetensors", device="cpu"), official_checkpoint(TINY), num_images=4)
    assert not report.passed
    assert report.max_error > 1e-4
    assert report.first_difference.startswith("blocks.2.mlp")
    assert "FAILED" in str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_arithmetic_is_caught_by_the_answers_and_the_node_named(dtype, monkeypatch):
    engine, head = converted(dtype=dtype, backend="torch"), TorchRunner.head

    def sloppy(runner: TorchRunner, node: Head, state: State) -> None:
        head(runner, node, state)
        state.x = state.x * 1.2

    monkeypatch.setattr(TorchRunner, "head", sloppy)
    report = dvit.verify(engine, official_checkpoint(TINY), num_images=4)
    assert not report.passed
    assert report.wrong_weight is None
    assert report.first_difference.startswith("head")


def test_a_wrong_choice_of_tokens_is_caught_though_logits_agree_when_given_the_right_ones():
    engine = converted(backend="torch")
    for node in engine.graph.nodes:
        if isinstance(node, Prune):
            node.weights["packed.8"].neg_()  # the last layer: the best tokens become the worst
    report = dvit.verify(engine, official_checkpoint(TINY), num_images=4)
    assert not report.passed
    assert report.max_error < 1e-4
    assert max(report.kept_equal) == 0
    assert any("kept tokens" in failure for failure in report.failures)


def test_unclear_cuts_are_excused(monkeypatch):
    """With tied scores the cut means nothing: another choice is no failure, logits are compared on the same sets."""
    checkpoint = {"model": dict(official_checkpoint(TINY)["model"])}
    for key in checkpoint["model"]:
        if key.startswith("score_predictor") and key.endswith("out_conv.4.weight"):
            checkpoint["model"][key] = torch.zeros_like(checkpoint["model"][key])
    engine = dvit.convert(checkpoint, device="cpu", backend="torch", assume={"num_heads": 2})
    report = dvit.verify(engine, checkpoint, num_images=4)
    assert report.passed
    assert report.kept_compared == (0, 0, 0)

    def last(score: torch.Tensor, num_keep: int) -> torch.Tensor:
        return torch.arange(score.shape[1] - num_keep, score.shape[1]).expand(len(score), -1)

    monkeypatch.setattr("dvit_infer.ops.prune_tokens.select_tokens_ref", last)
    other = dvit.verify(engine, checkpoint, num_images=4)
    assert other.passed
    assert other.kept_overlap[0] < 1


def test_a_head_of_zeros_is_compared_too():
    checkpoint = {"model": dict(official_checkpoint(TINY)["model"])}
    checkpoint["model"] |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    engine = dvit.convert(checkpoint, device="cpu", assume={"num_heads": 2})
    assert dvit.verify(engine, checkpoint, num_images=2).passed


def test_a_reference_that_overflows_is_the_files_fault():
    checkpoint = {"model": dict(official_checkpoint(TINY)["model"])}
    checkpoint["model"]["blocks.0.mlp.fc1.weight"] = checkpoint["model"]["blocks.0.mlp.fc1.weight"] * 1e36
    with pytest.raises(dvit.InputError, match="NaN or Inf"):
        dvit.verify(dvit.convert(checkpoint, device="cpu", assume={"num_heads": 2}), checkpoint, num_images=2)


def test_nan_logits_fail():
    engine = converted(backend="torch")
    engine.graph.nodes[-1].weights["head.bias"].fill_(float("nan"))
    report = dvit.verify(engine, official_checkpoint(TINY), num_images=2)
    assert not report.passed
    assert report.wrong_weight.startswith("head head.bias")
    assert report.first_difference.startswith("head")


def test_a_file_of_another_model_is_said(tmp_path):
    with pytest.raises(dvit.InputError, match="missing key"):
        dvit.verify(converted(), official_checkpoint("tiny-lvvit-r0.7-s1"))
    with pytest.raises(dvit.InputError, match="num_images"):
        dvit.verify(converted(), official_checkpoint(TINY), num_images=0)


def test_the_standard_error_lets_one_flip_of_a_few_pass_but_not_many():
    assert 1.0 - 2 * parity._standard_error(1 - 1 / 64, 1.0, 64) < 1 - 1 / 64
    assert 1.0 - 2 * parity._standard_error(0.8, 1.0, 64) > 0.8


def test_the_table_is_whole():
    report = dvit.verify(converted(), official_checkpoint(TINY), num_images=2)
    text = str(report)
    assert text.startswith("parity passed: dynamicvit-deit-64x4, predictor 0.7: 137,96,67 of 196; 2 images, float32")
    assert "kept tokens, stage 2" in text
    assert "failed" in str(replace(report, failures=("something",)))
