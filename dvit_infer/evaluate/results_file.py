"""A resumable file of predictions: images in it are not classified again, and it never keeps partial lines."""

import contextlib
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from dvit_infer.errors import InputError
from dvit_infer.evaluate.line_file import LineFile, claim
from dvit_infer.images.path_set import Names

START = b'{"image": "'  # start of every line; distinguishes a partial line from a foreign file
LONGEST = 1 << 24  # bytes of a line; ours are far shorter


class Results(LineFile):
    """The lines of predictions, and the images in it.

    Attributes:
        done: every image in the file at opening, flagged if it could not be read.
    """

    def __init__(self, path: Path, file: FileIO, end: int, done: Names) -> None:
        super().__init__(path, file, end)
        self.done = done


@contextlib.contextmanager
def results(path: Path, model: str, *, kept: bool, labelled: bool) -> Iterator[Results]:
    """Open a results file, creating it if missing; a partial last line is removed.

    Args:
        path: checked by `files.check_output`.
        model: the `model_id`; all lines in the file must have the same.
        kept, labelled: whether new lines have kept patches and labels; existing lines must agree.

    Raises:
        InputError: A line has another model or settings, or is no prediction. The file is left unchanged.
    """
    done, is_new = Names(), not path.exists()
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise InputError(f"out: {path}: {error.strerror or error}") from None
    with file:
        claim(file, path)
        appending = Results(path, file, _read(path, model, kept, labelled, done), done)
        try:
            yield appending
        finally:
            if is_new and appending.is_empty:
                path.unlink(missing_ok=True)


def _read(path: Path, model: str, kept: bool, labelled: bool, done: Names) -> int:
    """Fill `done`; return the end of the last complete line."""
    end, number = 0, 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST):
            number += 1
            where = f"out: {path}: line {number}"
            if not line.endswith(b"\n"):
                if len(line) < LONGEST and (line.startswith(START) or START.startswith(line)):
                    return end
                raise InputError(f"{where}: is not a line of dvit-predict; choose another file")
            done.add([_image(where, line, model, kept, labelled)])
            end += len(line)
    return end


def _image(where: str, line: bytes, model: str, kept: bool, labelled: bool) -> tuple[str, bool]:
    """Return the image of a line, and whether it could not be read."""
    try:
        content = json.loads(line)
        image, by = content["image"], content["model"]
        failed = "error" in content
        labels = () if failed else {"label" in answer for answer in content["top5"]}
        os.fsencode(image)
        if not (isinstance(image, str) and isinstance(by, str)):
            raise TypeError
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(f"{where}: is not a line of dvit-predict of this version; choose another file") from None
    if by != model:
        raise InputError(f"{where}: is by {by}, this run by {model} (weights or settings differ); choose another file")
    if not failed and ("kept" in content) != kept:
        raise InputError(f"{where}: has {'' if not kept else 'no '}kept patches, unlike this run; choose another file")
    if labels and labels != {labelled}:
        raise InputError(f"{where}: has {'' if not labelled else 'no '}labels, unlike this run; choose another file")
    return image, failed
