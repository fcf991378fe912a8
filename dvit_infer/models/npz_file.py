"""Read a NumPy archive (.npz), as JAX's vision_transformer and big_vision write weights; pickles in it are refused."""

import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from dvit_infer.errors import InputError
from dvit_infer.models.torch_file import first_line

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_BFLOAT16 = np.dtype("V2")  # NumPy has no bfloat16 and stores its bytes


def is_npz(path: Path) -> bool:
    """Return whether a file is a zip archive of arrays alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """Return the arrays by their names.

    Raises:
        InputError: the file is damaged, or holds objects, or is of no vision transformer.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if not any(name.endswith("Transformer/encoder_norm/scale") for name in names):
                raise InputError(
                    f"{path}: is a NumPy archive (.npz) of no vision transformer (first name "
                    f"{next(iter(names))[:80]!r}); those of JAX's vision_transformer and big_vision are read"
                )
            for name, info in names.items():
                tensors[name] = _tensor(archive.read(info))
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged NumPy archive ({first_line(str(error))})") from None
    return tensors


def _tensor(content: bytes) -> torch.Tensor:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array of version {version}")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject or dtype.fields is not None:
        raise ValueError("an array of objects, which would run code")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError("an array of another size than its data")
    array = np.frombuffer(content, dtype, offset=file.tell()) if math.prod(shape) else np.empty(0, dtype)
    array = array.reshape(shape[::-1]).transpose() if is_fortran else array.reshape(shape)
    if dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=True))
