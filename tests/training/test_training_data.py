"""Training images: what is drawn at random follows from seed, epoch and image, however the work is shared out."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import draw_all, write_text

import dvit_infer as dvit
from dvit_infer.training import data
from dvit_infer.training.augment import Augmentation
from dvit_infer.training.data import Batch, ImageFiles, Loading, batches, mixed, steps_an_epoch, targets

COUNT = 19
AUGMENT = Augmentation((16, 24))
MIXING = Loading(8, seed=5, mixup=0.8, cutmix=1.0, noise=(2, 6))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return draw_all(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def image_files(paths):
    """The label of each is its index."""
    return ImageFiles((path, index) for index, path in enumerate(paths))


def by_image(parts: list[Batch]) -> dict[int, tuple[np.ndarray, ...]]:
    """Everything that a batch says of each image, what it becomes and what is to be learned from it included."""
    found = {}
    for part in parts:
        images = mixed(part.images.float(), part)
        wanted = targets(part, COUNT, 0.1)
        for i, label in enumerate(part.labels.tolist()):
            of_image = (part.images[i], part.weights[i], part.noise[:, i], part.share[i], part.boxes[i])
            assert label not in found
            found[label] = tuple(x.numpy() for x in (*of_image, images[i], wanted[i]))
    return found


def assert_same(a: dict[int, tuple[np.ndarray, ...]], b: dict[int, tuple[np.ndarray, ...]]) -> None:
    assert a.keys() == b.keys()
    for label, values in a.items():
        for ours, theirs in zip(values, b[label], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def order(image_files: ImageFiles, loading: Loading, epoch: int = 0) -> list[int]:
    return [label for part in batches(image_files, AUGMENT, loading, epoch) for label in part.labels.tolist()]


def test_the_order_is_another_permutation_every_epoch(image_files):
    every = Loading(COUNT, seed=3)
    first = order(image_files, every)
    assert sorted(first) == list(range(COUNT)) != first
    assert first == order(image_files, every)
    assert (
        len({tuple(first), tuple(order(image_files, every, 1)), tuple(order(image_files, Loading(COUNT, seed=4)))}) == 3
    )
    assert order(image_files, Loading(8, seed=3)) == first[:16]  # what is left over is dropped
    assert steps_an_epoch(image_files, Loading(8)) == 2


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_what_a_image_draws_differs_between_epochs_and_seeds(image_files, seed):
    loading = dataclasses.replace(MIXING, seed=seed)
    one = by_image(list(batches(image_files, AUGMENT, loading, 0)))
    others = [by_image(list(batches(image_files, AUGMENT, loading, 1)))]
    others.append(by_image(list(batches(image_files, AUGMENT, dataclasses.replace(loading, seed=seed // 2 + 1), 0))))
    for other in others:
        for label in one.keys() & other.keys():
            assert not np.array_equal(one[label][0], other[label][0])
            assert not np.array_equal(one[label][2], other[label][2])


@pytest.mark.parametrize(
    ("world", "accumulate", "workers"), [(1, 2, 0), (1, 4, 2), (2, 1, 0), (2, 2, 2), (4, 1, 0), (1, 1, 2)]
)
def test_however_the_work_is_shared_out(image_files, world, accumulate, workers):
    whole = list(batches(image_files, AUGMENT, MIXING, 2))
    expected = by_image(whole)
    assert any(0 < values[3] < 1 for values in expected.values())
    shared = dataclasses.replace(MIXING, world=world, accumulate=accumulate, workers=workers)
    assert shared.part == 8 // (world * accumulate)
    ranks = [list(batches(image_files, AUGMENT, dataclasses.replace(shared, rank=rank), 2)) for rank in range(world)]
    assert_same(by_image([part for parts in ranks for part in parts]), expected)
    for step in range(2):  # a step has the same images, in the same order if its parts are laid side by side
        turns = range(step * accumulate, (step + 1) * accumulate)
        labels = [label for turn in turns for parts in ranks for label in parts[turn].labels.tolist()]
        assert labels == whole[step].labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_in_its_middle(image_files, workers):
    loading = dataclasses.replace(MIXING, batch=4, accumulate=2, workers=workers)
    whole = list(batches(image_files, AUGMENT, loading, 1))
    assert len(whole) == 8
    for step in (1, 3, 4):
        rest = list(batches(image_files, AUGMENT, loading, 1, step))
        assert [part.labels.tolist() for part in rest] == [part.labels.tolist() for part in whole[2 * step :]]
        assert_same(by_image(rest), by_image(whole[2 * step :]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_image_that_cannot_be_read(paths, image_files, tmp_path, workers):
    loading = dataclasses.replace(MIXING, workers=workers)
    before = list(batches(image_files, AUGMENT, loading, 0))
    bad, partner = before[0].labels.tolist()[3], before[0].labels.tolist()[2]
    text = str(write_text(tmp_path / "bad.jpg"))
    broken = ImageFiles((text if index == bad else path, index) for index, path in enumerate(paths))
    after = list(batches(broken, AUGMENT, loading, 0))
    assert [path for path, _ in after[0].unreadable] == [text]
    assert "is not a readable image" in after[0].unreadable[0][1]
    assert before[0].unreadable == after[1].unreadable == []
    was, now = by_image(before), by_image(after)
    assert now[bad][1] == 0
    assert not now[bad][0].any()
    for label in (bad, partner):
        assert now[label][3] == 1
        assert not now[label][4].any()
    np.testing.assert_array_equal(now[partner][5], was[partner][0])
    for label in (bad, partner):
        np.testing.assert_array_equal(now.pop(label)[2], was.pop(label)[2])
    assert_same(now, was)


def test_no_two_generators_are_the_same(image_files):
    maker = data._Maker(image_files, AUGMENT, Loading(8, seed=5), 2)
    purposes = (data._AUGMENT, data._NOISE, data._MIX)
    drawn = {maker._generator(index, purpose).random() for index in range(COUNT) for purpose in purposes}
    drawn.add(np.random.Generator(np.random.PCG64([5, 2])).random())  # the order's
    assert len(drawn) == 3 * COUNT + 1


def test_batches_leave_the_process_as_it_was(image_files):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 2):
        part = next(batches(image_files, AUGMENT, dataclasses.replace(MIXING, workers=workers), 0))
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert (part.images.shape, part.images.dtype) == ((8, 3, 16, 24), torch.uint8)
    assert (part.labels.dtype, part.boxes.dtype) == (torch.int64, torch.int64)
    assert (part.weights.dtype, part.share.dtype, part.noise.dtype) == (torch.float32,) * 3
    assert (part.noise.shape, part.boxes.shape) == ((2, 8, 6, 2), (8, 4))


def test_noise_is_gumbel(image_files):
    part = next(batches(image_files, AUGMENT, Loading(16, noise=(3, 2000)), 0))
    assert part.noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert part.noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.03)
    flat = part.noise.flatten()
    assert torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1].abs() < 0.01
    assert next(batches(image_files, AUGMENT, Loading(16), 0)).noise.numel() == 0


def parts_of(image_files: ImageFiles, **mixing: float) -> list[Batch]:
    loading = Loading(18, seed=1, **mixing)  # type: ignore[arg-type]
    return [part for epoch in range(6) for part in batches(image_files, Augmentation((20, 30)), loading, epoch)]


def test_mixup(image_files):
    for part in parts_of(image_files, mixup=0.8):
        assert not part.boxes.any()
        assert torch.equal(part.share[::2], part.share[1::2])
        assert ((part.share >= 0) & (part.share <= 1)).all()
        images = part.images.double()
        swapped = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        share = part.share.double().view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed(images, part), share * images + (1 - share) * swapped)
        assert mixed(part.images.bfloat16(), part).dtype == torch.bfloat16


def test_cutmix(image_files):
    areas = []
    for part in parts_of(image_files, cutmix=1.0):
        assert torch.equal(part.boxes[::2], part.boxes[1::2])
        images = part.images.float()
        out = mixed(images, part)
        for i, (top, left, bottom, right) in enumerate(part.boxes.tolist()):
            assert 0 <= top <= bottom <= 20
            assert 0 <= left <= right <= 30
            area = (bottom - top) * (right - left)
            assert part.share[i].item() == pytest.approx(1 - area / 600)
            assert area or not part.boxes[i].any()
            expected = images[i].clone()
            expected[:, top:bottom, left:right] = images[i ^ 1][:, top:bottom, left:right]
            assert torch.equal(out[i], expected)
            areas.append(area)
    for part in parts_of(image_files, cutmix=0.02):  # the share is close to 0 or 1: whole images are pasted, or nothing
        boxes = part.boxes[part.share == 1]
        assert len(boxes)
        assert not boxes.any()
    assert min(areas) < 60
    assert max(areas) > 300


def test_mixup_and_cutmix_take_turns(image_files):
    parts = parts_of(image_files, mixup=1.0, cutmix=1.0)
    by_cutmix = torch.cat([part.boxes for part in parts])[::2].any(1).float().mean().item()
    assert 0.25 < by_cutmix < 0.75  # of 54 pairs
    plain = parts_of(image_files)
    assert all(torch.equal(part.share, torch.ones(18)) and not part.boxes.any() for part in plain)
    assert torch.equal(mixed(plain[0].images.float(), plain[0]), plain[0].images.float())


def test_targets(image_files):
    part = parts_of(image_files, mixup=0.8, cutmix=1.0)[0]
    wanted = targets(part, COUNT, 0.1)
    assert wanted.dtype == torch.float32
    torch.testing.assert_close(wanted.sum(1), torch.ones(18))
    off, on = 0.1 / COUNT, 0.9 + 0.1 / COUNT
    for i, label in enumerate(part.labels.tolist()):
        share, expected = part.share[i].item(), torch.full((COUNT,), off)
        expected[label] = on * share + off * (1 - share)
        expected[int(part.labels[i ^ 1])] = on * (1 - share) + off * share
        torch.testing.assert_close(wanted[i], expected)
    plain = parts_of(image_files)[0]
    assert torch.equal(targets(plain, COUNT, 0.0), torch.eye(COUNT)[plain.labels])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch: 0 "),
        ({"batch": -4}, "batch: -4 "),
        ({"accumulate": 0}, "accumulate: 0 "),
        ({"batch": 10, "world": 4}, "batch: 10 images a step cannot be shared by 4 processes; use a multiple of 4$"),
        ({"batch": 8, "world": 2, "accumulate": 3}, "accumulate: the 4 images of a process .* 3 parts"),
        ({"batch": 12, "world": 2, "accumulate": 2, "mixup": 0.8}, "batch: .* cannot be mixed in pairs; "),
        ({"batch": 9, "cutmix": 1.0}, "batch: .* cannot be mixed in pairs; "),
        *(({"mixup": value}, "mixup: ") for value in (-0.1, float("nan"), float("inf"))),
        *(({"cutmix": value}, "cutmix: ") for value in (-1, float("nan"), float("inf"))),
    ],
)
def test_loadings_that_are_not_possible(wrong, message):
    with pytest.raises(dvit.InputError, match=f"^{message}") as caught:
        Loading(**{"batch": 8, **wrong})
    assert "\n" not in str(caught.value)


def test_too_few_images(image_files):
    for wrong in (
        lambda: steps_an_epoch(image_files, Loading(20)),
        lambda: next(batches(image_files, AUGMENT, Loading(20), 0)),
    ):
        with pytest.raises(dvit.InputError, match=r"^batch: 19 images are fewer than a batch of 20$"):
            wrong()
    assert Loading(9).part == 9  # an odd number, where nothing is mixed


def test_images_keep_what_they_are_given():
    entries = [("a/ü.jpg", 3), (os.fsdecode(b"\xff\xe4.png"), 0), ("日本/x.webp", 999), ("a", 3)]
    kept = ImageFiles(iter(entries))
    assert [kept[index] for index in range(len(kept))] == entries
    assert len(ImageFiles([])) == 0
    digest = kept.digest
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    assert ImageFiles(entries).digest == digest
    others = [entries[::-1], entries[:3], [*entries[:3], ("a", 4)], [*entries[:3], ("b", 3)], [("a", 0), ("bc", 0)]]
    others.append([("ab", 0), ("c", 0)])
    assert len({digest, *(ImageFiles(other).digest for other in others)}) == 7


def test_a_folder_of_images_that_vanish(tmp_path: Path):
    paths = draw_all(tmp_path, 4)
    image_files = ImageFiles((path, index) for index, path in enumerate(paths))
    for path in paths:
        os.remove(path)
    part = next(batches(image_files, AUGMENT, Loading(4, mixup=0.8), 0))
    assert not part.weights.any()
    assert sorted(path for path, _ in part.unreadable) == paths


def test_the_digest_does_not_depend_on_where_the_folder_is():
    here, there = (ImageFiles([(f"{folder}/a/1.png", 0)], folder) for folder in ("/data", "elsewhere/data"))
    assert here.digest == there.digest
    assert (here[0], there[0]) == (("/data/a/1.png", 0), ("elsewhere/data/a/1.png", 0))
    assert here.digest == ImageFiles([("/data/a/1.png", 0)], "/data/").digest
    assert here.digest != ImageFiles([("/data/b/1.png", 0)], "/data").digest
