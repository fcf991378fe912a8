"""Find images by file, folder (at any depth) or pattern, in order and in bounded memory."""

import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

from dvit_infer.errors import InputError
from dvit_infer.images.path_set import Names

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".heic", ".heif", ".hif"),
    )
)
IN_MEMORY = 10_000  # folder entries sorted in memory; more are sorted in a temporary database

_Part = Callable[[str], bool] | None  # does a name match? None: `**`, any number of folders


def find_images(arguments: Sequence[str]) -> Iterator[str]:
    """Yield paths of images: argument by argument, within a folder sorted by the names' bytes.

    A folder stands for every file below it with an image suffix (`SUFFIXES`, in any case), except hidden ones; links
    are followed. A pattern with `*`, `?`, `[...]` or `**` stands for its matches, including folders, unless a file has
    exactly that name. Memory does not grow with the number of files.

    Raises:
        InputError: An argument does not exist or contains no image. Raised at the call, before any path is yielded.
    """
    searches = [_search(argument) for argument in arguments]
    for argument, search in zip(arguments, searches, strict=True):
        if search is not None and next(_below(*search, ordered=False), None) is None:
            kind = "no image in this folder or below it" if os.path.isdir(argument) else "no image matches"
            raise InputError(f"{argument}: {kind}")
    return _found(arguments, searches)


def images_below(folder: str, *, ordered: bool = True) -> Iterator[str]:
    """Yield paths of the images in a folder and below it, like `find_images`; an empty folder is no error."""
    return _below(folder, (None, is_image), ordered=ordered)


def _found(arguments: Sequence[str], searches: Sequence[tuple[str, tuple[_Part, ...]] | None]) -> Iterator[str]:
    for argument, search in zip(arguments, searches, strict=True):
        if search is None:
            yield argument
        else:
            yield from _below(*search)


def _search(argument: str) -> tuple[str, tuple[_Part, ...]] | None:
    """Return the folder to search and the parts of the pattern; None if the argument is a file."""
    if "\0" in argument or not argument:
        raise InputError(f"{argument!a}: is not a file name")
    if os.path.isdir(argument):
        return argument, (None, is_image)
    if os.path.lexists(argument):
        return None
    if not re.search(r"[*?[]", argument):
        raise InputError(f"{argument}: there is no such file or folder")
    argument = argument.replace(os.altsep or os.sep, os.sep)  # Windows has two separators
    parts = [part for part in argument.split(os.sep) if part]
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?[]", part))
    folder = os.sep.join(parts[:first])
    wanted: list[_Part] = []
    for part in parts[first:]:
        if part != "**":
            wanted.append(_matcher(part))
        elif not wanted or wanted[-1] is not None:
            wanted.append(None)
    if wanted[-1] is None:
        wanted.append(is_image)
    return (os.sep if argument.startswith(os.sep) else "") + folder, tuple(wanted)


def _matcher(pattern: str) -> Callable[[str], bool]:
    matches = re.compile(fnmatch.translate(pattern)).match
    return lambda name: matches(name) is not None and (pattern[0] == "." or name[0] != ".")


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image and is not hidden."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


def _below(
    folder: str, parts: Sequence[_Part], above: frozenset[tuple[int, int]] = frozenset(), *, ordered: bool = True
) -> Iterator[str]:
    """Yield files below a folder whose path matches the parts; `above`: parent folders, as links may loop.

    Raises:
        OSError: a folder cannot be read.
    """
    if not os.path.isdir(folder or "."):
        return
    info = os.stat(folder or ".")
    if (info.st_dev, info.st_ino) in above:
        return
    above |= {(info.st_dev, info.st_ino)}
    at_any_depth = parts[0] is None
    here = parts[1:] if at_any_depth else parts
    matches = here[0]
    assert matches is not None

    def wanted(name: str, is_folder: bool) -> bool:
        return matches(name) or (at_any_depth and is_folder and name[0] != ".")

    for name, is_folder in _listing(folder or ".", wanted, ordered):
        path = os.path.join(folder, name)
        if not is_folder:
            if len(here) == 1:
                yield path
            continue
        if matches(name) and len(here) > 1:
            yield from _below(path, here[1:], above, ordered=ordered)
        if at_any_depth:
            yield from _below(path, parts, above, ordered=ordered)
        elif len(here) == 1:  # a pattern that matches a folder stands for the images in it
            yield from _below(path, (None, is_image), above, ordered=ordered)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _listing(folder: str, wanted: Callable[[str, bool], bool], ordered: bool) -> Iterator[tuple[str, bool]]:
    """Yield the wanted names in a folder, and whether each is a folder."""
    with os.scandir(folder) as entries:
        found = ((e.name, is_folder) for e in entries if wanted(e.name, is_folder := _is_folder(e)))
        if not ordered:
            yield from found
            return
        names = list(itertools.islice(found, IN_MEMORY))
        rest = next(found, None)
        if rest is not None:
            many = Names()
            many.add(names)
            many.add([rest])
            many.add(found)
            names.clear()
    yield from sorted(names, key=lambda entry: os.fsencode(entry[0])) if rest is None else many
