"""Which points a model has: what fits it, in order, none of them twice."""

import itertools

import pytest
from golden_cases import state_dict
from golden_vits import write

from dvit_infer.errors import InputError
from dvit_infer.tuning.points import Points, keywords_of, options_of
from dvit_infer.tuning.subject import Subject

pytestmark = pytest.mark.slow  # each is a search

HEADS = {"num_heads": 2}


def subject(keys="tiny-deit", **options):
    state = state_dict(keys, 1)
    return Subject(state, device="cpu", backend="torch", image_size=64, assume=HEADS, **options)


@pytest.fixture(scope="module")
def points():
    model = subject()
    return Points(model.config, model.dense)


def test_families_are_ordered_and_their_points_differ(points):
    assert {point.method for point in points.points.values()} == {"evit", "tome", "predictor"}
    for family in points.families.values():
        shares = [candidate.macs for candidate in family]
        assert shares == sorted(shares)
        assert 0 < shares[0] <= shares[-1] < 1
    reductions = [point.config.reduction for point in points.points.values()]
    assert len({(one.method, one.stages) for one in reductions}) == len(reductions)


def test_keywords_and_options_give_the_point(points):
    model = subject()
    for point in list(points.points.values())[::7]:
        assert model.config(point.method, point.settings).reduction == point.config.reduction
        assert keywords_of(point.method, point.settings)["method"] == point.method
        assert point.name == options_of(point.method, point.settings)


def test_options():
    assert options_of("evit", {"keep_rate": 0.7, "prune_at": (1, 2)}) == "--method evit --keep-rate 0.7 --prune-at 1,2"
    assert options_of("tome", {"merge": (3, 0)}) == "--method tome --merge 3,0"
    assert options_of("evit", {"keep_rate": 0.5, "score": "pooled"}).endswith("--keep-rate 0.5 --assume score=pooled")


def test_counts_that_suit_tiles():
    model = Subject(state_dict("tiny-deit", 1), device="cpu", backend="torch", image_size=224, assume=HEADS)
    points = Points(model.config, model.dense, ["evit"])
    name = next(name for name in points.points if "0.72" in name and "1,2,3" in name)
    rounded = points.rounded(name)
    before = points.points[name].config.reduction
    assert len(rounded) == 2
    for point in rounded:
        reduction = point.config.reduction
        assert all((stage.keep + 1 + reduction.fuses(i)) % 8 == 0 for i, stage in enumerate(reduction.stages))
        assert all(abs(a.keep - b.keep) < 8 for a, b in zip(reduction.stages, before.stages, strict=True))
        assert points.points[point.name] is point
    assert rounded[0].candidate.macs > points.points[name].candidate.macs > rounded[1].candidate.macs
    assert points.rounded(rounded[0].name) == []


def test_a_model_without_class_token_is_ranked_by_its_mean_query(tmp_path):
    model = Subject(write("hf-siglip-tiny", tmp_path / "siglip"), device="cpu", backend="torch")
    found = Points(model.config, model.dense, ["evit"])
    assert found.points
    assert all(point.settings["score"] == "pooled" for point in found.points.values())
    assert keywords_of("evit", {"keep_rate": 0.5, "score": "pooled"})["assume"] == {"score": "pooled"}


def test_methods_that_do_not_fit():
    dense = {key: value for key, value in state_dict("tiny-deit", 1).items() if "predictor" not in key}
    model = Subject(dense, device="cpu", backend="torch", image_size=64, assume=HEADS)
    assert {p.method for p in Points(model.config, model.dense).points.values()} == {"evit", "tome"}
    with pytest.raises(InputError, match="methods: 'predictor' needs score predictors"):
        Points(model.config, model.dense, ["tome", "predictor"])
    with pytest.raises(InputError, match="methods: 'merge' is not one of predictor, evit, tome, random"):
        Points(model.config, model.dense, ["merge"])
    with pytest.raises(InputError, match="methods: a list of"):
        Points(model.config, model.dense, [])


def test_a_model_that_nothing_reduces():
    def recognise(method, settings):
        raise InputError("method: does not fit")

    model = subject()
    with pytest.raises(InputError, match=r"model: no method makes .* any smaller"):
        Points(recognise, model.dense)


def test_facts_that_are_searched_cannot_be_assumed():
    with pytest.raises(InputError, match="assume: keep_rate is what is searched"):
        Subject(state_dict("tiny-deit", 1), device="cpu", assume={**HEADS, "keep_rate": 0.5})
    with pytest.raises(InputError, match="assume: a dict"):
        Subject(state_dict("tiny-deit", 1), device="cpu", assume="num_heads=2")


def test_settings_of_one_method_are_for_that_method():
    model = Subject(state_dict("tiny-deit", 1), device="cpu", image_size=64, assume={**HEADS, "fuse": False})
    points = Points(model.config, model.dense)
    by_method = itertools.groupby(points.points.values(), key=lambda point: point.method)
    told = {method: next(group).config.reduction.settings for method, group in by_method}
    assert dict(told["evit"])["fuse"] is False
    assert "fuse" not in dict(told["tome"])
