"""Panels of what a reduction left: regions of merged patches, EViT's fused tokens, and which stages are drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from any_vit import tiny
from PIL import Image

import dvit_infer as dvit
from dvit_infer.config import Reduction, Stage
from dvit_infer.evaluate.panels import OUTLINE, draw_regions
from dvit_infer.evaluate.visualize import draw_heat_map, draw_kept, drawn_stages, keep_shares, look

PATCH = 8


def image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 200, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def patches(source: Image.Image) -> np.ndarray:
    """(rows, columns, pixels, 3)."""
    return np.asarray(source).reshape(4, PATCH, 6, PATCH, 3).swapaxes(1, 2).reshape(4, 6, PATCH * PATCH, 3)


def engine_of(method: str) -> dvit.Engine:
    return tiny("deit", method).engine(backend="torch")


def batch(*seeds: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image(seed)) for seed in seeds])).permute(0, 3, 1, 2)


def test_merged_patches_have_the_mean_of_their_region_and_others_their_pixels():
    groups = np.arange(24).reshape(4, 6)
    groups[1, 1], groups[3, 5], groups[0, 1] = 0, 0, 0  # three more patches, not all of them neighbours
    drawn, own = patches(draw_regions(image(), groups)), patches(image())
    inside = (np.arange(64) % PATCH < PATCH - 1) & (np.arange(64) // PATCH < PATCH - 1)
    region = [(0, 0), (1, 1), (3, 5), (0, 1)]
    mean = np.mean([own[place] for place in region], axis=(0, 1)).round()
    for row in range(4):
        for column in range(6):
            expected = mean if (row, column) in region else own[row, column][inside]
            np.testing.assert_array_equal(drawn[row, column][inside], np.broadcast_to(expected, (49, 3)))


def test_outlines_stand_between_tokens_alone():
    groups = np.arange(24).reshape(4, 6)
    groups[0, 1] = 0
    drawn = np.asarray(draw_regions(image(), groups))
    line = (drawn == OUTLINE).all(axis=-1)
    assert not line[: PATCH - 1, PATCH - 1].any()  # within a region
    assert line[:PATCH, 2 * PATCH - 1].all()
    assert line[PATCH - 1].all()
    assert not line[-1, : PATCH - 1].any()  # at the edge of the image
    one = np.asarray(draw_regions(image(), np.zeros((4, 6), int)))
    assert len(np.unique(one.reshape(-1, 3), axis=0)) == 1


def test_regions_are_the_engines_groups():
    engine = engine_of("tome")
    images = batch(0, 1, 2)
    seen = look(engine, [images[:1], images[1:]])
    _, kept = engine(images, return_kept=True)
    assert [one.kept for one in seen] == [()] * 3
    for place, one in enumerate(seen):
        for groups, stage in zip(one.groups, kept, strict=True):
            np.testing.assert_array_equal(groups.flatten(), stage[place])
    assert draw_kept(engine, [image(0), image(1)]).size[0] > 3 * 160


def test_a_heat_map_of_merging_sums_to_the_tokens_that_are_left():
    engine = engine_of("tome")
    images = batch(0, 1, 2)
    shares, count = keep_shares(engine, [images])
    assert count == 3
    np.testing.assert_allclose(shares.sum(axis=(1, 2)), engine.config.num_keep)
    groups = engine(images, return_kept=True)[1][0]
    sizes = [[(row == label).sum() for label in row] for row in groups]
    np.testing.assert_allclose(shares[0].flatten(), (1 / np.array(sizes)).mean(axis=0))
    assert draw_heat_map(engine, [image(0)]).mode == "RGB"


def test_fused_tokens_are_no_places():
    model = tiny("deit", "evit")
    engine = model.engine(backend="torch")
    chosen = torch.arange(24).repeat(2, 1)
    first = chosen[:, : model.config.num_keep[0]]
    count = model.config.num_keep[1]
    second = torch.cat([first[:, : count - 1], torch.full((2, 1), 24)], dim=1)  # the fused token stays
    call = type(engine).__call__

    class Given(type(engine)):
        def __call__(self, images, **options):
            return call(self, images, **{**options, "kept": [stage[: len(images)] for stage in (first, second)]})

    engine.__class__ = Given
    seen = look(engine, [batch(0, 1)])
    assert [stage.sum() for stage in seen[0].kept] == [len(first[0]), count - 1]
    assert seen[0].groups == ()
    shares, _ = keep_shares(engine, [batch(0, 1)])
    assert shares[1].sum() == count - 1
    draw_kept(engine, [image()])


@pytest.mark.parametrize(
    ("count", "drawn"),
    [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (7, [1, 3, 4, 6]), (12, [2, 5, 8, 11])],
)
def test_which_stages_are_drawn(count, drawn):
    config = tiny("deit").config
    stages = tuple(Stage(block, 24 - block, "after_attention") for block in range(count))
    reduction = Reduction("tome", stages, (("merge", 1),), 24, merges=True)
    assert drawn_stages(replace(config, reduction=reduction)) == drawn


def test_a_model_that_merges_nothing():
    model = tiny("deit")
    config = replace(model.config, reduction=Reduction("tome", (), (("merge", 0),), 24, merges=True))
    engine = replace(model, config=config).engine(backend="torch")
    with pytest.raises(dvit.InputError, match=r"^merge: no block merges any, so deit keeps every patch"):
        draw_kept(engine, [image()])
