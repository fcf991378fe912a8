"""The folder of an embedding: rows are the engine's features, and its bytes the same however often a run is stopped."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from any_vit import tiny
from commands import SIZE, lines
from drawn import draw_all, write_cut, write_text

import dvit_infer as dvit
from dvit_infer.evaluate.embedding_folder import FEATURES, IMAGES, INDEX
from dvit_infer.evaluate.features import checked_pool, pooled
from dvit_infer.evaluate.predictions import model_id
from dvit_infer.images.decode import open_image
from dvit_infer.images.preprocess import Preprocess

pytestmark = pytest.mark.usefixtures("_empty_folder")
CROP = Preprocess((64, 64))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return dvit.convert(checkpoint, device="cpu", **SIZE)


@pytest.fixture
def photos(_empty_folder) -> list[str]:
    """Seven images and, in their midst and at their end, two that cannot be read."""
    paths = draw_all(Path("photos"), 7)
    write_text(Path("photos/003.text.jpg"))
    write_cut(Path("photos/z.jpg"))
    return paths


def written(engine, out: str = "emb", images="photos", **options) -> dict[str, bytes]:
    dvit.embed(engine, images, out, **{"batch": 3, "workers": 0, **options})
    return content(out)


def content(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def test_rows_are_the_features_of_their_images(engine, photos, checkpoint):
    done = []
    found = dvit.embed(engine, "photos", "emb", batch=3, workers=0, progress=done.append)
    images = torch.stack([torch.from_numpy(CROP(open_image(path))) for path in photos])
    named, rows = lines(Path("emb", IMAGES).read_text()), np.load(f"emb/{FEATURES}", mmap_mode="r")
    assert [line["image"] for line in named] == sorted([*photos, "photos/003.text.jpg", "photos/z.jpg"])
    readable = [at for at, line in enumerate(named) if "error" not in line]
    assert [named[at]["image"] for at in readable] == photos
    assert (rows.shape, rows.dtype) == ((9, 64), np.float32)
    np.testing.assert_allclose(rows[readable], engine.features(images), atol=1e-5)
    assert np.isnan(np.delete(rows, readable, axis=0)).all()
    assert found.failed == tuple((line["image"], line["error"]) for line in named if "error" in line)
    assert (found.images, found.resumed, found.rates.images, done) == (9, 0, 9, [0, 3, 3, 3])
    index = json.loads(Path("emb", INDEX).read_text())
    assert index["model"] == model_id(engine, checkpoint, CROP)
    expected = {"pool": "own", "normalize": False, "dtype": "float32", "dim": 64, "batch": 3, "images": 9}
    assert index | expected | {"complete": True} == index


def test_pooling_and_what_is_stored(engine, photos):
    images = torch.stack([torch.from_numpy(CROP(open_image(path))) for path in photos])
    tokens, _ = engine.tokens(images)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    readable = [0, 1, 2, 3, 5, 6, 7]
    for pool, expected in (("cls", cls), ("mean", mean), ("cls_mean", torch.cat([cls, mean], dim=1))):
        written(engine, pool, pool=pool, normalize=True, store="float16")
        rows = np.load(f"{pool}/{FEATURES}")
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows[readable], expected / expected.norm(dim=1, keepdim=True), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "pool", "found"),
    [
        ("deit", "map", "deit has no attention pooling; it has own, cls, mean, cls_mean"),
        ("siglip", "map", "own"),
        ("siglip", "cls_mean", "siglip has no class token; it has own, mean, map"),
        ("map-all", "cls", "cls"),
        ("headless-mean", "max", "headless-mean does not know 'max'; it has own, mean"),
    ],
)
def test_poolings_that_a_model_has(kind, pool, found):
    if " " not in found:
        assert checked_pool(tiny(kind).config, pool) == found
    else:
        with pytest.raises(dvit.InputError, match=rf"^pool: {found}$"):
            checked_pool(tiny(kind).config, pool)


@pytest.mark.parametrize("kind", ["clip", "dinov2-registers"])
def test_a_model_without_classifier_gives_its_embedding(kind):
    model = tiny(kind)
    engine, images = model.engine(), model.images(2)
    assert torch.equal(pooled(engine, images, "own", False), engine(images))
    tokens, _ = engine.tokens(images)
    prefix = model.config.body.num_prefix
    assert torch.equal(pooled(engine, images, "mean", False), tokens[:, prefix:].mean(dim=1))


def test_wherever_it_was_stopped_the_bytes_are_the_same(engine, photos):
    whole = written(engine)
    ends = [at + 1 for at, byte in enumerate(whole[IMAGES]) if byte == 10]
    for cut in (0, 5, ends[0], ends[2] - 1, ends[2], ends[4] + 3, ends[5], ends[7] + 9, ends[8]):
        kept = sum(end <= cut for end in ends)
        index = json.loads(whole[INDEX]) | {"complete": False}
        Path("emb", INDEX).write_text(json.dumps(index))
        Path("emb", IMAGES).write_bytes(whole[IMAGES][:cut])
        rows = np.load(f"emb/{FEATURES}", mmap_mode="r+")
        rows[kept:] = 7  # what a killed run had there
        found = dvit.embed(engine, "photos", "emb", workers=0)  # the folder knows the batch
        assert (found.resumed, len(found.failed)) == (kept if kept == 9 else kept - kept % 3, 2)
        assert content("emb") == whole
    for name in (FEATURES, INDEX):  # of a run that had only begun
        shutil.copytree("emb", "begun")
        Path("begun", IMAGES).write_bytes(b"")
        Path("begun", FEATURES).unlink()
        Path("begun", name).unlink(missing_ok=True)
        assert written(engine, "begun") == whole
        shutil.rmtree("begun")


def test_images_are_added_behind_the_others_only(engine, photos):
    draw_all(Path("more"), 4, 20)
    whole = written(engine, "whole", ["photos", "more"])
    written(engine)
    assert written(engine, images=["photos", "more"]) == whole
    for change, why in {
        lambda: draw_all(
            Path("photos"), 1, 8
        ): "line 9 is 'photos/z.jpg', where 'photos/008.webp' is found now; rows keep",
        Path("photos/008.webp").unlink: None,
        Path("more/023.webp").unlink: "line 13 is 'more/023.webp', but only 12 images are found now",
    }.items():
        change()
        if why is None:
            continue
        with pytest.raises(dvit.InputError, match=why):
            dvit.embed(engine, ["photos", "more"], "emb", workers=0)
        assert content("emb") == whole


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool": "cls"}, "pool is own there, cls in this run"),
        ({"normalize": True}, "normalize is false there, true in this run"),
        ({"store": "float16"}, "dtype is float32 there, float16"),
        ({"batch": 4}, r"batch is 3 there, 4 in this run \(the last digits .* without --batch"),
        ({"preprocess": Preprocess((64, 64), 0.9)}, "preprocess is 64x64, crop 0.875 there, 64x64, crop 0.9"),
        ({"preprocess": Preprocess((64, 64), 0.875, "center_floor")}, "model is .* there"),
        ({"keep_rate": 0.5}, "reduction is predictor 0.7: 11,7,5 of 16 there, predictor 0.5"),
        ({"dtype": "bfloat16"}, "precision is float32 there, bfloat16"),
        ({"image_size": 96}, "reduction is .* there"),
        ({"assume": {"num_heads": 2, "std": (0.5, 0.5, 0.5)}}, "std is"),
        ({"assume": {"num_heads": 4}}, r"model is .*@.* there, .*@.* in this run \(its weights differ, or facts given"),
    ],
)
def test_another_embedding_is_refused(options, named, engine, checkpoint):
    draw_all(Path("photos"), 2)
    before = written(engine)
    of_model = {"keep_rate", "dtype", "image_size", "assume"} & set(options)
    other = dvit.convert(checkpoint, device="cpu", **SIZE | options) if of_model else engine
    given = {} if of_model else options
    with pytest.raises(dvit.InputError, match=rf"^out: .*/emb: {named}.*; choose another folder$"):
        written(other, **given)
    assert content("emb") == before


def test_folders_of_something_else_are_left_alone(engine, photos):
    whole = written(engine)
    for name, other, why in (
        ("notes.txt", b"x", None),  # beside an index, it is nobody's business
        (INDEX, None, r"emb: has other files, and no index\.json"),
        (INDEX, b"{", "is damaged"),
        (INDEX, b"[]", "is no index of dvit-embed"),
        (INDEX, b'{"version": 9}', "is of version 9, not 1"),
        (IMAGES, b"[1]\n", r"images\.jsonl: line 1 is none of dvit-embed"),
        (IMAGES, whole[IMAGES] + b"my notes\n", "line 10 is none of dvit-embed"),
        (FEATURES, None, r"features\.npy: No such file"),
        (FEATURES, whole[FEATURES][:600], r"features\.npy: is damaged \(.*; delete the folder"),
        (FEATURES, b"", r"features\.npy: is damaged"),
    ):
        path = Path("emb", name)
        path.unlink(missing_ok=True)
        if other is not None:
            path.write_bytes(other)
        before = content("emb")
        if why is None:
            written(engine)
        else:
            with pytest.raises(dvit.InputError, match=why):
                written(engine)
        assert content("emb") == before
        Path("emb", name).write_bytes(whole.get(name, b""))
    np.save(f"emb/{FEATURES}", np.zeros((9, 3), np.float32))
    with pytest.raises(dvit.InputError, match=r"holds float32 of shape \(9, 3\); float32 of shape \(9, 64\)"):
        written(engine)
    Path("file").touch()
    for out, why in (("file", "is no folder"), ("none/emb", "there is no folder"), ("photos", "has other files")):
        with pytest.raises(dvit.InputError, match=why):
            written(engine, out)
    assert not (Path("photos") / IMAGES).exists()


def test_two_runs_do_not_write_to_one_folder(engine, photos):
    fcntl = pytest.importorskip("fcntl")
    before = written(engine)
    with open(f"emb/{IMAGES}", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(dvit.InputError, match="another run writes to it"):
            written(engine)
    assert content("emb") == before


def test_a_full_disk_is_said_before_the_work_and_leaves_nothing(engine):
    resource = pytest.importorskip("resource")
    draw_all(Path("photos"), 3)
    images = ["photos"] * 200  # as many rows take 150 KiB
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    done = []
    try:
        with pytest.raises(dvit.InputError, match=rf"^out: .*/{FEATURES}: File too large \(.*ulimit -f\)$"):
            dvit.embed(engine, images, "emb", workers=0, progress=done.append)
        assert not Path("emb").exists()
        first = written(engine)
        with pytest.raises(dvit.InputError, match="File too large"):  # nor can a folder grow
            dvit.embed(engine, images, "emb", workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not done
    assert written(engine) == first


def test_an_error_keeps_what_is_done_and_nothing_keeps_no_folder(engine, photos):
    def stop(images: int, after: int) -> None:
        stopped.append(images)
        if len(stopped) > after:
            raise KeyboardInterrupt

    whole = written(engine, "whole")
    for after, rows in ((0, None), (1, 3), (1, 6)):
        stopped: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            dvit.embed(engine, "photos", "emb", batch=3, workers=0, progress=lambda n, after=after: stop(n, after))
        assert Path("emb").exists() == (rows is not None)
        assert rows is None or Path("emb", IMAGES).read_bytes().count(b"\n") == rows
    assert written(engine) == whole


def test_outputs_that_are_not_finite_or_do_not_fit_have_no_row(checkpoint, monkeypatch):
    draw_all(Path("photos"), 3)
    engine = dvit.convert(checkpoint, device="cpu", **SIZE)
    features = engine.features
    scales = torch.tensor([1.0, torch.inf, 1e6])[:, None]
    monkeypatch.setattr(engine, "features", lambda images: features(images) * scales)
    written(engine, store="float16")
    errors = [line.get("error") for line in lines(Path("emb", IMAGES).read_text())]
    assert errors == [
        None,
        "the model's output in float32 is NaN or Inf",
        "a feature is over float16's range; float32 holds it",
    ]
    assert np.isnan(np.load(f"emb/{FEATURES}")).all(axis=1).tolist() == [False, True, True]


def test_images_in_archives(engine, photos):
    with tarfile.open("a.tar.gz", "w:gz") as tar:
        tar.add("photos")
    written(engine)
    written(engine, "packed", "a.tar.gz")
    order = {
        line["image"].removeprefix("a.tar.gz/"): at for at, line in enumerate(lines(Path("packed", IMAGES).read_text()))
    }
    rows = np.load(f"packed/{FEATURES}")[[order[line["image"]] for line in lines(Path("emb", IMAGES).read_text())]]
    np.testing.assert_allclose(rows, np.load(f"emb/{FEATURES}"), atol=1e-5)


def test_bad_arguments(engine, photos):
    for options, why in (
        ({"store": "float64"}, "store: 'float64' is not one of float32, float16"),
        ({"batch": 0}, "batch: 0"),
        ({"workers": -1}, "workers: -1"),
        ({"images": "none"}, "none: there is no such"),
    ):
        with pytest.raises(dvit.InputError, match=why):
            written(engine, **options)
    assert not Path("emb").exists()
