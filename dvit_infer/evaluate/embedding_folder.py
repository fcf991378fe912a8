"""The folder of an embedding: `features.npy`, `images.jsonl` and `index.json`; an interrupted run can be resumed.

Line i of `images.jsonl` names the image of row i. It is written after its row is on the disk, so that the lines say how
many rows are there, after a power failure too.
"""

import contextlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from dvit_infer.errors import InputError
from dvit_infer.evaluate.line_file import LineFile, claim
from dvit_infer.images.entry import Entry
from dvit_infer.utils.files import atomic_write, check_output_folder, reason, resize

FEATURES, IMAGES, INDEX = "features.npy", "images.jsonl", "index.json"
VERSION = 1
COMMIT_S = 1.0  # seconds after which rows go to the disk, at most; a killed run loses so much work
_ELSEWHERE = "choose another folder"


@dataclass(frozen=True)
class Index:
    """The facts on which the rows depend: `index.json`, with the number of images and whether all are there.

    Attributes:
        model: the `model_id`, of weights and all settings; the next six are some of these, by which runs may differ.
        pool, normalize: what a row is (`features.POOLS`), and whether its length is 1.
        dtype: of the rows in the file.
        dim: the length of a row.
        batch: images that run together. Rounding depends on it, so that a resumed run takes the same batches.
    """

    model: str
    arch: str
    reduction: str
    precision: str
    preprocess: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: str
    normalize: bool
    dtype: str
    dim: int
    batch: int

    def check_same(self, other: "Index", where: str) -> None:
        """Raise InputError if `other`, found in a folder, has other facts; the message names the first that differs."""
        for field in [*fields(self)[1:], fields(self)[0]]:
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours == theirs:
                continue
            hint = " (its weights differ, or facts given by --assume)" if field.name == "model" else ""
            if field.name == "batch":
                hint = " (the last digits of a row depend on it; without --batch the folder's is taken)"
            name = field.name.replace("_", " ")
            raise InputError(
                f"{where}: {name} is {_shown(theirs)} there, {_shown(ours)} in this run{hint}; {_ELSEWHERE}"
            )


def _shown(value: object) -> str:
    return f"{value}".lower() if isinstance(value, bool) else f"{value}"


def read_index(out: Path) -> Index | None:
    """Return the index of an embedding's folder; None if there is no embedding in it yet.

    Raises:
        InputError: there are other files in it, or the index is damaged or of another version.
    """
    where = f"out: {out / INDEX}"
    try:
        content = json.loads((out / INDEX).read_text())
    except FileNotFoundError:
        if (out / FEATURES).exists() or any(name != IMAGES and name[0] != "." for name in _names(out)):
            raise InputError(f"out: {out}: has other files, and no {INDEX}; {_ELSEWHERE}") from None
        if (out / IMAGES).exists() and (out / IMAGES).stat().st_size:
            raise InputError(f"out: {out}: has {IMAGES}, but no {INDEX}; delete it, or {_ELSEWHERE}") from None
        return None
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: is damaged; delete the folder, or {_ELSEWHERE}") from None
    try:
        if content["version"] != VERSION:
            raise InputError(f"{where}: is of version {str(content['version'])[:20]}, not {VERSION}; {_ELSEWHERE}")
        found = Index(**{field.name: content[field.name] for field in fields(Index)})
        lists = {"mean": tuple(found.mean), "std": tuple(found.std)}
        return Index(**{**asdict(found), **lists})
    except (LookupError, TypeError):
        raise InputError(f"{where}: is no index of dvit-embed; {_ELSEWHERE}") from None


def _names(out: Path) -> list[str]:
    return os.listdir(out) if out.is_dir() else []


class EmbeddingFolder:
    """An open embedding, whose rows and lines are appended batch by batch.

    Attributes:
        path: of the folder.
        rows: (images, dim), memory-mapped.
        done: rows that are there.
        failed: the images among them without features, each with the reason.
    """

    def __init__(self, path: Path, rows: "np.memmap[Any, Any]", lines: LineFile, named: "_Named | None") -> None:
        self.path, self.rows, self._lines = path, rows, lines
        self.done, self.failed = (named.done, named.failed) if named else (0, [])
        self._pending: list[str] = []
        self._committed = time.monotonic()

    def append(self, features: np.ndarray, images: Sequence[tuple[str, str | None]]) -> None:
        """Add rows (n, dim), and lines of their images, each with its error if it has one; `commit` now and then.

        Raises:
            InputError: The disk is full, for example.
        """
        self.rows[self.done : self.done + len(images)] = features
        self.done += len(images)
        self.failed += [(path, why) for path, why in images if why is not None]
        self._pending += [json.dumps({"image": path} | ({} if why is None else {"error": why})) for path, why in images]
        if time.monotonic() - self._committed > COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """Write rows to the disk, and then their lines.

        Raises:
            InputError: The disk is full, for example.
        """
        if not self._pending:
            return
        try:
            self.rows.flush()
        except OSError as error:
            raise InputError(f"out: {self.path / FEATURES}: {reason(error)}") from None
        lines, self._pending = self._pending, []
        self._lines.append(lines)
        self._committed = time.monotonic()


@contextlib.contextmanager
def embedding_folder(
    path: str | Path, index: Index, images: int, found: Iterator[Entry]
) -> Iterator[tuple[EmbeddingFolder, Iterator[Entry]]]:
    """Open the folder of an embedding, or make it; yield it with the images that are not in it yet.

    The lines that are there must name the first of the images that were found, in their order; whole batches of them
    are kept, and all if they are all. If the block ends without an error, the index is marked as complete.

    Args:
        path: of the folder.
        index: the facts of this run.
        images: the number of images, for which there will be room.
        found: the images.

    Raises:
        InputError: The folder holds something else, other facts or other images, or there is no room on the disk. It is
            left unchanged, and if nothing was written yet, none is left.
    """
    out = check_output_folder(path, "out")
    read_index(out)  # before anything is written to a folder of something else
    new = not out.exists()
    try:
        out.mkdir(exist_ok=True)
        file = FileIO(out / IMAGES, "a+")
    except OSError as error:
        raise InputError(f"out: {out}: {reason(error)}") from None
    with file:
        claim(file, out / IMAGES)
        there = read_index(out)
        if there is not None:
            index.check_same(there, f"out: {out}")
        named = _Named(out, index.batch, images, found) if there is not None else None
        opened: EmbeddingFolder | None = None
        try:
            opened = _opened(out, index, images, file, named)
            try:
                yield opened, itertools.chain(named.left if named else (), found)
            finally:  # an interrupted run keeps what it did
                opened.commit()
            _write_index(out, index, images, complete=True)
        finally:
            if there is None and (opened is None or not opened.done):
                _remove(out, new)


class _Named:
    """The lines of a folder, compared with the images that were found.

    Attributes:
        done: lines that are kept.
        end: bytes of them.
        failed: images among them that could not be read, with their reasons.
        left: images that were found and have a line that is not kept.
    """

    def __init__(self, out: Path, batch: int, images: int, found: Iterator[Entry]) -> None:
        self.done = self.end = 0
        self.failed: list[tuple[str, str]] = []
        recent: deque[Entry] = deque(maxlen=batch)
        failed: list[tuple[str, str]] = []
        count = at = 0
        with open(out / IMAGES, "rb") as file:
            while (line := file.readline()).endswith(b"\n"):
                image, why = _image(out, count + 1, line)
                entry = next(found, None)
                if entry is None or entry.path != image:
                    raise _moved(out, count + 1, image, images, entry)
                recent.append(entry)
                count, at = count + 1, at + len(line)
                failed += [] if why is None else [(image, why)]
                if count % batch == 0 or count == images:
                    self.done, self.end, self.failed = count, at, self.failed + failed
                    failed = []
        self.left = list(recent)[len(recent) - (count - self.done) :]


def _image(out: Path, number: int, line: bytes) -> tuple[str, str | None]:
    try:
        content = json.loads(line)
        image, why = content["image"], content.get("error")
        if not isinstance(image, str) or not isinstance(why, str | None):
            raise TypeError
        return image, why
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise InputError(f"out: {out / IMAGES}: line {number} is none of dvit-embed; {_ELSEWHERE}") from None


def _moved(out: Path, number: int, image: str, images: int, entry: Entry | None) -> InputError:
    where = f"out: {out / IMAGES}: line {number} is {image!a}"
    if entry is None:
        return InputError(f"{where}, but only {images} images are found now; {_ELSEWHERE}")
    return InputError(
        f"{where}, where {entry.path!a} is found now; rows keep their images, so that only images that are named "
        f"behind all others can be added; {_ELSEWHERE}"
    )


def _opened(out: Path, index: Index, images: int, file: FileIO, named: _Named | None) -> EmbeddingFolder:
    target = out / FEATURES
    try:
        if named and named.done:
            _check_rows(target, index, named.done)
        else:
            target.unlink(missing_ok=True)
        if not named or named.done < images:
            _write_index(out, index, images, complete=False)
        _make_room(target, index, images)
        rows = np.lib.format.open_memmap(target, mode="r+")
        return EmbeddingFolder(out, rows, LineFile(out / IMAGES, file, named.end if named else 0), named)
    except OSError as error:
        raise InputError(f"out: {target}: {reason(error)}") from None


def _check_rows(path: Path, index: Index, done: int) -> None:
    """Raise InputError unless a file has at least the rows that are done."""
    why = ""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
        if rows.dtype != index.dtype or rows.ndim != 2 or rows.shape[1] != index.dim or not rows.flags.c_contiguous:
            why = f"holds {rows.dtype} of shape {rows.shape}; {index.dtype} of shape ({done}, {index.dim}) is expected"
        elif len(rows) < done:
            why = f"has {len(rows)} rows, {IMAGES} {done} lines"
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError as error:
        why = f"is damaged ({error})"
    if why:
        raise InputError(f"out: {path}: {why}; delete the folder, or {_ELSEWHERE}")


def _make_room(path: Path, index: Index, images: int) -> None:
    """Give a file the size and the header of so many rows; NumPy leaves room in the header for any number.

    Raises:
        OSError: The disk has no room for them.
    """
    header, dtype = BytesIO(), np.dtype(index.dtype)
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (images, index.dim)}
    np.lib.format.write_array_header_1_0(header, described)
    with open(path, "r+b" if path.exists() else "xb") as file:
        resize(file.fileno(), len(header.getvalue()) + images * index.dim * dtype.itemsize)
        file.write(header.getvalue())


def _write_index(out: Path, index: Index, images: int, *, complete: bool) -> None:
    content = {"version": VERSION, **asdict(index), "images": images, "complete": complete}
    with atomic_write(out / INDEX, "out") as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def _remove(out: Path, folder_too: bool) -> None:
    """Delete an embedding in which nothing is yet."""
    with contextlib.suppress(OSError):  # a system that keeps files that are open: a later run replaces them
        for name in (FEATURES, INDEX, IMAGES):
            (out / name).unlink(missing_ok=True)
        if folder_too:
            out.rmdir()
