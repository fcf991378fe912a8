"""Images in tar and zip files: listed in one pass, read one by one, never unpacked to disk.

Archives are untrusted: links, devices, hidden files and names that lead out of the archive are ignored, headers and
members have bounded sizes, and a tar is only read forward.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from dvit_infer.errors import InputError
from dvit_infer.images.classes import LEAVINGS
from dvit_infer.images.decode import ImageFileError
from dvit_infer.images.entry import Entry, Member
from dvit_infer.images.find import find_images, is_image

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
MAX_BYTES = 1 << 29  # of a member; an 8-bit RGB image of the largest size takes half of that without compression

_LONGEST_HEADER = 1 << 20
_CLASS, _CLASS_BYTES = ".cls", 256  # webdataset's suffix of a class; the longest that is read
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"PK": "zip"}
_OPEN: dict[str, Callable[[str], Any]] = {
    "tar": io.FileIO,
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
}
_ZIP_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_DAMAGE = (  # what Python's readers raise for damaged archives; `_why_not` tells the system's errors apart
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, ValueError, LookupError, NotImplementedError, RecursionError, OverflowError),
)


@dataclass(frozen=True)
class ArchivedFile:
    """A file in an archive: an image, or webdataset's class of one.

    Attributes:
        name: its path in the archive, with slashes.
        entry: the image; it may have an `error`.
        text: the class, if this is a `.cls` file instead.
    """

    name: str
    entry: Entry
    text: str | None = None


def is_archive(path: str) -> bool:
    """Return whether a path is a file with the suffix of an archive (`SUFFIXES`, in any case)."""
    return path.lower().endswith(SUFFIXES) and os.path.isfile(path)


def archived_files(path: str) -> Iterator[ArchivedFile]:
    """Yield the images and `.cls` files of an archive, in its order.

    Memory does not grow with the number of files in a tar; for a zip, its directory is read at once.

    Raises:
        InputError: The archive cannot be read, or is damaged from here on.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        packing = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "tar")
        yield from _zipped(path) if packing == "zip" else _tarred(path, packing)
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: {_why_not(error)}") from None


def _why_not(error: BaseException) -> str:
    """Return why an archive cannot be read: what the system says, else that it is damaged."""
    return error.strerror if isinstance(error, OSError) and error.strerror else f"damaged archive: {error}"


def find_entries(arguments: Sequence[str]) -> Iterator[Entry]:
    """Yield images like `find_images`; an archive stands for the images in it, in its order.

    A damaged archive yields its images up to the damage, then an entry for itself with the error.

    Raises:
        InputError: An argument does not exist or contains no image. Raised at the call, before anything is yielded.
    """
    found = find_images(arguments)
    for argument in filter(is_archive, arguments):
        if next((file for file in archived_files(argument) if file.text is None), None) is None:
            raise InputError(f"{argument}: no image in this archive")
    return _expanded(found)


def _expanded(paths: Iterator[str]) -> Iterator[Entry]:
    for path in paths:
        if not is_archive(path):
            yield Entry(path)
            continue
        try:
            yield from (file.entry for file in archived_files(path) if file.text is None)
        except InputError as error:
            yield Entry(path, error=str(error).removeprefix(f"{path}: "))


def read_member(path: str, member: Member) -> bytes:
    """Return the bytes of a file in an archive.

    Raises:
        ImageFileError: It is damaged; the message names `path`.
    """
    try:
        content = _from_tar(member) if member.packing in _OPEN else _from_zip(member)
    except _DAMAGE as error:
        raise ImageFileError(path, _why_not(error)) from None
    if len(content) != member.size or member.checksum not in (None, zlib.crc32(content)):
        raise ImageFileError(path, "damaged archive: its bytes are not those that were packed")
    return content


def _from_zip(member: Member) -> bytes:
    with open(member.archive, "rb") as file:
        file.seek(member.offset)
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            raise ValueError("no file at its place")
        file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)  # its name and extra field
        content = file.read(member.packed)
    if member.packing == "stored":
        return content
    return zlib.decompressobj(-15).decompress(content, max(1, member.size))  # 0 would be no limit


def _from_tar(member: Member) -> bytes:
    if member.packing != "tar":
        stream = _stream(member)
        stream.seek(member.offset)
        return bytes(stream.read(member.size))
    with open(member.archive, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


_streams: dict[tuple[Any, ...], IO[bytes]] = {}


def _stream(member: Member) -> IO[bytes]:
    """Return an open compressed tar. It stays open: reading on is fast, but going back means starting again.

    Every process has its own, as one inherited from its parent would share the position.
    """
    key = (os.getpid(), member.archive, os.stat(member.archive).st_mtime_ns)
    if key not in _streams:
        for stream in _streams.values():
            stream.close()
        _streams.clear()
        _streams[key] = _OPEN[member.packing](member.archive)
    return _streams[key]


class _Forward:
    """A stream that tarfile reads forward, in small pieces: sizes and offsets in headers may be hostile."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._stream.read(size)
        return self.last

    def seek(self, position: int) -> int:
        if position < self._stream.tell() - 1:  # tarfile reads the last byte before a header again
            raise tarfile.ReadError("its members overlap")
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _tarred(path: str, packing: str) -> Iterator[ArchivedFile]:
    with _OPEN[packing](path) as stream:
        forward: Any = _Forward(stream)
        tar: Any
        with tarfile.open(fileobj=forward, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # otherwise it would keep them all
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                    continue
                member = Member(path, packing, info.offset_data, info.size, info.size)
                if file := _file(info.name, member, forward.read):
                    yield file
        if any(forward.last):  # tarfile takes a header that it cannot read for the end
            raise tarfile.ReadError("a header that cannot be read")


def _zipped(path: str) -> Iterator[ArchivedFile]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                continue
            packing = "encrypted" if info.flag_bits & 1 else _ZIP_METHODS.get(info.compress_type, "")
            member = Member(path, packing, info.header_offset, info.file_size, info.compress_size, info.CRC)
            name = info.filename.replace("\\", "/")  # some tools of Windows write those
            if file := _file(name, member, partial(_beginning, member)):
                yield file


def _beginning(member: Member, size: int) -> bytes:
    return read_member(member.archive, member)[:size]


def _file(name: str, member: Member, read: Callable[[int], bytes]) -> ArchivedFile | None:
    """Return a file, or None if it is neither an image nor a class, hidden, left by a tool, or outside the archive."""
    parts = name.split("/")
    if parts[0] == ".":
        parts = parts[1:]
    if not all(parts) or any(part[0] == "." or part.casefold() in LEAVINGS for part in parts) or "\0" in name:
        return None
    path, error = os.path.join(member.archive, *parts), None
    if member.packing in ("", "encrypted"):
        error = "is encrypted" if member.packing else "is compressed by another method than deflate"
    elif not 0 <= (most := max(member.size, member.packed)) <= MAX_BYTES:
        error = f"has {most:,} bytes; at most {MAX_BYTES:,} are read from an archive"
    if parts[-1].lower().endswith(_CLASS) and error is None and member.size <= _CLASS_BYTES:
        try:
            return ArchivedFile("/".join(parts), Entry(path), read(member.size).decode("utf-8-sig").strip())
        except (ImageFileError, UnicodeDecodeError):
            raise InputError(f"{path}: is no class in UTF-8") from None
    return ArchivedFile("/".join(parts), Entry(path, member=member, error=error)) if is_image(parts[-1]) else None


def class_folders(files: Sequence[ArchivedFile]) -> list[str]:
    """Return the class folder of each file: the first folder that not all have in common; "" for a file in none.

    Files that are all in one folder are of that class.
    """
    folders = [tuple(file.name.split("/")[:-1]) for file in files]
    common = 0
    while len({folder[common : common + 1] for folder in folders}) == 1 and folders[0][common:]:
        common += 1
    if all(len(folder) == common for folder in folders):
        common = max(0, common - 1)
    return [folder[common] if len(folder) > common else "" for folder in folders]
