"""A file to which one process appends lines of JSON, each call's completely or not at all."""

from collections.abc import Sequence
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

from dvit_infer.errors import InputError
from dvit_infer.utils.files import reason


class LineFile:
    """Appends lines to an open file.

    Args:
        path: of the file, for messages.
        file: opened to append, without a buffer.
        end: bytes of it that are kept; what follows is cut off.
    """

    def __init__(self, path: Path, file: FileIO, end: int) -> None:
        self._path, self._file, self._end = path, file, end
        file.truncate(end)

    @property
    def is_empty(self) -> bool:
        return self._end == 0

    def append(self, lines: Sequence[str]) -> None:
        """Write all lines, or none if an error occurs.

        Raises:
            InputError: Writing failed, e.g. the disk is full.
        """
        content = "".join(f"{line}\n" for line in lines).encode("ascii")
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
        except BaseException as error:
            self._file.truncate(self._end)
            if isinstance(error, OSError):
                raise InputError(f"out: {self._path}: {reason(error)}") from None
            raise
        self._end += written


def claim(file: FileIO, path: Path) -> None:
    """Lock the file: two runs that append to one file would corrupt each other's lines.

    Raises:
        InputError: Another run has it locked.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"out: {path}: another run writes to it; wait for its end, or choose another name") from None
    except OSError:  # a file system without locks
        return
