"""Class names, and class folders of images."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.images.find import images_below


@dataclass(frozen=True)
class ClassMap:
    """A class map as read from a file.

    Attributes:
        path: the file.
        labels: class names, for classes that have one.
        folders: the classes that a folder name may stand for; several if names are not unique.
    """

    path: str
    labels: Mapping[int, str]
    folders: Mapping[str, tuple[int, ...]]

    def of_folder(self, name: str) -> int:
        """Return the class of a folder.

        Raises:
            InputError: The map does not name it, or gives its name to several classes.
        """
        found = self.folders.get(name, ())
        if len(found) == 1:
            return found[0]
        if not found:
            raise InputError(f"classes: {self.path}: does not name the class folder {name!a}")
        raise InputError(f"classes: {self.path}: {name!a} is the name of classes {found[0]} and {found[1]}")


def read_classes(path: str | Path, num_classes: int) -> ClassMap:
    """Read a class map.

    Args:
        path: JSON: a list of names; {name: class}; {class: name}; or {class: [folder, name]}, which is ImageNet's
            `imagenet_class_index.json`.
        num_classes: number of classes of the model.

    Raises:
        InputError: The file cannot be read, has another structure, or an entry repeats a class or names one that the
            model does not have.
    """
    entries = _entries(path, _json(path))
    labels: dict[int, str] = {}
    folders: dict[str, tuple[int, ...]] = {}
    for key, index, names in entries:
        if not 0 <= index < num_classes:
            raise _wrong(path, key, f"is class {index}, but the model has classes 0 to {num_classes - 1}")
        if index in labels:
            raise _wrong(path, key, f"is class {index}, as {labels[index]!a} is")
        labels[index] = names[-1]
        for name in dict.fromkeys(names):
            folders[name] = (*folders.get(name, ()), index)
    return ClassMap(str(path), labels, folders)


@dataclass(frozen=True)
class LabelledFolder:
    """A folder of class folders, like ImageNet's, and the class of each; `str()` describes the mapping."""

    path: str
    labels: Mapping[str, int]
    num_classes: int
    map_path: str | None

    def entries(self, *, ordered: bool = True) -> Iterator[tuple[str, int]]:
        """Yield paths of images at any depth below a class folder, and their classes, sorted by class folder."""
        for name, label in self.labels.items():
            for path in images_below(os.path.join(self.path, name), ordered=ordered):
                yield path, label

    def __str__(self) -> str:
        count = f"{len(self.labels)} class folder{'s' if len(self.labels) > 1 else ''} for {self.num_classes} classes"
        if self.map_path is not None:
            return f"{count}: by {self.map_path}"
        return f"{count}: taken as classes 0 to {len(self.labels) - 1}, in the folders' order"


def labelled_folder(path: str | Path, num_classes: int, classes: ClassMap | None = None) -> LabelledFolder:
    """List the class folders. Without a map they are the classes in the order of their names.

    Raises:
        InputError: There is no such folder, no class folder in it, no image in any, more folders than classes, or a
            folder that the map does not name.
    """
    where = str(path)
    if not os.path.isdir(where):
        raise InputError(
            f"{where}: there is no such folder" if not os.path.lexists(where) else f"{where}: is no folder"
        )
    with os.scandir(where) as found:
        names = sorted(entry.name for entry in found if entry.name[0] != "." and os.path.isdir(entry.path))
    if not names:
        raise InputError(f"{where}: has no class folders; images are expected in a folder for each class")
    if classes is None and len(names) > num_classes:
        raise InputError(f"{where}: {len(names)} class folders, but the model has {num_classes} classes")
    labels = {name: index if classes is None else classes.of_folder(name) for index, name in enumerate(names)}
    labelled = LabelledFolder(where, labels, num_classes, None if classes is None else classes.path)
    if next(labelled.entries(ordered=False), None) is None:
        raise InputError(f"{where}: no image in any of its {len(names)} folders")
    return labelled


def _json(path: str | Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise _wrong(path, key, "is there twice")
            content[key] = value
        return content

    try:
        if not Path(path).is_file():
            raise InputError(f"classes: {path}: there is no such file")
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"classes: {path}: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"classes: {path}: is no JSON ({error})") from None


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
