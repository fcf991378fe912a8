"""Names of files, and writing one so that it is there whole or not at all."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError

_UMASK = os.umask(0o022)  # it can only be read by setting it, which is the process's: once, while importing
os.umask(_UMASK)


def cache_folder() -> Path:
    """Where this user's programs keep what they can do without: XDG_CACHE_HOME, else ~/.cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvit_infer"


def check_name(path: str | Path, what: str = "") -> Path:
    """Return the path if it can be a file's name for the libraries that read and write here, which want UTF-8.

    Raises:
        InputError: it is empty, a folder's (a slash at its end), not UTF-8, or has a NUL in it.
    """
    text = str(path)
    where = f"{what}: " if what else ""
    if not text or text.endswith(os.sep):
        raise InputError(f"{where}{text or 'an empty name'}: a file name is expected")
    if "\0" in text or (not text.isascii() and text != text.encode(errors="replace").decode()):
        raise InputError(f"{where}{text!a}: a file name in UTF-8 is expected")
    return Path(path)


def check_output(path: str | Path, what: str, not_this: str | Path | None = None) -> Path:
    """Return where to write, or say why nothing can be written there, before any work is done.

    Raises:
        InputError: naming `what`: a folder, no regular file, in no folder, not writable, or the input itself.
    """
    # Through a link to the file it names, which is then the one replaced.
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
    except OSError as error:
        raise InputError(f"{what}: {path}: cannot be written ({error.strerror})") from None
    return target


@contextlib.contextmanager
def atomic_write(path: str | Path, what: str) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it at the end, removed on any error.

    Raises:
        InputError: naming `what` and the path: the disk is full, say.
    """
    target = Path(os.path.realpath(path))
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:50]}.", suffix=".part", dir=target.parent)
        part = Path(name)
        os.close(handle)
        yield part
        part.chmod(0o666 & ~_UMASK)  # mkstemp's files are their owner's alone; a result gets the mode of any new file
        os.replace(part, target)
    except OSError as error:
        raise InputError(f"{what}: {path}: {error.strerror or error}") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write_files(path: str | Path, what: str) -> Iterator[Path]:
    """As `atomic_write`, with others beside it: a path of that name in a folder of its own, all of which moves.

    The file itself moves last: when it is there, so are the others. A `<name>.data` of the file it replaces goes, where
    the new one has none. Only a crash between the moves leaves new data beside an old file.

    Raises:
        InputError: naming `what` and the path: the disk is full, say.
    """
    target = Path(os.path.realpath(path))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:50]}.", suffix=".part", dir=target.parent) as folder:
            part = Path(folder) / target.name
            yield part
            replaces, written = target.exists(), sorted(part.parent.iterdir(), key=lambda file: file == part)
            for file in written:
                os.replace(file, target.parent / file.name)
            if replaces and len(written) == 1:
                target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{what}: {path}: {error.strerror or error}") from None


def atomic_write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all; what is not finite becomes null, which JSON has a word for."""
    with atomic_write(path, "json") as part:
        part.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
