"""Samples of more than 8 bits, more bands than colours, HEIC and AVIF: read where it is certain how, else refused."""

import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from drawn import draw
from PIL import Image, ImageFile
from tiffs import write_tiff

from dvit_infer.images import decode
from dvit_infer.images.decode import ImageFileError, open_bytes, open_image

GREY = np.arange(0, 256, 2).reshape(8, 16)
EXPECTED = np.stack([GREY] * 3, axis=2)


def fails(path) -> str:
    with pytest.raises(ImageFileError) as caught:
        open_image(path)
    return caught.value.why


def png_of_16_bits(path, samples, significant=None):
    """A greyscale PNG of 16 bits, with the chunk sBIT if `significant` bits are given."""
    content = io.BytesIO()
    Image.fromarray(samples.astype(np.uint16)).save(content, "PNG")
    content = content.getvalue()
    if significant is not None:
        chunk = b"sBIT" + bytes([significant])
        content = content[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    path.write_bytes(content)
    return path


def test_12_bits_in_16_are_refused_unless_white_is_stated(tmp_path):
    low = GREY * 4095 // 255
    for path in (png_of_16_bits(tmp_path / "a.png", low), write_tiff(tmp_path / "a.tif", low.astype(np.uint16))):
        assert "16-bit samples up to 4078, of which nothing says what white is" in fails(path)
    np.testing.assert_allclose(open_image(png_of_16_bits(tmp_path / "b.png", low, 12)), EXPECTED, atol=1)
    np.testing.assert_allclose(open_image(write_tiff(tmp_path / "b.tif", low, bits=12)), EXPECTED, atol=1)
    stated = write_tiff(tmp_path / "c.tif", low.astype(np.uint16), s_max=4095)
    np.testing.assert_allclose(open_image(stated), EXPECTED, atol=1)


def test_sbit_of_samples_that_are_scaled_as_the_standard_has_it(tmp_path):
    np.testing.assert_array_equal(open_image(png_of_16_bits(tmp_path / "a.png", GREY * 257, 12)), EXPECTED)


def test_black_is_black(tmp_path):
    assert open_image(png_of_16_bits(tmp_path / "a.png", GREY * 0)).getextrema() == ((0, 0),) * 3


def test_32_bits_are_read_if_white_is_stated(tmp_path):
    assert "32-bit samples" in fails(write_tiff(tmp_path / "a.tif", GREY.astype(np.uint32)))
    stated = write_tiff(tmp_path / "b.tif", GREY.astype(np.uint32), s_max=255)
    np.testing.assert_array_equal(open_image(stated), EXPECTED)
    assert "white is 100" in fails(write_tiff(tmp_path / "c.tif", GREY.astype(np.uint32), s_max=100))


def test_16_bit_pgm_says_its_white_itself(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 16 8 4095\n" + (GREY * 4095 // 255).astype(">u2").tobytes())
    np.testing.assert_allclose(open_image(tmp_path / "a.pgm"), EXPECTED, atol=1)


def test_12_bits_in_16_of_colours(tmp_path):
    colours = np.stack([GREY, GREY[::-1], GREY], axis=2)
    wide = write_tiff(tmp_path / "wide.tif", (colours * 257).astype(np.uint16), photometric=2)
    np.testing.assert_array_equal(open_image(wide), colours)
    low = write_tiff(tmp_path / "low.tif", (colours * 16).astype(np.uint16), photometric=2)
    assert "12 bits in 16" in fails(low)


@pytest.mark.parametrize(("bands", "photometric", "extra"), [(4, 2, 0), (5, 2, 0), (6, 2, 0), (2, 1, 0)])
def test_more_bands_than_colours_and_alpha_are_refused(bands, photometric, extra, tmp_path):
    samples = np.full((4, 6, bands), 80, np.uint8)
    path = write_tiff(tmp_path / "a.tif", samples, photometric=photometric, extra=extra)
    assert f"has {bands} bands" in fails(path)


@pytest.mark.parametrize(("bands", "dtype"), [(4, np.uint8), (8, np.uint8), (13, np.uint16)])
def test_bands_without_colours_are_named(bands, dtype, tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.full((4, 6, bands), 80, dtype))
    assert f"{bands} bands" in fails(path)


def test_alpha_is_no_band(tmp_path):
    samples = np.full((4, 6, 4), 80, np.uint8)
    assert open_image(write_tiff(tmp_path / "a.tif", samples, photometric=2, extra=2)).getpixel((0, 0)) == (80,) * 3


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
AVIF = b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + b"\0" * 64


def test_heic_and_avif_name_what_would_read_them(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_formats", lambda: ["PNG", "JPEG"])
    for content, package in ((HEIC, "is HEIC; to read it, run pip install pillow-heif"), (AVIF, "'pillow>=11.3'")):
        (tmp_path / "a.heic").write_bytes(content)
        assert package in fails(tmp_path / "a.heic")


def test_heic_is_read_if_the_plugin_is_installed(monkeypatch):
    """By a plugin of the test's own, which draws its image."""

    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (60, 45), "RGB"

        def load(self):
            self.im = draw(0).im
            return Image.Image.load(self)

    heif = types.ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: Image.register_open("HEIF", Plugin, lambda start: start[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    decode._formats.cache_clear()
    try:
        np.testing.assert_array_equal(open_bytes("a.heic", HEIC), draw(0))
        with pytest.raises(ImageFileError, match="damaged HEIC"):
            open_bytes("b.heic", HEIC.replace(b"ftypheic", b"ftypheix"))
    finally:
        decode._formats.cache_clear()
