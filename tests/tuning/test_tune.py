"""`dvit.tune` on a small model: what is searched, chosen, stated and resumed. No time is asserted."""

import itertools
import json
import math
import weakref

import pytest
import torch
from drawn import draw_all
from small_training import write_dense

import dvit_infer as dvit
from dvit_infer.errors import InputError
from dvit_infer.images.synthetic import sample_uint8_images
from dvit_infer.tuning import sample as sampling
from dvit_infer.tuning import tune as tuning
from dvit_infer.tuning.final import AT_ONCE
from dvit_infer.tuning.finalists import FAMILIES
from dvit_infer.tuning.measure import Measure
from dvit_infer.tuning.result import TunedPoint, pareto
from dvit_infer.tuning.sample import distinct, sample_of

pytestmark = pytest.mark.slow  # each is a search

RATES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.96)
CPU = {"device": "cpu", "backend": "torch", "batch": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "dense.pth", num_classes=10)


@pytest.fixture(scope="module")
def images():
    return sample_uint8_images(96, (32, 32))


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Search few points, and time them little: what is timed is not what is tested."""
    monkeypatch.setattr("dvit_infer.tuning.final.TIMING_S", (0.05, 0.05))
    monkeypatch.setattr("dvit_infer.tuning.points.RATES", RATES)
    monkeypatch.setattr("dvit_infer.benchmark.timing.MIN_ROUNDS", 2)
    monkeypatch.setattr("dvit_infer.benchmark.timing.WARM_UP_S", 0.0)
    monkeypatch.setattr("dvit_infer.tuning.measure.PAIRS_S", 0.0)
    monkeypatch.setattr("dvit_infer.benchmark.timing.WARM_UP_LIMIT_S", 0.0)


@pytest.fixture(scope="module")
def found(dense, images):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvit_infer.tuning.final.TIMING_S", (0.05, 0.05))
        patch.setattr("dvit_infer.tuning.points.RATES", RATES)
        return dvit.tune(dense, images, 0.75, methods=["evit", "tome"], **CPU)


def test_the_chosen_point_meets_the_target_on_the_images(found, images):
    assert found.met
    assert found.finished
    assert found.chosen.meets
    assert found.chosen.quality >= found.target == 0.75
    assert (found.searched, found.held_back.images) == (64, 32)
    assert found.chosen.images == 64
    assert str(found.engine.config.reduction) == found.chosen.label
    assert found.chosen.measured
    assert found.speedup == pytest.approx(found.chosen.speedup)


def test_what_is_stated_is_what_the_engine_does(found, dense, images):
    engine, plain = found.engine, dvit.convert(dense, method="none", device="cpu", backend="torch")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    same = (engine(images).argmax(dim=1) == plain(images).argmax(dim=1))[order].float()
    assert found.chosen.quality == pytest.approx(same[:64].mean().item())
    assert found.held_back.quality == pytest.approx(same[64:].mean().item())
    assert found.held_back.low <= found.held_back.quality <= found.held_back.high
    assert f"{found.held_back.quality:.2%} of its answers on 32 images held back (95%: " in str(found)


def test_the_settings_give_the_same_engine_and_so_does_the_saved_file(found, dense, images, tmp_path):
    again = dvit.convert(dense, **found.settings, device="cpu", backend="torch")
    assert torch.equal(again(images), found.engine(images))
    found.engine.save(tmp_path / "a.safetensors")
    saved = dvit.load(tmp_path / "a.safetensors", device="cpu", backend="torch")
    assert saved.config.reduction == found.engine.config.reduction


def test_points_and_the_front(found):
    names = [point.name for point in found.points]
    assert len(names) == len(set(names)) > 1
    assert [point.macs for point in found.points] == sorted(point.macs for point in found.points)
    for one, other in itertools.pairwise(found.pareto):
        assert one.speedup >= other.speedup
        assert one.quality < other.quality
    assert {row.runtime for row in found.rows} == {"dense", "engine"}
    assert [row.speedup for row in found.rows if row.runtime == "dense"] == [1.0]
    assert json.loads(json.dumps(found.content()))["chosen"]["name"] == found.chosen.name


def point(name, quality, speedup):
    return TunedPoint(name, name, "evit", {}, 0.5, quality, 0, 1, 10, False, speedup)


def test_the_front_leaves_out_what_is_inferior_in_both():
    points = [
        point("a", 0.9, 2.0),
        point("b", 0.8, 1.9),
        point("c", 0.9, 1.5),
        point("d", 1.0, 1.2),
        point("e", 0.5, 3),
    ]
    assert [one.name for one in pareto(points)] == ["e", "a", "d"]
    assert pareto([]) == ()


@pytest.mark.slow
def test_a_target_that_no_point_meets(dense, images, monkeypatch):
    def losses(self, engine, held_back):
        keeps = 1 - sum(stage.keep for stage in engine.config.reduction.stages) / 1000
        yield [keeps] * 64

    monkeypatch.setattr(Measure, "_losses", losses)
    result = dvit.tune(dense, images, 0.999, methods=["evit"], **CPU)
    assert not result.met
    assert not result.chosen.meets
    assert result.chosen.quality == max(one.quality for one in result.points)
    assert str(result).startswith("no reduction meets the target of 0.999; the nearest is evit 0.")
    assert str(result.engine.config.reduction) == result.chosen.label


@pytest.mark.slow
def test_images_held_back_may_rule_a_point_out(dense, images, monkeypatch):
    losses = Measure._losses

    def unlike(self, engine, held_back):
        yield from ([[1.0] * 32] if held_back else losses(self, engine, held_back))

    monkeypatch.setattr(Measure, "_losses", unlike)
    result = dvit.tune(dense, images, 0.75, methods=["evit", "tome"], **CPU)
    assert not result.met
    assert result.held_back.quality == 0
    assert any("held back speak against that" in line for line in result.warnings)


@pytest.mark.slow
def test_features_within_a_cosine(dense, images):
    result = dvit.tune(dense, images, 0.9, metric="cosine", methods=["tome"], **CPU)
    assert result.met
    plain = dvit.convert(dense, method="none", device="cpu", backend="torch")
    cosine = torch.cosine_similarity(result.engine.features(images), plain.features(images))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert result.held_back.quality == pytest.approx(cosine[order][64:].mean().item(), abs=1e-5)
    assert "features at a cosine of 0.9" in str(result)


@pytest.mark.slow
def test_top1_counts_what_is_won_too(dense, images):
    plain = dvit.convert(dense, method="none", device="cpu", backend="torch")
    labels = plain(images).argmax(dim=1)
    labels[::3] = (labels[::3] + 1) % 10
    result = dvit.tune(dense, images, 0.8, metric="top1", labels=labels, methods=["tome"], **CPU)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[64:]
    right = (result.engine(images).argmax(dim=1) == labels)[order].float().mean().item()
    assert result.held_back.top1 == pytest.approx(100 * right)
    assert result.held_back.dense_top1 == pytest.approx(100 * (plain(images).argmax(1) == labels)[order].float().mean())
    with pytest.raises(InputError, match="labels: the dense model is right for none"):
        dvit.tune(dense, images, metric="top1", labels=torch.full((96,), 99), **CPU)
    with pytest.raises(InputError, match="labels: metric top1 of images that are given needs their classes"):
        dvit.tune(dense, images, metric="top1", **CPU)


@pytest.mark.slow
def test_images_that_all_look_alike(dense, images):
    alike = images[:1].repeat(60, 1, 1, 1)
    result = dvit.tune(dense, alike, 0.5, methods=["tome"], **CPU)
    assert (result.held_back.images, result.held_back.distinct) == (20, 1)
    assert result.held_back.high - result.held_back.low > 0.7
    assert any("only 1 of 20 images held back differ by more than noise" in line for line in result.warnings)


def test_distinct_images():
    base = sample_uint8_images(6, (32, 32))
    noise = torch.randint(-2, 3, base.shape, generator=torch.Generator().manual_seed(0))
    noisy = (base.int() + noise).clamp(0, 255).to(torch.uint8)
    assert distinct(base) == 6
    assert distinct(torch.cat([base, noisy])) == 6
    assert distinct(base[:1]) == 1
    normal = (torch.cat([base, noisy]).float() / 255 - 0.45) / 0.23
    assert distinct(normal) == 6


def test_an_interrupted_search_resumes(dense, images, tmp_path, monkeypatch):
    file, calls = tmp_path / "search.json", []
    losses = Measure.losses

    def counted(self, name):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from losses(self, name)

    monkeypatch.setattr(Measure, "losses", counted)
    options = {**CPU, "methods": ["evit", "tome"], "search_file": file}
    with pytest.raises(KeyboardInterrupt):
        dvit.tune(dense, images, 0.99, **options)
    known = json.loads(file.read_text())["tallies"]
    assert len(known) == 1
    result = dvit.tune(dense, images, 0.99, **options)
    assert not set(calls[2:]) & set(known)
    assert {point.name for point in result.points} >= set(known)


def test_few_engines_are_alive_at_once(dense, images, monkeypatch):
    """Of all finalists, here of five families and those beside the fastest; one of a large model takes a gigabyte."""
    engine, made, alive = Measure.engine, weakref.WeakSet(), []

    def counted(self, name):
        alive.append(len(made))
        made.add(one := engine(self, name))
        return one

    monkeypatch.setattr(Measure, "engine", counted)
    monkeypatch.setattr(Measure, "relative_time", lambda self, name: 1.0)
    for module in ("search", "finalists"):  # whatever the times, all families are searched, and may hold the fastest
        monkeypatch.setattr(f"dvit_infer.tuning.{module}.WINDOW", math.inf)
    result = dvit.tune(dense, images, 0.5, methods=["evit", "tome"], **CPU)
    assert len(alive) >= len(result.rows) - 1 >= FAMILIES > AT_ONCE
    assert max(alive) < AT_ONCE


@pytest.mark.parametrize("change", [{"target": 0.76}, {"metric": "cosine"}, {"methods": ["evit"]}, {"batch": 8}])
def test_a_file_of_another_search_counts_as_none(change, dense, images, tmp_path):
    file = tmp_path / "search.json"
    file.write_text("{}")
    keys = []
    for options in ({}, change):
        given = {"target": 0.75, "methods": ["tome"], **CPU, **options}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "SearchFile", lambda path, key: keys.append(key) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                dvit.tune(dense, images, **given, search_file=file)
    assert keys[0] != keys[1]


def test_a_folder_is_sampled(dense, tmp_path, monkeypatch):
    draw_all(tmp_path / "a", 9)
    draw_all(tmp_path / "b", 9, 100)
    engine = dvit.convert(dense, device="cpu", backend="torch")
    monkeypatch.setattr(sampling, "MOST", 12)
    (tmp_path / "a" / "broken.png").write_text("no image")
    sample = sample_of(tmp_path, engine, workers=0)
    assert len(sample.images) in (11, 12)
    assert sample.searched == round(len(sample.images) * 2 / 3)
    assert any("of 19 images are used, drawn at random" in line for line in sample.warnings)
    again = sample_of(tmp_path, engine, workers=0)
    assert torch.equal(sample.images, again.images)
    assert sampling.digest(sample) == sampling.digest(again)
    assert not torch.equal(sample.images, sample_of(tmp_path, engine, workers=0, seed=1).images)


def test_classes_of_folders(dense, tmp_path):
    for label in range(3):
        draw_all(tmp_path / str(label), 4, 100 * label)
    engine = dvit.convert(dense, device="cpu", backend="torch")
    sample = sample_of(tmp_path, engine, with_labels=True, workers=0)
    assert sorted(sample.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert sample_of(tmp_path, engine, workers=0).labels is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": 1.5}, "target: 1.5 is not a share"),
        ({"metric": "loss"}, "metric: 'loss' is not one of"),
        ({"methods": ["predictor"]}, "methods: 'predictor' needs score predictors"),
        ({"methods": "evit"}, "methods: a list of"),
        ({"budget": 0}, "budget: 0 is not a number of seconds"),
        ({"budget": 1e-9}, "budget: 1e-09 seconds are too few to measure a single point"),
        ({"batch": 0}, "batch: 0 images at a time"),
        ({"calibrate": "here"}, "calibrate: is for dtype int8"),
        ({"assume": {"merge": 3}}, "assume: merge is what is searched"),
    ],
)
def test_bad_arguments(options, said, dense, images):
    with pytest.raises(InputError, match=said):
        dvit.tune(dense, images, **{**CPU, **options})


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images(count, dense, images):
    with pytest.raises(InputError, match=f"^images: {count} image.* to search; 3 or more are needed"):
        dvit.tune(dense, images[:count], **CPU)
    with pytest.raises(InputError, match="images: shape"):
        dvit.tune(dense, images[:, :, :16], **CPU)


@pytest.mark.slow
def test_a_model_without_classifier_is_tuned_by_its_features(tmp_path):
    from golden_vits import write

    source = write("hf-siglip-tiny", tmp_path / "siglip")
    engine = dvit.convert(source, device="cpu", backend="torch")
    images = sample_uint8_images(12, engine.config.image_size)
    result = dvit.tune(source, images, 0.5, methods=["evit"], **CPU)
    assert result.metric == "cosine"
    assert "score=pooled" in result.chosen.name
    again = dvit.convert(source, **result.settings, device="cpu", backend="torch")
    assert torch.equal(again.features(images), result.engine.features(images))
    with pytest.raises(InputError, match=r"metric: .* has no classifier, and so no classes; metric cosine fits it"):
        dvit.tune(source, images, metric="agreement", **CPU)
