"""Images with the classes that a trained model means: from class folders, an archive, or a file of labels."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dvit_infer.errors import InputError
from dvit_infer.images.archives import ArchivedFile, archived_files, class_folders, is_archive
from dvit_infer.images.class_names import Names, Resolved, Resolver
from dvit_infer.images.classes import ClassMap, LabelledFolder, list_class_folders
from dvit_infer.images.entry import Entry
from dvit_infer.images.find import images_below, is_image
from dvit_infer.images.label_files import read_labels
from dvit_infer.utils.text import listed, plural


class Labelled(Protocol):
    """Images and their classes; `str()` describes how the classes were found."""

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def images(self, *, ordered: bool = True) -> Iterator[Entry]:
        """Yield the images, each with its label."""
        ...


@dataclass(frozen=True)
class LabelledList:
    """Images whose classes do not follow from folders on disk; attributes as of `Labelled`."""

    entries: Sequence[Entry]
    description: str
    warnings: tuple[str, ...] = ()

    def images(self, *, ordered: bool = True) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return self.description


def labelled_images(
    path: str | Path,
    num_classes: int,
    *,
    classes: ClassMap | None = None,
    own: Mapping[int, str] | None = None,
    labels: str | Path | None = None,
) -> Labelled:
    """Find images and the classes that a model means, as `Resolver.resolve` describes.

    Args:
        path: a folder of class folders; a tar or zip of such folders, or with webdataset's pairs `key.jpg`, `key.cls`;
            with `labels` any folder or archive.
        num_classes: classes of the model.
        classes: the map of --classes.
        own: class names in the model's file.
        labels: a file that gives the class of each image (`label_files.read_labels`).

    Raises:
        InputError: There are no images, or it is not certain which classes they have.
    """
    return _labelled(str(path), labels, lambda where, noun: Resolver(where, noun, num_classes, classes, own))


def named_images(path: str | Path, names: Names, *, labels: str | Path | None = None) -> Labelled:
    """Find images whose classes are the names of their folders, or those in the file of labels.

    Args:
        path, labels: as for `labelled_images`.
        names: of the classes; names that are new are added.

    Raises:
        InputError: There are no images, or they have no classes.
    """
    return _labelled(str(path), labels, names.of)


_MakeResolver = Callable[[str, str], Resolver | Names]  # of what messages begin with, and of what has the names


def _labelled(where: str, labels: str | Path | None, resolver: _MakeResolver) -> Labelled:
    if labels is not None:
        return _by_file(where, labels, resolver(f"labels: {labels}", "class"))
    if is_archive(where):
        return _in_archive(where, resolver)
    return _in_folders(where, resolver(where, "class folder"))


def _in_folders(where: str, resolver: Resolver | Names) -> LabelledFolder:
    names, left_out = list_class_folders(where)
    empty = [n for n in names if next(images_below(os.path.join(where, n), ordered=False), None) is None]
    filled = [name for name in names if name not in set(empty)]
    if not filled:
        raise InputError(f"{where}: no image in any of its {len(names)} folders")
    found = resolver.resolve(filled, empty)
    notes = list(found.warnings)
    if empty:
        notes.append(f"{where}: no image in {len(empty)} of {plural(len(names), 'class folder')}: {listed(empty)}")
    notes += left_out
    with os.scandir(where) as entries:
        loose = sorted(entry.name for entry in entries if is_image(entry.name) and entry.is_file())
    if loose:
        notes.append(f"{where}: {plural(len(loose), 'image')} left out, in no class folder: {listed(loose)}")
    return LabelledFolder(where, found.classes, resolver.num_classes, found.how, tuple(notes))


def _by_file(where: str, labels: str | Path, resolver: Resolver | Names) -> LabelledList:
    file = read_labels(labels)
    images = _named_images(where)
    text, how = file.of_images(images)
    if not text:
        rows = f"{file.rows[0][1]!a} in line {file.rows[0][0]}, {next(iter(images))!a} there"
        raise InputError(f"labels: {labels}: names none of the {plural(len(images), 'image')} in {where} ({rows})")
    found = resolver.resolve(sorted(set(text.values())))
    notes = list(found.warnings)
    if missing := [name for name in images if name not in text]:
        notes.append(f"{where}: {plural(len(missing), 'image')} left out, not in {labels}: {listed(missing)}")
    if (unused := len(file.rows) - len(text)) > 0:
        notes.append(f"{labels}: {plural(unused, 'line')} of {len(file.rows)} without an image in {where}")
    entries = [replace(entry, label=found.classes[text[name]]) for name, entry in images.items() if name in text]
    return _listed(entries, found, resolver, f"{how}, in {labels}", notes)


def _named_images(where: str) -> dict[str, Entry]:
    """Return the images below a folder or in an archive, by their path there with slashes."""
    if is_archive(where):
        images = {file.name: file.entry for file in archived_files(where) if file.text is None}
    elif os.path.isdir(where):
        images = {os.path.relpath(path, where).replace(os.sep, "/"): Entry(path) for path in images_below(where)}
    else:
        raise InputError(f"{where}: is not a folder or archive" if os.path.lexists(where) else f"{where}: not there")
    if not images:
        raise InputError(f"{where}: no image in it")
    return images


def _in_archive(where: str, make: _MakeResolver) -> LabelledList:
    files = list(archived_files(where))
    images = [file for file in files if file.text is None]
    if not images:
        raise InputError(f"{where}: no image in this archive")
    pairs = {_key(file): file.text for file in files if file.text is not None}
    noun = "class" if pairs else "class folder"
    names = [pairs.get(_key(file)) or "" for file in images] if pairs else class_folders(images)
    resolver = make(where, noun)
    if not any(names):
        raise InputError(f"{where}: has no class folders and no .cls files; --labels FILE gives the classes")
    found = resolver.resolve(sorted(set(filter(None, names))))
    notes = list(found.warnings)
    if loose := [file.name for file, name in zip(images, names, strict=True) if not name]:
        lacking = "without a .cls file" if pairs else "in no class folder"
        notes.append(f"{where}: {plural(len(loose), 'image')} left out, {lacking}: {listed(loose)}")
    labelled = zip(images, names, strict=True)
    entries = [replace(file.entry, label=found.classes[name]) for file, name in labelled if name]
    return _listed(entries, found, resolver, ".cls files" if pairs else "", notes)


def _key(file: ArchivedFile) -> str:
    """Return webdataset's key: the path up to the first dot of the file name."""
    folder, slash, name = file.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _listed(
    entries: Sequence[Entry], found: Resolved, resolver: Resolver | Names, source: str, notes: Sequence[str]
) -> LabelledList:
    count = f"{plural(len(found.classes), resolver.noun)} for {plural(resolver.num_classes, 'class')}"
    how = f"{source}: {found.how}" if source else found.how
    return LabelledList(entries, f"{count}: {how}", tuple(notes))
