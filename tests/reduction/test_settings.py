"""How many tokens to merge or to keep, as it may be said; and where it stands then."""

import itertools

import pytest
import torch
from golden_cases import state_dict

import dvit_infer as dvit
from dvit_infer.config import Reduction, Stage
from dvit_infer.evaluate.predictions import model_id
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.reduction import tome
from dvit_infer.reduction.settings import Trunk, merge_counts


def dense(**options) -> dvit.Engine:
    state = {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k}
    return dvit.convert({"model": state, "args": {"num_heads": 2}}, device="cpu", backend="torch", **options)


def parse_r(depth: int, r: int) -> list[int]:
    """ToMe's own schedule for (r, -1), as its paper's code computes it: from 2 r to 0."""
    first, last = int(r * 2.0), 2 * r - int(r * 2.0)
    step = (last - first) / (depth - 1)
    return [int(first + step * i) for i in range(depth)]


@pytest.mark.parametrize("depth", [2, 4, 12, 24])
@pytest.mark.parametrize("mean", [1, 3, 8, 13])
def test_a_decreasing_schedule_is_tomes(depth, mean):
    found = tome.stages({"merge": f"{mean}:decreasing"}, range(depth), 10**6)
    counts = [10**6 - found[0].keep, *(a.keep - b.keep for a, b in itertools.pairwise(found))]
    expected = parse_r(depth, mean)
    assert [stage.block for stage in found] == [i for i, count in enumerate(expected) if count]
    assert counts == [count for count in expected if count]


def test_one_block_merges_the_mean():
    assert tome.stages({"merge": "8:decreasing"}, [0], 100)[0].keep == 92
    assert tome.stages({"merge": "0:decreasing"}, [0, 1], 100) == ()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (8, 8),
        ("8", 8),
        (8.0, 8),
        ("3,2,1", (3, 2, 1)),
        ([3, 2, 1], (3, 2, 1)),
        (" 8 ", 8),
        ("08:decreasing", "8:decreasing"),
    ],
)
def test_what_may_be_said(given, meant):
    assert merge_counts("merge", given) == meant


@pytest.mark.parametrize(
    "given", ["", "x", "8:", ":decreasing", "8:decreasing,8", "1,,2", "1.5", "-1", "9" * 40, "8:8", ()]
)
def test_what_may_not(given):
    with pytest.raises(dvit.InputError, match=r"^merge: "):
        merge_counts("merge", given)


def test_a_schedule_is_kept_as_it_was_said(tmp_path):
    engine = dense(method="tome", merge="8:decreasing")
    assert str(engine.config.reduction) == "tome 8:decreasing: 180,170,165 of 196"
    engine.save(tmp_path / "a.safetensors")
    loaded = dvit.load(tmp_path / "a.safetensors", device="cpu", backend="torch")
    assert loaded.config == engine.config
    assert dvit.load(tmp_path / "a.safetensors", device="cpu", backend="torch", merge="2,2,2,2").config.num_keep == (
        194, 192, 190, 188
    )  # fmt: skip
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(loaded(images), engine(images))
    assert torch.equal(dense(method="tome", merge=[16, 10, 5, 0])(images), engine(images))
    reference = dvit.load_reference(tmp_path / "a.safetensors", merge="8:decreasing")
    torch.testing.assert_close(reference(images), engine(images), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("reduction", "rate"),
    [
        (Reduction("tome", (Stage(0, 90), Stage(1, 80)), (("merge", 10),), 100, merges=True), 0.8),
        (Reduction("evit", (Stage(1, 90), Stage(2, 63)), (("keep_rate", (0.9, 0.7)),), 100), 0.9),
        (Reduction("evit", (Stage(1, 60), Stage(2, 30)), (("keep_rate", (60, 30)),), 100), 0.6),
        (Reduction("predictor", (Stage(1, 70), Stage(2, 49)), (("keep_rate", 0.7),), 100), 0.7),
        (Reduction(), 1.0),
    ],
)
def test_the_keep_rate_of_rows(reduction, rate):
    assert reduction.keep_rate == pytest.approx(rate)


def test_ids_of_predictions_are_as_before_models_could_merge(tmp_path):
    state = {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k}
    torch.save({"model": state, "args": {"num_heads": 2}}, tmp_path / "a.pth")
    ids = []
    for options in ({}, {"method": "tome"}, {"method": "tome", "merge": "8:decreasing"}, {"method": "evit"}):
        engine = dvit.convert(tmp_path / "a.pth", device="cpu", backend="torch", **options)
        ids.append(model_id(engine, tmp_path / "a.pth", preprocess_for(engine.config)))
    assert ids[0] == "deit-64x4@a7b22db1"
    assert len(set(ids)) == 4


@pytest.mark.parametrize(
    ("trunk", "schedule"),
    [
        (Trunk(12, 768, 196, 1, reads_patches=False), (13,) * 11 + (0,)),
        (Trunk(12, 768, 196, 1), 13),
        (Trunk(12, 192, 196, 1, reads_patches=False), (13,) * 10 + (0, 0)),  # the last ones cost more than they save
        (Trunk(24, 1024, 196, 1, reads_patches=False), (6,) * 23 + (0,)),
        (Trunk(2, 64, 16, 1, reads_patches=False), (6, 0)),  # pays nowhere: what was asked for is done where it counts
        (Trunk(2, 64, 2, 0), 1),
    ],
)
def test_blocks_where_merging_does_not_pay_are_left_out_by_default(trunk, schedule):
    assert tome.SETTINGS["merge"].default(trunk) == schedule


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ((("merge", 8), ("prop_attn", True)), "tome 8: 9 of 99"),
        ((("merge", (8, 8, 8)), ("prop_attn", False)), "tome 8 prop_attn=false: 9 of 99"),
        ((("merge", (13,) * 11 + (0,)),), "tome 13x11,0: 9 of 99"),
        ((("merge", (3, 0, 40, 1)),), "tome 3,0,40,1: 9 of 99"),
        ((("merge", "8:decreasing"),), "tome 8:decreasing: 9 of 99"),
        ((("keep_rate", 0.7), ("fuse", True), ("score", "class")), "tome 0.7: 9 of 99"),
        (
            (("keep_rate", (0.9, 0.7)), ("fuse", False), ("score", "pooled")),
            "tome 0.9,0.7 fuse=false score=pooled: 9 of 99",
        ),
    ],
)
def test_labels_differ_where_reductions_do(settings, label):
    assert str(Reduction("tome", (Stage(1, 9),), settings, 99)) == label
