"""A file of predictions that grows: what is in it is not done again, and only whole lines are ever left in it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

from dvit_infer.errors import InputError
from dvit_infer.images.path_set import Names

START = b'{"image": "'  # of every line: how a half-written one is told from what somebody else wrote
LONGEST = 1 << 24  # bytes of a line; ours are far shorter


class Results:
    """Appends lines to a file, and knows the images that are in it.

    Attributes:
        done: every image in the file when it was opened, flagged if it could not be read.
    """

    def __init__(self, path: Path, file: FileIO, end: int, done: Names) -> None:
        self.done = done
        self._path, self._file, self._end = path, file, end
        file.truncate(end)

    @property
    def is_empty(self) -> bool:
        return self._end == 0

    def append(self, lines: Sequence[str]) -> None:
        """Write whole lines or, if anything goes wrong, none of them.

        Raises:
            InputError: the disk is full, say.
        """
        content = "".join(f"{line}\n" for line in lines).encode("ascii")
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
        except BaseException as error:
            self._file.truncate(self._end)
            if isinstance(error, OSError):
                raise InputError(f"out: {self._path}: {error.strerror or error}") from None
            raise
        self._end += written


@contextlib.contextmanager
def results(path: Path, model: str, *, kept: bool, labelled: bool) -> Iterator[Results]:
    """A results file, made if it is not there; a half-written last line is cut off.

    Args:
        path: checked by `files.check_output`.
        model: what gives the answers; those in the file must be the same model's.
        kept, labelled: whether the lines that will be written have kept patches and labels: those there must agree.

    Raises:
        InputError: naming the file and the line, before anything is changed: other model or settings, or no such line.
    """
    done, is_new = Names(), not path.exists()
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise InputError(f"out: {path}: {error.strerror or error}") from None
    with file:
        _claim(file, path)
        appending = Results(path, file, _read(path, model, kept, labelled, done), done)
        try:
            yield appending
        finally:
            if is_new and appending.is_empty:
                path.unlink(missing_ok=True)


def _claim(file: FileIO, path: Path) -> None:
    """Two runs that append to one file would cut each other's lines."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"out: {path}: another run writes to it; choose another file") from None
    except OSError:  # a file system that has no locks
        return


def _read(path: Path, model: str, kept: bool, labelled: bool, done: Names) -> int:
    """Fill `done`; returns where the last whole line ends."""
    end, number = 0, 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST):
            number += 1
            where = f"out: {path}: line {number}"
            if not line.endswith(b"\n"):
                if len(line) < LONGEST and (line.startswith(START) or START.startswith(line)):
                    return end
                raise InputError(f"{where}: is no line of dvit-predict; choose another file")
            done.add([_image(where, line, model, kept, labelled)])
            end += len(line)
    return end


def _image(where: str, line: bytes, model: str, kept: bool, labelled: bool) -> tuple[str, bool]:
    """The image that a line is about, and whether it could not be read."""
    try:
        content = json.loads(line)
        image, by = content["image"], content["model"]
        failed = "error" in content
        labels = () if failed else {"label" in answer for answer in content["top5"]}
        os.fsencode(image)
        if not (isinstance(image, str) and isinstance(by, str)):
            raise TypeError
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{where}: is no line of dvit-predict of this version; choose another file") from None
    if by != model:
        raise InputError(f"{where}: is by {by}, this run by {model} (weights or settings differ); choose another file")
    if not failed and ("kept" in content) != kept:
        raise InputError(f"{where}: has {'' if not kept else 'no '}kept patches, unlike this run; choose another file")
    if labels and labels != {labelled}:
        raise InputError(f"{where}: has {'' if not labelled else 'no '}labels, unlike this run; choose another file")
    return image, failed
