"""Read a file of torch.save, in its zip format or the older one, onto the CPU without running anything in it."""

import errno
import io
import os
import pickle
import re
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.containers import describe_zip
from dvit_infer.models.pickled import Inert, Refused, Storage
from dvit_infer.models.unpickler import Unpickler

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # how the older format begins
_MOST = 1 << 30  # bytes of a pickle in a zip; weights are outside of it
_KINDS = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
    **{"QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32, "Untyped": torch.uint8},
}


def read_torch(path: Path, is_zip: bool) -> tuple[Any, tuple[str, ...]]:
    """Return the content of a file, and the names of the classes in it that are not known, whose objects are inert.

    Raises:
        InputError: it is damaged, or names something that could act.
    """
    try:
        return _read_zip(path) if is_zip else _read_old(path)
    except InputError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything; the message names the file
        is_systems = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # EINVAL: a place before 0
        if is_systems or isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise  # not the file's fault
        raise InputError(f"{path}: {_why_not(error, is_zip)}") from None


def _read_zip(path: Path) -> tuple[Any, tuple[str, ...]]:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        found = next((name for name in records if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
        if found is None:
            raise InputError(f"{path}: {describe_zip(records)}")
        root = found.removesuffix("data.pkl")
        if f"{root}constants.pkl" in records:
            raise InputError(f"{path}: is a TorchScript archive; save the model's state_dict instead")
        if records[found].file_size > _MOST:
            raise InputError(f"{path}: its pickle has {records[found].file_size} bytes, more than weights need")
        _check_sums(archive)
        order = _bytes(archive, records[f"{root}byteorder"]) if f"{root}byteorder" in records else b"little"
        whole: list[torch.UntypedStorage] = []  # the mapped file
        known: dict[str, torch.UntypedStorage] = {}

        def storage(pid: tuple[Any, ...]) -> Storage:
            _, kind, key, _, count = pid
            dtype, size = _dtype(kind), _size(kind, count)
            if key not in known:
                info = records[f"{root}data/{key}"]
                if info.file_size < size:
                    raise pickle.UnpicklingError(f"record {key} is shorter than its tensor")
                if info.compress_type == zipfile.ZIP_STORED:
                    if not whole:
                        whole.append(_mapped(path))
                    start = _start(archive, info)
                    part = whole[0][start : start + size]
                    if part.nbytes() != size:
                        raise pickle.UnpicklingError(f"record {key} ends outside of the file")
                else:
                    part = _empty(size)
                    with archive.open(info) as record:
                        _fill(part, record)
                if order != sys.byteorder.encode():
                    part = part.clone()  # what is mapped stays as it is in the file
                    part.byteswap(dtype)
                known[key] = part
            return Storage(known[key], dtype)

        unpickler = Unpickler(io.BytesIO(_bytes(archive, records[found])), storage)
        return unpickler.load(), tuple(unpickler.skipped)


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Compare every record with its checksum, as torch does not."""
    for info in archive.infolist():
        with archive.open(info) as record:
            while info.CRC and record.read(1 << 22):  # all checksums are 0 if torch was set to write none
                pass


def _bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type != zipfile.ZIP_STORED:
        return archive.read(info)
    start = _start(archive, info)  # not archive.read: a file without checksums fails there
    assert archive.fp is not None
    archive.fp.seek(start)
    return archive.fp.read(info.file_size)


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return where the data of an uncompressed record begins: behind its own header, whose lengths vary."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + 30 + name + extra


class _Bounded:
    """A file that allocates no more than it holds, whatever length a pickle claims."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.readline = file.readline
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self.size))


def _read_old(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Read the format before torch 1.6: pickles in a row, then the data of all storages."""
    known: dict[Any, torch.UntypedStorage] = {}
    widths: dict[Any, int] = {}
    with path.open("rb") as file:
        reader = _Bounded(file)
        size_left = reader.size

        def storage(pid: tuple[Any, ...]) -> Storage:
            nonlocal size_left
            _, kind, key, _, count, *view = pid
            dtype, width = _dtype(kind), _dtype(kind).itemsize
            if key not in known:
                size_left -= _size(kind, count)
                if size_left < 0:
                    raise pickle.UnpicklingError("its tensors are larger than the file")
                known[key], widths[key] = _empty(_size(kind, count)), width
            if not view or view[0] is None:
                return Storage(known[key], dtype)
            _, start, length = view[0]
            return Storage(known[key][start * width : (start + length) * width], dtype)

        if Unpickler(reader).load() != _MAGIC:
            raise InputError(
                f"{path}: is a pickle, but no file of torch.save; torch.save(model.state_dict(), FILE) writes one"
            )
        if Unpickler(reader).load() != _VERSION or not Unpickler(reader).load().get("little_endian"):
            raise pickle.UnpicklingError("an unknown version of torch.save")
        unpickler = Unpickler(reader, storage)
        content = unpickler.load()
        for key in Unpickler(reader).load():
            if not isinstance(key, str | int) or key not in widths:
                raise pickle.UnpicklingError("data of no tensor")
            if int.from_bytes(file.read(8), "little") * widths[key] != known[key].nbytes():
                raise pickle.UnpicklingError(f"storage {key} has another size than its tensors")
            _fill(known[key], file)
            del widths[key]
        if widths:
            raise pickle.UnpicklingError(f"storage {next(iter(widths))} is missing")
    return content, tuple(unpickler.skipped)


def _dtype(kind: Any) -> torch.dtype:
    if not isinstance(kind, Inert):
        raise pickle.UnpicklingError("a storage of no type")
    return _KINDS[kind.name.rpartition(".")[2].removesuffix("Storage")]


def _size(kind: Any, count: Any) -> int:
    if type(count) is not int or not 0 <= count < 1 << 48:
        raise pickle.UnpicklingError("a storage of no size")
    return count * _dtype(kind).itemsize


def _mapped(path: Path) -> torch.UntypedStorage:
    """Return the whole file, mapped into memory, as a private copy of which nothing is written back."""
    return torch.UntypedStorage.from_file(str(path), False, os.path.getsize(path))  # type: ignore[return-value]


def _empty(size: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(size, device="cpu")  # type: ignore[no-untyped-call]


def _fill(storage: torch.UntypedStorage, file: Any) -> None:
    view = memoryview(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy())  # type: ignore[arg-type]
    at = 0
    while at < len(view):
        count = file.readinto(view[at:])
        if not count:
            raise EOFError("Ran out of input")
        at += count


def _why_not(error: Exception, is_zip: bool) -> str:
    if isinstance(error, Refused):
        return (
            f"refused: loading it would run {error.name}; only plain weights are read, nothing was run;"
            " a file of the state_dict alone would do"
        )
    message = str(error)
    if "Unsupported operand" in message:
        return "refused: its pickle has instructions that plain weights do not need; nothing was run"
    kinds = zipfile.BadZipFile | zlib.error  # of a record, or of the archive's table
    what = (
        "truncated or damaged torch file"
        if is_zip or isinstance(error, kinds)
        else "is no torch checkpoint, or is damaged"
    )
    return f"{what} ({first_line(message)})"


def first_line(message: str) -> str:
    line = re.split(r"[\n.] ?", message.strip() or "unreadable", maxsplit=1)[0]
    return line[:120]
