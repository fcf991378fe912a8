"""Bad input to EViT and ToMe: one line that names the argument and says what would do."""

import pytest
import torch
from any_vit import tiny
from golden_cases import state_dict

import dvit_infer as dvit

NEITHER = "is neither a keep rate, above 0 and at most 1, nor a number of tokens, 2 or more"
NO_COUNT = "is not a number of tokens to merge; a whole number such as 8 is, one for each block "
NO_COUNT += "(16,14,12,...), or 8:decreasing"
OF_EVIT, OF_TOME = "which takes keep_rate, fuse, score, prune_at", "which takes merge, prop_attn"
DENSE = "state dict holds no score predictors, so it runs dense"


def convert(learned=False, assume=None, **given):
    state = {key: w for key, w in state_dict("tiny-deit", 1).items() if learned or "predictor" not in key}
    return dvit.convert(state, device="cpu", backend="torch", assume={"num_heads": 2} | (assume or {}), **given)


def refused(message, **given):
    with pytest.raises(dvit.InputError) as caught:
        convert(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "rate", [0, -1, 1.5, [], True, "0.7", float("nan"), float("inf"), {1: 2}, [0.5, None, 0.5], torch.ones(2, 2)]
)
def test_keep_rates_of_evit(rate):
    shown = repr(None) if isinstance(rate, list) and rate else " ".join(repr(rate).split())
    refused(f"keep_rate: {shown} {NEITHER}", method="evit", keep_rate=rate)


@pytest.mark.parametrize(
    "merge", [-1, 1.5, [], True, float("nan"), float("inf"), {1: 2}, [1, 2, None, 3], torch.ones(2, 2)]
)
def test_merges_of_tome(merge):
    shown = repr(None) if isinstance(merge, list) and merge else " ".join(repr(merge).split())
    refused(f"merge: {shown} {NO_COUNT}", method="tome", merge=merge)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("keep_rate: 300 tokens are to be kept in block 1, where there are only 196", {"keep_rate": 300}),
        ("keep_rate: 120 tokens are to be kept in block 2, where there are only 100", {"keep_rate": [99, 120, 9]}),
        ("keep_rate: 2 given, but 3 stages (prune_at 1,2,3) need one each", {"keep_rate": [0.5, 0.5]}),
        ("keep_rate: 3 given, but 1 stage (prune_at 2) needs one", {"keep_rate": [0.5] * 3, "prune_at": [2]}),
        (
            "keep_rate: 1 among numbers of tokens is no number of them; 1.0 keeps all, 2 is the least",
            {"keep_rate": [40, 20, 1]},
        ),
        ("prune_at: no block is given", {"prune_at": ()}),
        ("prune_at: 3,1 is not strictly increasing", {"prune_at": (3, 1)}),
        ("prune_at: there is no block 4; the model has blocks 0 to 3", {"prune_at": 4}),
        ("prune_at: '1,2' is not a list of block indices", {"prune_at": "1,2"}),
        ("fuse: 1 is not true or false", {"assume": {"fuse": 1}}),
        ("score: 'best' is not one of class, pooled", {"assume": {"score": "best"}}),
        (f"merge: is for method tome, not evit, {OF_EVIT}", {"merge": 8}),
        (f"prop_attn: is for method tome, not evit, {OF_EVIT}", {"assume": {"prop_attn": True}}),
    ],
)
def test_other_settings_of_evit(message, given):
    refused(message, method="evit", **given)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("merge: 2 numbers are given; the model has 4 blocks, one for each is needed", {"merge": [8, 8]}),
        ("prop_attn: 'no' is not true or false", {"assume": {"prop_attn": "no"}}),
        (f"keep_rate: is for methods OWNERS, not tome, {OF_TOME}", {"keep_rate": 0.5}),
        (f"prune_at: is for methods OWNERS, not tome, {OF_TOME}", {"prune_at": [2]}),
        (f"fuse: is for method evit, not tome, {OF_TOME}", {"assume": {"fuse": False}}),
        (f"score: is for method evit, not tome, {OF_TOME}", {"assume": {"score": "pooled"}}),
    ],
)
def test_other_settings_of_tome(message, given, learned):
    message = message.replace("OWNERS", "predictor, evit and random" if learned else "evit and random")
    refused(message, method="tome", learned=learned, **given)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (f"merge: {DENSE}; method tome takes it", {"merge": 8}),
        (f"fuse: {DENSE}; method evit takes it", {"assume": {"fuse": True}}),
        ("method: 'EViT' is not one of predictor, evit, tome, random, none", {"method": "EViT"}),
    ],
)
def test_settings_without_their_method(message, given):
    refused(message, **given)


def test_large_numbers_are_over_the_bound():
    for given in ({"method": "tome", "merge": 10**30}, {"method": "tome", "merge": 1e300}):
        with pytest.raises(dvit.InputError, match=r"merge: a number of .* is over the bound"):
            convert(**given)
    with pytest.raises(dvit.InputError, match=r"keep_rate: a number of .* is over the bound"):
        convert(method="evit", keep_rate=10**30)


def test_what_may_be_given_may_be_any_sequence_of_numbers():
    assert convert(method="tome", merge=range(4)).config.num_keep == (195, 193, 190)
    assert convert(method="tome", merge=2.0).config.num_keep == (194, 192, 190, 188)
    assert convert(method="evit", keep_rate=(0.5, 1.0, 2)).config.num_keep == (98, 99, 2)
    assert convert(method="evit", keep_rate=0.01).config.num_keep == (2, 1, 1)


def test_a_model_without_class_token_is_told_what_would_do():
    model, assume = tiny("headless-mean"), {"num_heads": 2, "eps": 1e-6, "pool": "mean", "act": "gelu"}
    size = {"trained_size": model.config.image_size}
    with pytest.raises(dvit.InputError, match=r"method: 'evit' ranks patches by the class .*score=pooled.*tome"):
        dvit.convert(model.state, method="evit", assume=assume | size)
    pooled = dvit.convert(model.state, method="evit", device="cpu", assume=assume | size | {"score": "pooled"})
    merged = dvit.convert(model.state, method="tome", device="cpu", assume=assume | size)
    for engine in (pooled, merged):
        assert dvit.verify(engine, model.state, num_images=2).passed
