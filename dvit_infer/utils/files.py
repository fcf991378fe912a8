"""File names and atomic writes: a file is written completely or not at all."""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.utils.partial import partial_folder, remove_left_over


def cache_folder() -> Path:
    """Return the user's cache folder: in XDG_CACHE_HOME, else in ~/.cache. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvit_infer"


def check_name(path: str | Path, what: str = "") -> Path:
    """Return the path if it is a valid file name for the libraries used here, which require UTF-8.

    Raises:
        InputError: it is empty, ends in a slash, is not UTF-8, or contains a NUL.
    """
    text = str(path)
    where = f"{what}: " if what else ""
    if not text or text.endswith(os.sep):
        raise InputError(f"{where}{text or 'an empty name'}: a file name is expected")
    if "\0" in text or (not text.isascii() and text != text.encode(errors="replace").decode()):
        raise InputError(f"{where}{text!a}: a file name in UTF-8 is expected")
    return Path(path)


def check_output(path: str | Path, what: str, not_this: str | Path | None = None) -> Path:
    """Return the path to write to, after checking, before any work is done, that it can be written.

    Raises:
        InputError: the path is a folder or no regular file, its folder does not exist, it is not writable, or it is the
            input itself. The message names `what`.
    """
    # Follow links: the file that a link names is the one replaced.
    target = Path(os.path.realpath(check_name(path, what)))
    try:
        if target.is_dir():
            raise InputError(f"{what}: {path} is a folder; a file name is expected")
        if not target.parent.is_dir():
            raise InputError(f"{what}: {path}: there is no folder {target.parent}")
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise InputError(f"{what}: {path} is no regular file")
        if not_this is not None and Path(not_this).exists() and target.exists() and target.samefile(not_this):
            raise InputError(f"{what}: {path} is the input itself; choose another name")
        if target.exists() and not os.access(target, os.W_OK):
            raise InputError(f"{what}: {path} is not writable")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        remove_left_over(target.parent)
    except OSError as error:
        raise InputError(f"{what}: {path}: cannot be written ({error.strerror})") from None
    return target


def check_output_folder(path: str | Path, what: str) -> Path:
    """Return the path of a folder to write into, after checking that it is one, or can be made.

    Raises:
        InputError: it is no folder, the folder that it would be in does not exist, or neither is writable. The message
            names `what`.
    """
    target = Path(os.path.realpath(str(check_name(str(path).rstrip(os.sep) or str(path), what))))
    try:
        if target.exists() and not target.is_dir():
            raise InputError(f"{what}: {path} is no folder; a folder is expected, or a name that is free")
        if not target.parent.is_dir():
            raise InputError(f"{what}: {path}: there is no folder {target.parent}")
        with tempfile.TemporaryFile(dir=target if target.exists() else target.parent):
            pass
    except OSError as error:
        raise InputError(f"{what}: {path}: cannot be written ({error.strerror})") from None
    return target


_BLOCK, _ASK_FOR = bytes(1 << 16), 1 << 22
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "over the limit of the file system, or of ulimit -f",
}


def reason(error: OSError) -> str:
    """Return the reason of a failed write; a full disk in plain words."""
    system = error.strerror or str(error)
    return f"{system} ({_NO_ROOM[error.errno]})" if error.errno in _NO_ROOM else system


def resize(file: int, size: int) -> None:
    """Make an open file `size` bytes long; the disk then has room for all of them.

    A file with holes would end a process that writes to it through memory as soon as the disk is full (SIGBUS).

    Raises:
        OSError: the disk is full, for example. The file is as long as before.
    """
    before = os.fstat(file).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, max(size, 1))
        else:
            os.lseek(file, before, os.SEEK_SET)
            for start in range(before, size, len(_BLOCK)):
                os.write(file, _BLOCK[: size - start])
    except OSError:
        os.ftruncate(file, before)
        raise
    os.ftruncate(file, size)


def write_error(part: Path) -> OSError | None:
    """Return the error that the system gives for writing more to a partial file; None: it takes more.

    For libraries that fail without saying why.
    """
    try:
        with part.open("ab") as file:
            for _ in range(_ASK_FOR // len(_BLOCK)):
                file.write(_BLOCK)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def atomic_write(path: str | Path, what: str) -> Iterator[Path]:
    """Yield the path of an empty file in a hidden folder beside `path`; rename it at the end, delete it on any error.

    Raises:
        InputError: for example, the disk is full. The message names `what` and the path.
    """
    target = Path(os.path.realpath(path))
    try:
        with partial_folder(target) as folder:
            part = folder / target.name
            part.touch()
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # a writer may have replaced it by a private file; a result gets the mode of any new file
            os.replace(part, target)
    except OSError as error:
        raise InputError(f"{what}: {path}: {reason(error)}") from None


@contextlib.contextmanager
def atomic_write_files(path: str | Path, what: str) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; at the end all files in the folder move beside `path`.

    The file itself moves last, so that it never exists without the others. If it replaces a file whose `<name>.data` it
    does not replace, that is deleted. Only a crash between the moves leaves new data beside an old file.

    Raises:
        InputError: for example, the disk is full. The message names `what` and the path.
    """
    target = Path(os.path.realpath(path))
    try:
        with partial_folder(target) as folder:
            part = folder / target.name
            yield part
            replaces, written = target.exists(), sorted(folder.iterdir(), key=lambda file: file == part)
            for file in written:
                os.replace(file, target.parent / file.name)
            if replaces and len(written) == 1:
                target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{what}: {path}: {reason(error)}") from None


def atomic_write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN and Inf become null, as JSON cannot express them."""
    with atomic_write(path, "json") as part:
        part.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
