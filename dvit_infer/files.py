"""Writing a file so that it is there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dvit_infer.errors import InputError

_UMASK = os.umask(0o022)  # it can only be read by setting it, which is the process's: once, while importing
os.umask(_UMASK)


def check_output(path: str | Path, what: str, not_this: str | Path | None = None) -> Path:
    """Return where to write, or say why nothing can be written there, before any work is done.

    Raises:
        InputError: naming `what`: a folder, no regular file, in no folder, not writable, or the input itself.
    """
    target = Path(os.path.realpath(path))  # through a link to the file it names, which is then the one replaced
    if not str(path) or target.is_dir():
        raise InputError(f"{what}: {path or 'nothing'} is a folder or no name; a file name is expected")
    if not target.parent.is_dir():
        raise InputError(f"{what}: {path}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        raise InputError(f"{what}: {path} is no regular file")
    if not_this is not None and Path(not_this).exists() and target.exists() and target.samefile(not_this):
        raise InputError(f"{what}: {path} is the input itself; choose another name")
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"{what}: {path} is not writable")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise InputError(f"{what}: {path}: cannot write in {target.parent} ({error.strerror})") from None
    return target


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it at the end, removed on any error."""
    target = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_UMASK)  # mkstemp's files are their owner's alone; a result gets the mode of any new file
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
