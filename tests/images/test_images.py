"""One image: every kind that a folder may hold, and what a model gets to see of it."""

import os
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from drawn import draw, write_cut, write_text
from golden_cases import official_checkpoint
from PIL import Image

import dvit_infer as dvit
from dvit_infer.config import Config, Reduction
from dvit_infer.images.decode import MAX_PIXELS, ImageFileError, open_image
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.models.preprocessing import preprocess_for


def fails(path) -> str:
    """Reading it has to fail, in one line that names it, without a warning. Returns why."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageFileError) as caught:
            open_image(path)
    assert str(caught.value) == f"{path}: {caught.value.why}"
    assert "\n" not in caught.value.why
    return caught.value.why


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "jp2"])
def test_lossless_formats_give_their_pixels(suffix, tmp_path):
    path, image = tmp_path / f"a.{suffix}", draw(0)
    image.save(path)
    found = open_image(path)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


def test_transparency_is_dropped_as_convert_does(tmp_path):
    image = draw(0)
    see_through = image.copy()
    see_through.putalpha(40)
    see_through.save(tmp_path / "rgba.png")
    see_through.convert("LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "rgba.png")), np.asarray(image))
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "la.png")), np.stack([grey] * 3, axis=2))


def test_palette_with_transparency(tmp_path):
    image = draw(0).quantize(16)
    image.save(tmp_path / "p.png", transparency=bytes(range(0, 160, 10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_image(tmp_path / "p.png")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_cmyk(tmp_path):
    image = draw(0).convert("CMYK")
    image.save(tmp_path / "cmyk.jpg", quality=98)
    error = np.asarray(open_image(tmp_path / "cmyk.jpg")).astype(int) - np.asarray(image.convert("RGB"))
    assert np.abs(error).mean() < 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(suffix, tmp_path):
    wide = np.linspace(0, 65535, 60 * 45).reshape(45, 60)
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / f"16.{suffix}")
    grey = np.round(wide.astype(np.uint16) / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"16.{suffix}")), np.stack([grey] * 3, axis=2))


def test_32_bits_are_refused_as_floating_point_is(tmp_path):
    for white in (255, 65535, 65536):
        Image.fromarray(np.full((4, 4), white, np.int32)).save(tmp_path / "wide.tif")
        assert "32-bit samples, or signed ones, of which nothing says what white is" in fails(tmp_path / "wide.tif")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    assert "floating point" in fails(tmp_path / "float.tif")


def test_the_first_frame_of_an_animation(tmp_path):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    for suffix in ("gif", "png"):
        first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=[second], duration=9)
        with Image.open(tmp_path / f"moving.{suffix}") as image:
            assert image.n_frames == 2
        assert open_image(tmp_path / f"moving.{suffix}").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_turned_as_its_exif_says(orientation, suffix, tmp_path):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, 5] = (255, 0, 0), (0, 255, 0)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, 3),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / f"a.{suffix}", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"a.{suffix}")), upright)


def test_broken_exif_does_not_spoil_the_image(tmp_path):
    draw(0).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert open_image(tmp_path / "a.png").size == (60, 45)


def test_1x1(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert open_image(tmp_path / "dot.png").size == (1, 1)
    seen = Preprocess((32, 48))(open_image(tmp_path / "dot.png"))
    assert seen.shape == (3, 32, 48)
    assert (seen == np.array([9, 8, 7])[:, None, None]).all()


def test_what_is_no_image(tmp_path):
    assert "is not a readable image" in fails(write_text(tmp_path / "text.jpg"))
    (tmp_path / "empty.jpg").touch()
    assert "is not a readable image" in fails(tmp_path / "empty.jpg")
    assert "No such file" in fails(tmp_path / "none.jpg")
    assert "not a regular file" in fails(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in fails(tmp_path / "pipe.jpg")
    page = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "page.jpg").write_text(page)  # Pillow would start Ghostscript
    assert "is not a readable image" in fails(tmp_path / "page.jpg")


def test_images_cut_short(tmp_path):
    assert "truncated" in fails(write_cut(tmp_path / "cut.jpg"))
    for suffix in ("png", "gif", "webp", "bmp", "tif"):
        path = tmp_path / f"cut.{suffix}"
        draw(0, 90, 80).save(path)
        path.write_bytes(path.read_bytes()[:-900] if suffix in ("bmp", "tif") else path.read_bytes()[:-60])
        assert fails(path)


def test_damage_anywhere_is_a_image_error(tmp_path):
    """Bytes changed at random: whatever Pillow raises then becomes a ImageFileError, or the image is read."""
    rng, outcomes = np.random.default_rng(0), {True: 0, False: 0}
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif", "jp2"):
        draw(0, 40, 30).save(tmp_path / f"good.{suffix}")
        good = np.frombuffer((tmp_path / f"good.{suffix}").read_bytes(), np.uint8)
        for _ in range(60):
            bad = good.copy()
            places = rng.integers(0, rng.choice([30, 200, len(bad)]), rng.integers(1, 9)) % len(bad)
            bad[places] = rng.integers(0, 256, len(places))
            (tmp_path / "bad").write_bytes(bad.tobytes())
            try:
                open_image(tmp_path / "bad")
                outcomes[True] += 1
            except ImageFileError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 20


def test_decompression_bombs_are_refused_by_their_header(tmp_path, monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    for name, size in {
        "wide": (30_000, 1),
        "high": (1, 20_001),
        "much": (10_000, 9_000),
        "vast": (30_000, 30_000),
    }.items():
        _header_of_png(tmp_path / f"{name}.png", *size)  # nothing behind it: decoding would be an error of another kind
        assert "decompression bomb" in fails(tmp_path / f"{name}.png")
    assert MAX_PIXELS < 10_000 * 9_000
    assert limit == Image.MAX_IMAGE_PIXELS
    Image.new("L", (20_000, 2)).save(tmp_path / "fits.png")
    assert open_image(tmp_path / "fits.png").size == (20_000, 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the process may have lifted Pillow's own limit
    assert "30000x30000 is a decompression bomb" in fails(tmp_path / "vast.png")


def _header_of_png(path, width: int, height: int) -> None:
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = b"IDAT" + zlib.compress(b"")
    chunks = b"".join((len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (header, data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.path.join(tmp_path, os.fsdecode(b"\xff\xfe.png"))
    draw(0).save(os.fsencode(path))
    assert open_image(path).size == (60, 45)


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (100, 37), (33, 260), (1, 1), (257, 256)])
def test_crops_are_torchvisions(size, crop_pct):
    image = draw(3, *size)
    side, shorter = 224, int(224 / crop_pct)
    w, h = size  # torchvision.transforms.functional: _compute_resized_output_size, then center_crop
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = shorter, int(shorter * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    top, left = round((new_h - side) / 2.0), round((new_w - side) / 2.0)
    expected = image.resize((new_w, new_h), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    found = Preprocess((side, side), crop_pct)(image)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, (3, side, side), True)
    np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))


def test_crops_that_are_not_square_cover_both_sides():
    image = Image.new("RGB", (400, 400), "white")
    image.paste("black", (0, 0, 400, 100))  # the upper quarter
    found = np.asarray(Preprocess((96, 192), 1.0).crop(image))
    assert found.shape == (96, 192, 3)
    assert found[4:].min() == 255  # scaled to 192x192, of which rows 48 to 143 are kept: just below the black
    assert np.asarray(Preprocess((96, 96), 1.0).crop(image))[:20].max() == 0


@pytest.mark.parametrize("name", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_squashing_keeps_everything_and_crops_what_is_asked(name):
    image, by = draw(0, 100, 30), Image.Resampling[name.upper()]
    whole = np.asarray(Preprocess((96, 64), 1.0, "squash", name).crop(image))
    np.testing.assert_array_equal(whole, np.asarray(image.resize((64, 96), by)))
    found = Preprocess((224, 224), 0.875, "squash", name).crop(image)  # transformers' DeiT: 256x256, of which 224x224
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.resize((256, 256), by).crop((16, 16, 240, 240))))


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 251), (100, 37), (257, 256), (640, 427)])
def test_a_margin_is_halved_as_its_owner_does(size, name):
    """transformers' `center_crop` rounds down; torchvision's rounds a half to the even number."""
    image = draw(3, *size)
    width, height = (256 * size[0] // min(size), 256 * size[1] // min(size))
    resized = image.resize((width, height), Image.Resampling[name.upper()])
    for mode, half in (("center", lambda margin: round(margin / 2)), ("center_floor", lambda margin: margin // 2)):
        left, top = half(width - 224), half(height - 224)
        found = np.asarray(Preprocess((224, 224), 0.875, mode, name).crop(image))
        np.testing.assert_array_equal(found, np.asarray(resized.crop((left, top, left + 224, top + 224))))


def test_what_a_preprocessing_says_of_itself():
    assert str(Preprocess((224, 224))) == "224x224, crop 0.875"
    assert str(Preprocess((224, 192), 1.0, "squash", "bilinear")) == "224x192, warped, bilinear"
    assert str(Preprocess((224, 224), 0.875, "squash")) == "224x224, warped, crop 0.875"
    for wrong in ({"crop_mode": "border"}, {"interpolation": "random"}, {"interpolation": 3}):
        with pytest.raises(dvit.InputError, match=f"{next(iter(wrong))}: .* is not one of"):
            Preprocess((224, 224), **wrong)


@pytest.mark.parametrize("size", [(30_000, 1), (1, 5_000), (20_000, 4), (2, 20_000)])
def test_slivers_are_cut_before_they_are_resized(size, monkeypatch):
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *a: made.append((self.size, to)) or resize(self, to, *a)
    )
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 2, size[1]) if size[0] > size[1] else (0, 0, size[0], size[1] // 2))
    seen = np.asarray(Preprocess((64, 64)).crop(image))
    assert len(made) == 1
    assert all(max(of) <= 8 * 73 for of in made[0])
    first, last = (seen[:, 0], seen[:, -1]) if size[0] > size[1] else (seen[0], seen[-1])
    assert first[:, 2].min() > 200 > 50 > first[:, 0].max()  # the middle of the image is the middle of the crop
    assert last[:, 0].min() > 200 > 50 > last[:, 2].max()


@pytest.mark.parametrize("crop_pct", [0, 0.05, 1.01, float("nan"), -1])
def test_crop_pct_out_of_range(crop_pct):
    with pytest.raises(dvit.InputError, match="crop_pct: "):
        Preprocess((224, 224), crop_pct)


def test_the_settings_of_the_families():
    pruned = dvit.convert(official_checkpoint("tiny-deit-r0.7-s1"), assume={"num_heads": 2}, device="cpu").config
    dense = replace(pruned, reduction=Reduction(), learned=Reduction())
    assert preprocess_for(pruned) == Preprocess((224, 224), 0.875)
    assert preprocess_for(replace(pruned, reduction=Reduction(), image_size=(384, 384))).warp
    assert preprocess_for(replace(pruned, family="lvvit", image_size=(384, 384))).warp
    assert preprocess_for(replace(dense, image_size=(384, 384))) == Preprocess((384, 384), 0.875)
    depths = {12: 0.9, 16: 0.9, 20: 1.0, 24: 1.0}
    assert {depth: _of_lvvit(dense, depth).crop_pct for depth in depths} == depths


def _of_lvvit(dense: Config, depth: int) -> Preprocess:
    return preprocess_for(replace(dense, family="lvvit", body=replace(dense.body, depth=depth)))
