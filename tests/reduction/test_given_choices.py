"""Choices that a caller gives to EViT and ToMe are checked: groups, and positions of fused tokens."""

import pytest
import torch
from any_vit import tiny

import dvit_infer as dvit

N, DEPTH = 24, 3  # patches, blocks


@pytest.fixture(scope="module")
def evit():
    """It keeps 17, 13 and 10, and fuses in stages 0, 1 and 2: positions 24, 25, 26."""
    return tiny("deit", "evit", depth=DEPTH).engine(backend="torch")


@pytest.fixture(scope="module")
def tome():
    """It makes 18, 12 and 6 groups."""
    return tiny("deit", "tome", depth=DEPTH, settings={"merge": 6}).engine(backend="torch")


def images(batch=1):
    return tiny("deit").images(batch)


def positions(*stages):
    return [torch.tensor([list(stage)]) for stage in stages]


def groups(*counts):
    """The first patches are in one group, and the others alone."""
    return [torch.arange(N).where(torch.arange(N) > N - count, torch.tensor(0))[None] for count in counts]


def evit_choice():
    return [list(range(17)), [*range(12), 24], [*range(8), 24, 25]]


def test_what_was_returned_can_be_given(evit, tome):
    assert evit.config.num_keep == (17, 13, 10)
    assert tome.config.num_keep == (18, 12, 6)
    for engine in (evit, tome):
        logits, kept = engine(images(3), return_kept=True)
        again, same = engine(images(3), kept=kept, return_kept=True)
        torch.testing.assert_close(again, logits, atol=2e-5, rtol=0)
        assert all(map(torch.equal, same, kept))
    made = evit(images(), kept=positions(*evit_choice()), return_kept=True)[1]
    assert [stage[0].tolist() for stage in made] == evit_choice()
    assert all(map(torch.equal, tome(images(), kept=groups(18, 12, 6), return_kept=True)[1], groups(18, 12, 6)))


@pytest.mark.parametrize(
    ("stage", "choice", "message"),
    [
        (0, [*range(16), 24], "stage 0 is not ascending positions from 0 to 23"),  # its own fused token
        (0, [*range(16), 23, 24], r"stage 0 is torch.int64 of shape \(1, 18\); int64 \(1, 17\) is expected"),
        (1, [*range(12), 25], "stage 1 is not ascending positions from 0 to 23, or 24 and up for fused tokens"),
        (1, [24, *range(12)], "stage 1 is not ascending"),
        (1, [*range(11), 24, 24], "stage 1 is not ascending"),
        (1, [*range(11), 17, 24], "stage 1 keeps a position that an earlier stage dropped"),
        (2, [*range(7), 12, 24, 25], "stage 2 keeps a position that an earlier stage dropped"),
        (2, [*range(8), 25, 26], "stage 2 is not ascending"),
        (2, [-1, *range(7), 24, 25], "stage 2 is not ascending"),
    ],
)
def test_positions_that_are_none_are_refused(stage, choice, message, evit):
    stages = evit_choice()
    stages[stage] = choice
    with pytest.raises(ValueError, match=message):
        evit(images(), kept=positions(*stages))


def test_only_a_stage_that_fuses_has_a_fused_token():
    """The first keeps all of its tokens, so that there is nothing to fuse: position 24 is no token."""
    engine = tiny("deit", "evit", settings={"keep_rate": (1.0, 0.5)}).engine(backend="torch")
    assert engine.config.num_keep == (24, 12)
    with pytest.raises(ValueError, match="stage 1 keeps a position that an earlier stage dropped"):
        engine(images(), kept=positions(range(24), [*range(11), 24]))
    plain = tiny("deit", "evit", settings={"fuse": False}).engine(backend="torch")
    assert plain.config.num_keep == (17, 12)
    with pytest.raises(ValueError, match="stage 1 keeps a position that an earlier stage dropped"):
        plain(images(), kept=positions(range(17), [*range(11), 24]))


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (0, lambda g: g[:, :-1], r"of shape \(1, 23\); int64 \(1, 24\) is expected"),
        (0, lambda g: g.int(), "torch.int32"),
        (0, lambda g: g.double(), "torch.float64"),
        (0, lambda g: g.masked_fill(g == 23, 24), "stage 0 does not give for every patch the lowest one of its group"),
        (0, lambda g: g.masked_fill(g == 0, -1), "stage 0 does not give"),
        (0, lambda g: g.masked_fill(g == 0, 6), "stage 0 does not give"),  # not the lowest one
        (1, lambda g: g.masked_fill(g == 23, 5), "stage 1 does not give"),  # 5 is in the group of 0
        (0, lambda g: torch.arange(N)[None], "stage 0 does not make 18 groups"),
        (1, lambda g: g.masked_fill(g == 23, 0), "stage 1 does not make 12 groups"),
        (2, lambda g: groups(6)[0].where(torch.arange(N) != 1, torch.tensor(1)), "stage 2 does not make 6 groups"),
    ],
)
def test_groups_that_are_none_are_refused(stage, change, message, tome):
    kept = groups(18, 12, 6)
    kept[stage] = change(kept[stage])
    with pytest.raises(ValueError, match=message):
        tome(images(), kept=kept)


def test_a_group_is_not_split_again(tome):
    kept = groups(18, 12, 6)
    own, zero = torch.arange(N), torch.tensor(0)
    kept[1] = own.where((own < 1) | (own == 1) | (own > 13), zero)[None]  # 1 alone, though stage 0 merged it into 0
    assert len(kept[1].unique()) == 12
    with pytest.raises(ValueError, match="stage 1 splits a group that an earlier stage made"):
        tome(images(), kept=kept)


def test_every_image_is_checked_and_every_stage_is_needed(evit, tome):
    good = [stage.expand(2, -1) for stage in groups(18, 12, 6)]
    bad = [*good[:2], torch.cat([good[2][:1], good[1][:1]])]
    with pytest.raises(ValueError, match="stage 2 does not make 6 groups"):
        tome(images(2), kept=bad)
    for engine in (evit, tome):
        for kept, message in ((good[:2], "2 stages given, the model has 3"), ({}, "a list of tensors"), (3, "a list")):
            with pytest.raises(ValueError, match=message):
                engine(images(2), kept=kept)
        with pytest.raises(ValueError, match="stage 0 is a list"):
            engine(images(1), kept=[[1, 2]] * 3)


def test_the_dense_model_takes_none():
    with pytest.raises(ValueError, match="1 stages given, the model has 0"):
        tiny("deit").engine(backend="torch")(images(), kept=groups(18))
    assert issubclass(dvit.InputError, ValueError)
