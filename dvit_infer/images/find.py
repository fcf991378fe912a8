"""Images found: files, folders with all that is below them, patterns; in order, in bounded memory."""

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
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
    )
)
IN_MEMORY = 10_000  # entries of a folder; more are sorted in a temporary database

_Part = Callable[[str], bool] | None  # does a name match? None: `**`, any number of folders


def find_images(arguments: Sequence[str]) -> Iterator[str]:
    """Paths of images: every argument's in turn, a folder's in the order of their names' bytes.

    A folder stands for every file below it that has an image's suffix (`SUFFIXES`, in any case), links followed, but
    for hidden ones; a pattern with `*`, `?`, `[...]` or `**` for what it matches, folders included, unless a file has
    just that name. Memory does not grow with the number of files.

    Raises:
        InputError: at once, naming it: an argument does not exist, or there is no image in it.
    """
    searches = [_search(argument) for argument in arguments]
    for argument, search in zip(arguments, searches, strict=True):
        if search is not None and next(_below(*search, ordered=False), None) is None:
            kind = "no image in this folder or below it" if os.path.isdir(argument) else "no image matches"
            raise InputError(f"{argument}: {kind}")
    return _found(arguments, searches)


def images_below(folder: str, *, ordered: bool = True) -> Iterator[str]:
    """Paths of the images in a folder and all folders below it, as `find_images`; none is no error."""
    return _below(folder, (None, _is_image), ordered=ordered)


def _found(arguments: Sequence[str], searches: Sequence[tuple[str, tuple[_Part, ...]] | None]) -> Iterator[str]:
    for argument, search in zip(arguments, searches, strict=True):
        if search is None:
            yield argument
        else:
            yield from _below(*search)


def _search(argument: str) -> tuple[str, tuple[_Part, ...]] | None:
    """In which folder to look, and for what; None: the argument is a file."""
    if "\0" in argument or not argument:
        raise InputError(f"{argument!a}: is no file's name")
    if os.path.isdir(argument):
        return argument, (None, _is_image)
    if os.path.lexists(argument):
        return None
    if not re.search(r"[*?[]", argument):
        raise InputError(f"{argument}: there is no such file or folder")
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
        wanted.append(_is_image)
    return (os.sep if argument.startswith(os.sep) else "") + folder, tuple(wanted)


def _matcher(pattern: str) -> Callable[[str], bool]:
    matches = re.compile(fnmatch.translate(pattern)).match
    return lambda name: matches(name) is not None and (pattern[0] == "." or name[0] != ".")


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


def _below(
    folder: str, parts: Sequence[_Part], above: frozenset[tuple[int, int]] = frozenset(), *, ordered: bool = True
) -> Iterator[str]:
    """Files below a folder whose path matches the parts; `above`: the folders that this one is in, for links may loop.

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
        elif len(here) == 1:  # a pattern that names folders means what is in them
            yield from _below(path, (None, _is_image), above, ordered=ordered)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _listing(folder: str, wanted: Callable[[str, bool], bool], ordered: bool) -> Iterator[tuple[str, bool]]:
    """Names in a folder that are wanted, and whether each is a folder."""
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
