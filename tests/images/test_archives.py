"""Images in tar and zip files: found and read as on disk, in every process; hostile archives do no harm."""

import gzip
import io
import os
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn import draw, draw_all, write_text

import dvit_infer as dvit
from dvit_infer.images import archives
from dvit_infer.images.archives import archived_files, find_entries
from dvit_infer.images.decode import ImageFileError, open_image
from dvit_infer.images.labelled import labelled_images
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import decode

pytestmark = pytest.mark.usefixtures("_empty_folder")
CROP = Preprocess((32, 32))
KINDS = ["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.zip", "stored.zip"]


def png(seed: int = 0) -> bytes:
    content = io.BytesIO()
    draw(seed).save(content, "PNG")
    return content.getvalue()


def pack(name: str, files: dict[str, bytes]) -> str:
    """Write an archive of the kind that its name says."""
    if name.endswith(".zip"):
        method = zipfile.ZIP_STORED if name.startswith("stored") else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(name, "w", method) as packed:
            for member, content in files.items():
                packed.writestr(member, content)
        return name
    kind = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}.get(name.rpartition(".")[2], "")
    with tarfile.open(name, f"w:{kind}") as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return name


def paths(*arguments: str) -> list[str]:
    return [entry.path for entry in find_entries(arguments)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_those_on_disk(name, workers):
    drawn = draw_all(Path("d"), 21)
    write_text(Path("d/x.jpg"))
    files = {path: Path(path).read_bytes() for path in [*drawn[:10], "d/x.jpg", *drawn[10:]]}
    pack(name, files)
    found = list(decode(find_entries([name]), CROP, workers))
    assert [image.path for image in found] == [f"{name}/{path}" for path in files]  # in the archive's order
    for image, path in zip(found, files, strict=True):
        if path == "d/x.jpg":
            assert image.error is not None
            continue
        np.testing.assert_array_equal(image.pixels, CROP(open_image(path)))


def test_archives_among_other_arguments():
    draw_all(Path("d"), 2)
    for shard in range(2):
        pack(f"shard-{shard}.tar", {f"{shard}.png": png()})
    assert paths("d", "shard-*.tar") == ["d/000.png", "d/001.jpg", "shard-0.tar/0.png", "shard-1.tar/1.png"]
    pack("none.tar", {"readme.txt": b"x"})
    with pytest.raises(dvit.InputError, match=r"^none\.tar: no image in this archive"):
        find_entries(["d", "none.tar"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("above", ["", "val/", "./data/val/"])
def test_class_folders(name, above):
    pack(name, {f"{above}{label}/deep/{at}.png": png() for label in (7, 3) for at in range(2)})
    found = labelled_images(name, 10)
    assert [image.label for image in found.images()] == [7, 7, 3, 3]
    assert str(found) == "2 class folders for 10 classes: their numbers are the classes"


def test_one_class_folder_and_none():
    pack("one.tar", {"val/4/a.png": png(), "val/4/b.png": png()})
    assert [image.label for image in labelled_images("one.tar", 10).images()] == [4, 4]
    pack("flat.tar", {"a.png": png(), "b.png": png()})
    with pytest.raises(dvit.InputError, match=r"flat\.tar: has no class folders and no \.cls files"):
        labelled_images("flat.tar", 10)
    pack("loose.zip", {"a.png": png(), "4/b.png": png(), "5/b.png": png()})
    found = labelled_images("loose.zip", 10)
    assert [image.label for image in found.images()] == [4, 5]
    assert "1 image left out, in no class folder: 'a.png'" in found.warnings[0]


@pytest.mark.parametrize("name", KINDS)
def test_webdataset(name):
    files = {f"{key:06}.{suffix}": content for key in range(3) for suffix, content in
             (("jpg", png(key)), ("cls", f"{key * 2}\n".encode()), ("json", b"{}"))}  # fmt: skip
    pack(name, files | {"000009.png": png()})
    found = labelled_images(name, 10)
    assert [(image.path, image.label) for image in found.images()] == [(f"{name}/{k:06}.jpg", 2 * k) for k in range(3)]
    assert "1 image left out, without a .cls file: '000009.png'" in found.warnings[0]
    assert [image.error for image in decode(found.images(), CROP, 0)] == [None] * 3


def test_hidden_files_and_leavings_are_left_out():
    pack(
        "a.zip", {"3/a.png": png(), "__MACOSX/3/._a.png": png(), "3/.b.png": png(), ".c/d.png": png(), "Thumbs.db": b""}
    )
    assert paths("a.zip") == ["a.zip/3/a.png"]


def test_links_devices_and_ways_out_are_ignored(tmp_path):
    with tarfile.open("a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    for name in ("a.tar", "b.zip"):
        files = {out: png() for out in ("../up.png", "/root.png", "x/../../up.png", "x//y.png", "good.png")}
        if name == "a.tar":
            with tarfile.open(name, "a") as tar:
                for out, content in files.items():
                    info = tarfile.TarInfo(out)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        else:
            pack(name, files)
            link = zipfile.ZipInfo("link.png")
            link.external_attr = 0o120777 << 16
            with zipfile.ZipFile(name, "a") as packed:
                packed.writestr(link, "/etc/passwd")
        assert paths(name) == [f"{name}/good.png"]
    assert sorted(os.listdir(tmp_path / "here")) == ["a.tar", "b.zip"]


@pytest.mark.parametrize("name", KINDS)
def test_an_archive_cut_short(name):
    rng = np.random.default_rng(0)
    pack(name, {f"{at}.png": png() + rng.bytes(9000) for at in range(9)})
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])
    if name.endswith((".zip", "bz2")):  # the directory of a zip is at its end; bz2 has large blocks
        with pytest.raises(dvit.InputError, match=rf"^{name}: "):
            list(find_entries([name]))
        return
    found = list(decode(find_entries([name]), CROP, 1))
    assert 3 <= sum(image.error is None for image in found) <= 5
    assert found[-1].path == name
    assert "damaged archive" in found[-1].error
    with pytest.raises(dvit.InputError, match=rf"^{name}: damaged archive"):
        labelled_images(name, 10)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_header_in_the_middle_that_is_spoiled_is_no_end(name):
    pack("a.tar", {f"{at}.png": bytes(512) for at in range(3)})
    content = bytearray(Path("a.tar").read_bytes())
    content[2 * 1024 + 3] ^= 255
    Path(name).write_bytes(content if name == "a.tar" else gzip.compress(content))
    entries = list(find_entries([name]))
    assert [entry.path for entry in entries] == [f"{name}/0.png", f"{name}/1.png", name]
    assert entries[-1].error == "damaged archive: a header that cannot be read"


def test_changed_bytes_of_a_zip_are_noticed():
    pack("stored.zip", {"a.png": png()})
    content = bytearray(Path("stored.zip").read_bytes())
    content[60] ^= 1
    Path("stored.zip").write_bytes(content)
    (image,) = decode(find_entries(["stored.zip"]), CROP, 0)
    assert "not those that were packed" in image.error


def test_bombs(monkeypatch):
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [(len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
              for chunk in (header, b"IDAT" + zlib.compress(b""))]  # fmt: skip
    pack("a.zip", {"bomb.png": b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "large.png": bytes(1 << 20)})
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 19)
    errors = [image.error for image in decode(find_entries(["a.zip"]), CROP, 0)]
    assert "decompression bomb" in errors[0]
    assert "1,048,576 bytes; at most 524,288" in errors[1]


def test_a_zip_member_is_never_larger_than_it_says():
    pack("a.zip", {"lie.png": bytes(1 << 20)})
    content = Path("a.zip").read_bytes()
    Path("a.zip").write_bytes(content.replace((1 << 20).to_bytes(4, "little"), (99).to_bytes(4, "little")))
    (image,) = decode(find_entries(["a.zip"]), CROP, 0)
    assert "not those that were packed" in image.error


def test_headers_of_a_tar_are_bounded():
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    with gzip.open("a.tar.gz", "wb") as packed:
        packed.write(info.tobuf() + bytes(1 << 20))
    with pytest.raises(dvit.InputError, match="a header of 4294967296 bytes"):
        find_entries(["a.tar.gz"])


def test_a_tar_whose_members_overlap():
    """A size below zero, by which tarfile (before 3.11.14) goes back for ever."""
    info = tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT)
    size = b"\xff" * 8 + (-512 & (1 << 32) - 1).to_bytes(4, "big")
    block = bytearray(info[:124] + size + info[136:])
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    Path("a.tar").write_bytes(bytes(block) * 4 + bytes(1024))
    with pytest.raises(dvit.InputError, match=r"^a\.tar: "):
        list(find_entries(["a.tar"]))


def test_encrypted_members_are_errors():
    pack("a.zip", {"a.png": png()})
    content = bytearray(Path("a.zip").read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    Path("a.zip").write_bytes(content)
    assert [image.error for image in decode(find_entries(["a.zip"]), CROP, 0)] == ["is encrypted"]


def test_memory_does_not_grow_with_a_tar():
    def peak(count: int) -> int:
        pack("a.tar", {f"{at:05}.png": b"" for at in range(count)})
        tracemalloc.start()
        assert sum(1 for _ in archived_files("a.tar")) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(2000) < 1.5 * peak(100)


def test_an_archive_that_went_away_is_not_called_damaged():
    pack("a.tar", {"x/1.png": png()})
    [found] = archived_files("a.tar")
    assert found.entry.member is not None
    os.remove("a.tar")
    with pytest.raises(ImageFileError, match="No such file or directory"):
        archives.read_member("a.tar/x/1.png", found.entry.member)
