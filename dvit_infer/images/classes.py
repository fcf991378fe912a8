"""Class names, and class folders of images."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.images.class_lists import parse
from dvit_infer.images.entry import Entry
from dvit_infer.images.find import images_below
from dvit_infer.utils.text import listed, plural

LEAVINGS = frozenset(("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information", "__pycache__"))


@dataclass(frozen=True)
class ClassMap:
    """A class map as read from a file.

    Attributes:
        path: the file.
        labels: class names, for classes that have one.
        folders: the classes that a folder name may stand for; several if names are not unique.
        numbers: the classes that ILSVRC's own numbers stand for, if the file has them.
    """

    path: str
    labels: Mapping[int, str]
    folders: Mapping[str, tuple[int, ...]]
    numbers: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def of_labels(path: str, labels: Mapping[int, str]) -> "ClassMap":
        """Return the map of class names alone."""
        folders: dict[str, tuple[int, ...]] = {}
        for index, name in labels.items():
            folders[name] = (*folders.get(name, ()), index)
        return ClassMap(path, labels, folders)

    def of_name(self, name: str) -> tuple[int, ...]:
        """Return the classes of a name: of exactly this one, else regardless of case, `_` and further synonyms."""
        return self.folders.get(name) or self._plain.get(_plain(name), ())

    def of_folder(self, name: str) -> int:
        """Return the class of a folder.

        Raises:
            InputError: The map does not name it, or gives its name to several classes.
        """
        found = self.of_name(name)
        if len(found) == 1:
            return found[0]
        if not found:
            raise InputError(f"classes: {self.path}: does not name the class folder {name!a}")
        raise InputError(f"classes: {self.path}: {name!a} is the name of classes {found[0]} and {found[1]}")

    @cached_property
    def _plain(self) -> dict[str, tuple[int, ...]]:
        plain: dict[str, tuple[int, ...]] = {}
        for name, classes in self.folders.items():
            plain[_plain(name)] = tuple(dict.fromkeys((*plain.get(_plain(name), ()), *classes)))
        return plain


def _plain(name: str) -> str:
    return name.partition(",")[0].replace("_", " ").strip().casefold()


def read_classes(path: str | Path, num_classes: int) -> ClassMap:
    """Read a class map.

    Args:
        path: JSON: a list of names; {name: class}; {class: name}; or {class: [folder, name]}, which is ImageNet's
            `imagenet_class_index.json`. Or text, as `class_lists.parse` describes: a name a line, for example.
        num_classes: number of classes of the model.

    Raises:
        InputError: The file cannot be read, has another structure, or an entry repeats a class or names one that the
            model does not have.
    """
    text = _text(path)
    if is_json := str(path).lower().endswith(".json") or text.lstrip()[:1] in ("{", "["):
        entries = _entries(path, _json(path, text))
    else:
        lines = parse(text, lambda line, why: InputError(f"classes: {path}: line {line} {why}"))
        entries = [(line, index, names) for line, index, names, _ in lines]
    begins_at_1 = sorted(index for _, index, _ in entries) == list(range(1, num_classes + 1))
    labels: dict[int, str] = {}
    folders: dict[str, tuple[int, ...]] = {}
    for key, index, names in entries:
        where = f"classes: {path}: " + (f"entry {str(key)[:80]!a}" if is_json else f"line {key}")
        if not 0 <= index < num_classes:
            hint = "; these begin at 1, subtract 1 from each" if begins_at_1 else ""
            raise InputError(f"{where} is class {index}, but the model has classes 0 to {num_classes - 1}{hint}")
        if index in labels:
            raise InputError(f"{where} is class {index}, as {labels[index]!a} is")
        labels[index] = names[-1]
        for name in dict.fromkeys(names):
            folders[name] = (*folders.get(name, ()), index)
    ilsvrc = {} if is_json else {line.ilsvrc: line.label for line in lines if line.ilsvrc is not None}
    if ilsvrc and len(entries) != num_classes:
        count = f"has {len(entries)} of ILSVRC's ids, but the model has {num_classes} classes"
        raise InputError(f"classes: {path}: {count}")
    return ClassMap(str(path), labels, folders, ilsvrc)


@dataclass(frozen=True)
class LabelledFolder:
    """A folder of class folders, like ImageNet's, and the class of each; `str()` describes the mapping.

    Attributes:
        how: how the classes were found.
        warnings: what may be wrong with that, one line each.
    """

    path: str
    labels: Mapping[str, int]
    num_classes: int
    how: str
    warnings: tuple[str, ...] = ()

    def entries(self, *, ordered: bool = True) -> Iterator[tuple[str, int]]:
        """Yield paths of images at any depth below a class folder, and their classes, sorted by class folder."""
        for image in self.images(ordered=ordered):
            assert image.label is not None
            yield image.path, image.label

    def images(self, *, ordered: bool = True) -> Iterator[Entry]:
        """Yield the images of `entries`."""
        for name, label in self.labels.items():
            for path in images_below(os.path.join(self.path, name), ordered=ordered):
                yield Entry(path, label)

    def __str__(self) -> str:
        count = f"{len(self.labels)} class folder{'s' if len(self.labels) > 1 else ''} for {self.num_classes} classes"
        return f"{count}: {self.how}"


def list_class_folders(where: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the sorted names of a folder's class folders, and a line on those that are none, if there are any.

    Raises:
        InputError: There is no such folder, or no class folder in it.
    """
    if not os.path.isdir(where):
        raise InputError(
            f"{where}: there is no such folder" if not os.path.lexists(where) else f"{where}: is not a folder"
        )
    with os.scandir(where) as found:
        every = sorted(entry.name for entry in found if os.path.isdir(entry.path))
    names = [name for name in every if name[0] != "." and name.casefold() not in LEAVINGS]
    if not names:
        tables = sorted(name for name in os.listdir(where) if name.lower().endswith((".csv", ".tsv", ".txt")))
        hint = f"; --labels {os.path.join(where, tables[0])} would take them from there" if len(tables) == 1 else ""
        raise InputError(
            f"{where}: has no class folders; images are expected in a folder for each class, or their classes in a "
            f"file given by --labels{hint}"
        )
    if not (others := sorted(set(every) - set(names))):
        return names, ()
    return names, (f"{where}: {plural(len(others), 'folder')} left out, hidden or left by a tool: {listed(others)}",)


def labelled_folder(path: str | Path, num_classes: int, classes: ClassMap | None = None) -> LabelledFolder:
    """List the class folders to learn from. Without a map they are the classes in the order of their names.

    Names that are all whole numbers are in the order of the numbers. `labelled.labelled_images` finds the classes that
    a trained model means.

    Raises:
        InputError: There is no such folder, no class folder in it, no image in any, more folders than classes, or a
            folder that the map does not name.
    """
    where = str(path)
    names, left_out = list_class_folders(where)
    if all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    if classes is None and len(names) > num_classes:
        raise InputError(f"{where}: {len(names)} class folders, but the model has {num_classes} classes")
    labels = {name: index if classes is None else classes.of_folder(name) for index, name in enumerate(names)}
    in_order = f"taken as classes 0 to {len(labels) - 1}, in the folders' order"
    how = in_order if classes is None else f"by {classes.path}"
    labelled = LabelledFolder(where, labels, num_classes, how, left_out)
    if next(labelled.entries(ordered=False), None) is None:
        raise InputError(f"{where}: no image in any of its {len(names)} folders")
    return labelled


def _text(path: str | Path) -> str:
    try:
        if not Path(path).is_file():
            raise InputError(f"classes: {path}: there is no such file")
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"classes: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        kind = "not JSON" if str(path).lower().endswith(".json") else "not text in UTF-8"
        raise InputError(f"classes: {path}: is {kind} ({error})") from None


def _json(path: str | Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise _wrong(path, key, "is there twice")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"classes: {path}: is not JSON ({error})") from None


def _entries(path: str | Path, content: Any) -> list[tuple[object, int, list[str]]]:
    """Return for each entry its name in messages, its class, and the class's names."""
    if isinstance(content, list):
        return [(index, index, _names(path, index, value)) for index, value in enumerate(content)]
    if not isinstance(content, dict) or not content:
        raise InputError(f"classes: {path}: a list of names, or an object of names and classes, is expected")
    if all(type(value) is int for value in content.values()):
        return [(key, value, _names(path, key, key)) for key, value in content.items()]
    entries: list[tuple[object, int, list[str]]] = []
    for key, value in content.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise _wrong(path, key, f"is {str(value)[:40]!a}; a whole number is expected there, or as the entry")
        entries.append((key, int(key), _names(path, key, value)))
    return entries


def _names(path: str | Path, key: object, value: Any) -> list[str]:
    names = value if isinstance(value, list) and value else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise _wrong(path, key, f"is {str(value)[:40]!a}; a name is expected")
    return names


def _wrong(path: str | Path, key: object, what: str) -> InputError:
    return InputError(f"classes: {path}: entry {str(key)[:80]!a} {what}")
