"""Read a NumPy archive (.npz), as JAX's vision_transformer and big_vision write weights; pickles in it are refused."""

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from dvit_infer.errors import InputError
from dvit_infer.models.torch_file import first_line
from dvit_infer.models.vit.names import plan_of, unstacked

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_BFLOAT16 = np.dtype("V2")  # NumPy has no bfloat16 and stores its bytes
_MOST_TIMES = 20  # the size of the file; deflated weights are hardly smaller than they are
_CHUNK = 1 << 20
# Of a damaged archive; zipfile says by a RuntimeError that a member is encrypted.
_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError, RuntimeError)
_BAD_TEXT = (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError)  # a header is Python's text


class _Header(NamedTuple):
    length: int
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[np.generic]


def is_npz(path: Path) -> bool:
    """Return whether a file is a zip archive of arrays alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # what reads torch's archives says what is wrong with it
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """Return the arrays by their names.

    Their names and headers are read first, and no array of a file that is not what it should be.

    Raises:
        InputError: the file is damaged, or holds objects, or is of no vision transformer, or would unpack to many times
            its size.
    """
    headers, tensors = {}, {}
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _check_size(path, infos)
        for name, info in infos.items():
            with archive.open(info) as file:
                headers[name] = _header(file, info.file_size)
    _check_names(path, headers)  # not in there, where a mistake of ours would count as damage
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        for name, info in infos.items():
            with archive.open(info) as file:
                tensors[name] = _tensor(file, headers[name])
    return tensors


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what zipfile and NumPy raise for damage into an InputError."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: damaged NumPy archive ({first_line(str(error))})") from None


def _check_size(path: Path, infos: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raise InputError for a file that would unpack to many times its size, as no trained weights do."""
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos.values()):
        raise ValueError("packed in another way than NumPy does")
    size, unpacked = path.stat().st_size, sum(info.file_size for info in infos.values())
    if unpacked > _MOST_TIMES * size:
        raise InputError(
            f"{path}: a NumPy archive of {size / 2**20:.1f} MiB whose arrays would take {unpacked / 2**20:.1f} MiB: "
            f"over {_MOST_TIMES} times as much, as trained weights never do; write them anew with numpy.savez"
        )


def _check_names(path: Path, headers: Mapping[str, _Header]) -> None:
    """Raise InputError for arrays that are of no vision transformer, or for one that such a model does not have."""
    if not any(name.endswith("Transformer/encoder_norm/scale") for name in headers):
        raise InputError(
            f"{path}: is a NumPy archive (.npz) of no vision transformer (first name {next(iter(headers))[:80]!r}); "
            "those of JAX's vision_transformer and big_vision are read"
        )
    arrays = {name: (name, torch.empty(header.shape, device="meta")) for name, header in headers.items()}
    plan_of(str(path), {name: in_file for name, (in_file, _) in unstacked(arrays).items()})


def _header(file: IO[bytes], size: int) -> _Header:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array of version {version}")
    try:
        shape, is_fortran, dtype = _HEADERS[version](file)
    except _BAD_TEXT:
        raise ValueError("an array's header is none") from None
    if dtype.hasobject or dtype.fields is not None:
        raise ValueError("an array of objects, which would run code")
    if dtype != _BFLOAT16 and (dtype.kind not in "biuf" or dtype.itemsize > 8):
        raise ValueError(f"an array of {dtype}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError("an array of another size than its data")
    return _Header(file.tell(), shape, is_fortran, dtype)


def _tensor(file: IO[bytes], header: _Header) -> torch.Tensor:
    """Return the array behind its header, read into the memory that it keeps."""
    length, shape, is_fortran, dtype = header
    file.read(length)
    array = np.empty(shape[::-1] if is_fortran else shape, dtype)
    content = array.reshape(-1).view(np.uint8)
    for start in range(0, content.size, _CHUNK):
        part = content[start : start + _CHUNK]
        part[:] = np.frombuffer(file.read(part.size), np.uint8)
    if dtype == _BFLOAT16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
    return tensor.permute(*reversed(range(tensor.dim()))) if is_fortran else tensor
