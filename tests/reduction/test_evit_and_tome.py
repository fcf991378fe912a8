"""EViT and ToMe on every kind of vision transformer: the PyTorch backend answers as the reference."""

from dataclasses import replace

import pytest
import torch
from any_vit import KINDS, agrees, every_kind, tiny
from golden_cases import case_images, same_kept, state_dict

import dvit_infer as dvit
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph import fold
from dvit_infer.graph.heads import nodes_for
from dvit_infer.graph.reductions import Reduce

METHODS = ["evit", "tome"]
ODD = (24, 40)  # 15 patches
DEIT, LVVIT = "tiny-deit", "tiny-lvvit"


def evaluated(model, images, kept=None):
    with torch.no_grad():
        return model.reference().evaluate(images, kept)


def runner_of(model):
    return TorchRunner(fold(model.graph()))


def sizes_of(groups, positions):
    """The number of patches in each token, by the groups that its positions name."""
    return torch.zeros_like(groups).scatter_add(1, groups, torch.ones_like(groups)).gather(1, positions)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_reference(kind, method):
    model = tiny(kind, method, ODD)
    agrees(runner_of(model), model, batches=(3,))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_so_it_does_at_another_size_and_before_folding(kind, method):
    model = tiny(kind, method)
    agrees(runner_of(model), model)
    agrees(TorchRunner(model.graph()), model)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("evit", {"fuse": False}),
        ("evit", {"score": "pooled"}),
        ("evit", {"keep_rate": (1.0, 0.4, 0.9)}),
        ("evit", {"keep_rate": (9, 10, 1.0)}),  # the fused token makes 10
        ("evit", {"keep_rate": (14, 2, 0.1)}),
        ("tome", {"prop_attn": False}),
        ("tome", {"merge": (0, 3, 0)}),
        ("tome", {"merge": (5, 0, 99)}),
    ],
)
@pytest.mark.parametrize("kind", ["deit", "beit", pytest.param("eva02", marks=pytest.mark.slow)])
def test_other_settings_do_too(kind, method, settings):
    model = tiny(kind, method, ODD, settings, depth=3)
    agrees(runner_of(model), model, batches=(3,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["deit", "dinov2-registers", "mixed", "beit-shared", "siglip"])
def test_given_choices_are_made_whatever_the_model_prefers(kind, method):
    model, runner = tiny(kind, method), runner_of(tiny(kind, method))
    images = model.images(3)
    own = evaluated(model, images)
    kept = [stage.roll(1, 0) for stage in own.kept]  # another image's
    for given in (own.kept, kept):
        want, out = evaluated(model, images, given), runner.run(images, given)
        torch.testing.assert_close(out.x, want.logits, atol=2e-5, rtol=0)
        assert all(map(torch.equal, out.choices, given))
        assert all(map(torch.equal, want.kept, given))
        tokens = runner.run(images, given, output="tokens")
        torch.testing.assert_close(tokens.x, want.tokens, atol=2e-5, rtol=0)
        assert torch.equal(tokens.positions, want.positions)
        if given is own.kept:
            torch.testing.assert_close(want.logits, own.logits, atol=2e-5, rtol=0)
        else:
            assert (want.logits - own.logits).abs().amax(dim=1).min() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["deit", "eva02", "map-all"])
def test_an_answer_does_not_depend_on_the_batch(kind, method):
    model = tiny(kind, method)
    runner, images = runner_of(model), model.images(5)
    together = runner.run(images)
    for i in range(5):
        alone = runner.run(images[i : i + 1])
        torch.testing.assert_close(alone.x, together.x[i : i + 1], atol=5e-5, rtol=0)
        margin = evaluated(model, images[i : i + 1]).margin
        assert same_kept(alone.choices, [stage[i : i + 1] for stage in together.choices], margin)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("dinov2", "blocks.0.ls1.gamma", 1.0),
        ("beit", "blocks.0.gamma_1", 1.0),
        ("qk-norm", "blocks.0.attn.k_norm.weight", 1.0),
        ("qk-norm", "blocks.0.attn.q_norm.bias", 0.0),
        ("beit", "blocks.0.attn.relative_position_bias_table", 0.0),
        ("eva02-token", "blocks.0.attn.q_bias", 0.0),
    ],
)
def test_every_part_of_the_attention_counts(kind, key, value, method):
    """Layer scale and norms of queries and keys are in the models above, and change what they answer."""
    model = tiny(kind, method)
    other = replace(model, state=model.state | {key: torch.full_like(model.state[key], value)})
    images = model.images(2)
    assert (evaluated(model, images).logits - evaluated(other, images).logits).abs().max() > 1e-2
    agrees(runner_of(other), other, batches=(2,))


@pytest.mark.parametrize("kind", ["headless-mean", "dinov2", "mixed"])
def test_the_mean_of_merged_tokens_counts_each_by_its_patches(kind):
    model = tiny(kind, "tome")
    runner, images, p = runner_of(model), model.images(2), model.config.body.num_prefix
    out = runner.run(images, output="tokens")
    sizes = sizes_of(out.choices[-1], out.positions).float()
    assert sizes.max() > 1
    assert (sizes.sum(dim=1) == model.config.num_patches).all()
    means = {"headless-mean": sizes, "dinov2": sizes, "mixed": torch.cat([sizes.new_ones(2, p), sizes], dim=1)}[kind]
    rows = out.x[:, -means.shape[1] :]
    mean = (means[..., None] * rows).sum(dim=1) / means.sum(dim=1, keepdim=True)
    features = runner.run(images, output="features").x
    torch.testing.assert_close(features[:, -mean.shape[1] :], mean, atol=2e-5, rtol=0)
    assert (features[:, -mean.shape[1] :] - rows.mean(dim=1)).abs().max() > 1e-2


def test_a_pooled_score_is_the_attention_of_the_patches_mean_query():
    model = tiny("headless-mean", "evit")
    reference, images = model.reference(), model.images(2)
    block = reference.blocks[0]
    seen = {}
    with torch.no_grad():
        block.norm1.register_forward_hook(lambda module, given, out: seen.setdefault("rows", out))
        kept = reference.evaluate(images).kept[0]
        q, k, _ = block.attn.queries_keys_values(seen["rows"])
    score = ((q.mean(dim=2, keepdim=True) @ k.transpose(2, 3)) * block.attn.scale).softmax(dim=-1)[:, :, 0].mean(dim=1)
    assert torch.equal(score.topk(kept.shape[1]).indices.sort(dim=1).values, kept)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_of_the_last_block_are_reduced_only_for_those_who_ask(method):
    engine, images = tiny("deit", method).engine(backend="torch"), tiny("deit", method).images(2)
    last = [node for node in engine.graph.nodes if isinstance(node, Reduce)][-1]
    assert (last.rows, last.macs) == (1, 0)
    assert last not in nodes_for(engine.graph.nodes, "logits", choices=False)[0]
    logits, kept = engine(images, return_kept=True)
    assert torch.equal(engine(images), logits)
    assert len(kept) == 2
    tokens, positions = engine.tokens(images)
    left = engine.config.num_keep[-1] + (method == "evit")
    assert tokens.shape[1] == 1 + left == 1 + positions.shape[1]
    if method == "evit":
        assert torch.equal(positions[:, :-1], kept[-1])
        assert (positions[:, -1] == engine.config.num_patches + 1).all()
    else:
        assert torch.equal(positions.sort(dim=1).values, torch.stack([one.unique() for one in kept[-1]]))
        assert sizes_of(kept[-1], positions).sum() == 2 * engine.config.num_patches


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", every_kind("deit", "beit"))
def test_reduced_precision_is_verified(kind, method):
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny(kind, method)
        report = dvit.verify(model.engine(dtype, "torch"), model.state, num_images=8)
        assert report.passed, report
        assert report.first_difference is None, report


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("keys", "size"), [(DEIT, (80, 112)), (LVVIT, (64, 96))])
def test_families_of_trainers_are_reduced_too(keys, size, method):
    """Their files hold predictors, which do not run then; an LV-ViT's head reads every token that is left."""
    content, assume = state_dict(keys, 1), {"num_heads": 2} | ({"skip_lam": 2.0} if keys == LVVIT else {})
    given = {"method": method, "image_size": size, "assume": assume}
    engine = dvit.convert(content, device="cpu", backend="torch", **given)
    report = dvit.verify(engine, content, num_images=4)
    assert report.passed, report
    assert report.first_difference is None
    assert engine.config.learned.method == "predictor"


def test_neither_is_trained():
    for method in METHODS:
        for keys, assume in ((DEIT, {"num_heads": 2}), (LVVIT, {"num_heads": 2, "skip_lam": 2.0})):
            reference = dvit.load_reference(state_dict(keys, 1), method=method, assume=assume).train()
            with pytest.raises(NotImplementedError, match="a reduction without predictors cannot be trained"):
                reference(case_images(f"{keys}-r0.7-s1")[:1])


def test_merges_stop_at_half_and_zero_is_dense():
    def merged(merge):
        return dvit.convert(state_dict(DEIT, 1), device="cpu", method="tome", merge=merge, assume={"num_heads": 2})

    huge = merged(10**9)
    assert huge.config.num_keep == (98, 49, 25, 13)
    none = merged(0)
    assert str(none.config.reduction) == "dense"
    images = case_images("tiny-deit-r0.7-s1")[:2]
    logits, kept = none(images, return_kept=True)
    assert kept == []
    dense = dvit.convert(state_dict(DEIT, 1), device="cpu", method="none", assume={"num_heads": 2})
    assert torch.equal(logits, dense(images))
    assert merged([0, 7, 0, 3]).config.reduction.blocks == (1, 3)
    whole = dvit.convert(state_dict(DEIT, 1), device="cpu", method="evit", keep_rate=1, assume={"num_heads": 2})
    assert [stage.shape[1] for stage in whole(images, return_kept=True)[1]] == [196, 196, 196]
    torch.testing.assert_close(whole(images), dense(images), atol=2e-5, rtol=0)
