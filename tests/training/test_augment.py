"""Augmentation: crops inside the image, seeded draws, torchvision where it is there."""

import numpy as np
import pytest
import torch
from drawn import draw, draw_all
from PIL import Image

import dvit_infer as dvit
from dvit_infer.images.decode import open_image
from dvit_infer.training import augment
from dvit_infer.training.augment import Augmentation, has_torchvision

COUNT = 19


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return draw_all(tmp_path_factory.mktemp("images"), COUNT)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(60, 45), (500, 20), (20, 500), (1, 1), (3, 2)])
def test_crops_are_inside(size):
    width, height = size
    shares = []
    for seed in range(200):
        left, top, right, bottom = augment._crop(width, height, 0.3, rng(seed))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (width * height))
        if min(size) > 15:
            assert 0.7 < (right - left) / (bottom - top) < 1.4
    if size == (60, 45):
        assert 0.27 < min(shares) < 0.35
        assert max(shares) > 0.9


def test_crops_are_seeded():
    image = draw(4)
    plain = Augmentation((16, 24), randaugment=0, erase=0)
    one = plain(image, rng(1))
    assert (one.shape, one.dtype, one.flags.c_contiguous) == ((3, 16, 24), np.uint8, True)
    np.testing.assert_array_equal(one, plain(image, rng(1)))
    assert not np.array_equal(one, plain(image, rng(2)))


def test_flips_mirror():
    image = draw(4)
    for scale in (0.08, 1.0):
        there = Augmentation((16, 24), scale, flip=1.0)(image, rng(1))
        np.testing.assert_array_equal(there, Augmentation((16, 24), scale, flip=0.0)(image, rng(1))[:, :, ::-1])


def test_without_crop_and_flip_a_image_is_resized(paths):
    image = open_image(paths[1])
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(Augmentation((16, 24), scale=1, flip=0)(image, rng()), expected)


def test_an_augmentation_says_what_is_done():
    assert str(Augmentation((8, 8), torchvision=True)) == (
        "random resized crop from 8%, flip, RandAugment 9, erasing 0.25 (torchvision)"
    )
    assert str(Augmentation((8, 8))).startswith("random resized crop from 8%, flip (torchvision ")
    assert "no RandAugment 9" in str(Augmentation((8, 8)))
    for torchvision in (False, True):
        nothing = Augmentation((8, 8), 1, 0, randaugment=0, erase=0, torchvision=torchvision)
        assert str(nothing) == "the whole image"
    assert str(Augmentation((8, 8), 0.005, randaugment=0, erase=0)) == "random resized crop from 0.5%, flip"


@pytest.mark.skipif(not has_torchvision(), reason="torchvision that fits this torch is not there")
@pytest.mark.parametrize("scale", [0.08, 1.0])
def test_torchvision_draws_from_the_generator_it_is_given(scale):
    image, wanted = draw(4, 90, 70), Augmentation((64, 48), scale, torchvision=True)
    state = torch.get_rng_state()
    made = [wanted(image, rng(seed)) for seed in range(20)]
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    for seed, one in enumerate(made):
        assert (one.shape, one.dtype, one.flags.c_contiguous) == ((3, 64, 48), np.uint8, True)
        np.testing.assert_array_equal(one, wanted(image, rng(seed)))
    assert len({one.tobytes() for one in made}) == 20
    erased = Augmentation((64, 48), 1, 0, randaugment=0, erase=1, fill=(1, 2, 3), torchvision=True)(image, rng(3))
    hidden = (erased == np.array([1, 2, 3], np.uint8)[:, None, None]).all(0)
    assert 0.02 < hidden.mean() < 0.34
    kept = Augmentation((64, 48), 1, 0, randaugment=0, erase=0)(image, rng())
    np.testing.assert_array_equal(erased[:, ~hidden], kept[:, ~hidden])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scale", value) for value in (0, -1, 1.01, float("nan"))),
        *(("flip", value) for value in (-0.1, 1.1, float("nan"))),
        *(("erase", value) for value in (-0.1, 2, float("inf"), float("nan"))),
        *(("randaugment", value) for value in (-1, 31, float("nan"))),
    ],
)
def test_augmentations_out_of_range(name, value):
    with pytest.raises(dvit.InputError, match=f"^{name}: [^\n]*$"):
        Augmentation((8, 8), **{name: value})
