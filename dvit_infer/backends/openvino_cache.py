"""Models written for OpenVINO, kept in the user's cache folder: their weights are mapped from there, not held."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from dvit_infer.utils.files import cache_folder, write_error

LEAST_BYTES = 8 << 20  # smaller models are written in no time, and hold next to nothing
MOST_BYTES = 8 << 30  # beyond it, the files that were used longest ago go
_MODEL, _WEIGHTS, _SUMS = "model.xml", "model.bin", "sums.json"  # its two files, and their checksums
_CHUNK = 1 << 22


def cached_model(key: bytes, write: Callable[[Path], None]) -> tuple[Path | None, str]:
    """Return the path of a model's file, which `write` writes if there is none that is sound.

    None: it cannot be written. The text says what happened, for the description of a runtime; "": nothing.
    """
    try:
        folder = cache_folder() / "openvino" / hashlib.blake2b(key + code_digest(), digest_size=16).hexdigest()
    except RuntimeError as error:  # there is no home
        return None, f"; no cache: {error}"
    note = ""
    try:
        if (folder / _SUMS).exists():
            if _is_sound(folder):
                return folder / _MODEL, ""
            note = "; its damaged cache file was replaced"
        _write(folder, write)
    except (OSError, RuntimeError) as error:  # the latter is OpenVINO's, and says nothing of use
        why = getattr(error, "strerror", None) or "it cannot be written"
        return None, f"; no cache in {folder.parent}: {why}"
    return folder / _MODEL, note


def _is_sound(folder: Path) -> bool:
    """Return whether the files are as they were written, and mark them as used now."""
    try:
        if json.loads((folder / _SUMS).read_text()) != _sums(folder):
            return False
    except (OSError, ValueError):
        return False
    with contextlib.suppress(OSError):  # they may be another user's, or on a read-only disk
        os.utime(folder)
    return True


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        part = Path(name) / "part"
        part.mkdir()
        write(part / _MODEL)
        if (error := write_error(Path(name) / "more")) is not None:  # OpenVINO may not notice a full disk
            raise error
        (part / _SUMS).write_text(json.dumps(_sums(part)))
        _replace(folder, part)
    _forget(folder)


def _replace(folder: Path, part: Path) -> None:
    """Move the finished folder to its place; another process may just have done the same."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as old:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, Path(old) / "old")
        with contextlib.suppress(OSError):
            os.rename(part, folder)
    if not (folder / _SUMS).exists():
        raise OSError("it cannot be replaced")


def _sums(folder: Path) -> dict[str, list[int]]:
    """Return size and CRC-32 of the model's two files."""
    found = {}
    for name in (_MODEL, _WEIGHTS):
        total = size = 0
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                total, size = zlib.crc32(chunk, total), size + len(chunk)
        found[name] = [size, total]
    return found


def _forget(latest: Path) -> None:
    """Remove the models that were used longest ago, beyond `MOST_BYTES` in all, but not the latest."""
    used = {}
    with contextlib.suppress(OSError):
        for folder in latest.parent.iterdir():
            with contextlib.suppress(OSError):
                sizes = [file.stat().st_size for file in folder.rglob("*")]
                used[folder] = folder.stat().st_mtime, sum(sizes)
    total = 0
    for folder, (_, size) in sorted(used.items(), key=lambda entry: entry[1], reverse=True):
        total += size
        if total > MOST_BYTES and folder != latest:
            shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def code_digest() -> bytes:
    """Return a digest of this package's code and of the version of OpenVINO, by which models are written."""
    import openvino

    digest = hashlib.blake2b(openvino.__version__.encode(), digest_size=16)
    for file in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()
