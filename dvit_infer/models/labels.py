"""Names of classes that a file states: by this project's trainer, in a saved header, or in a config.json beside it."""

import json
from collections.abc import Mapping
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import Checkpoint


def labels_of(checkpoint: Checkpoint, num_classes: int) -> dict[int, str] | None:
    """Return the names by class index, or None if there are none.

    Raises:
        InputError: those of a saved engine are damaged. A trainer's or another owner's that do not fit are not used.
    """
    if checkpoint.header is not None:
        return checked_labels(checkpoint.name, json.loads(checkpoint.header).get("labels"), num_classes)
    ours, config = checkpoint.metadata.get("dvit_infer"), checkpoint.beside.get("config.json")
    sources = [config, checkpoint.metadata]
    sources += [source.get("pretrained_cfg") for source in sources if isinstance(source, Mapping)]
    for found in (
        ours.get("classes") if isinstance(ours, Mapping) else None,
        config.get("id2label") if isinstance(config, Mapping) else None,
        *(_timms(source) for source in sources if isinstance(source, Mapping)),
    ):
        labels = _labels(found)
        if labels and labels.keys() == set(range(num_classes)) and not _say_nothing(labels):
            return labels
    return None


def _timms(description: Mapping[str, Any]) -> Any:
    """Return timm's names of classes, in place of each its description, if it has one."""
    names, described = description.get("label_names"), description.get("label_descriptions")
    if not isinstance(names, list | tuple | Mapping) or not isinstance(described, Mapping):
        return names
    texts = {name: text for name, text in described.items() if isinstance(text, str)}
    return {index: texts.get(name, name) for index, name in (_labels(names) or {}).items()}


def _say_nothing(labels: Mapping[int, str]) -> bool:
    """Return whether the names are those that Hugging Face gives to classes without one."""
    return all(label == f"LABEL_{index}" for index, label in labels.items())


def checked_labels(name: str, found: Any, num_classes: int) -> dict[int, str] | None:
    """Return names that this project stored in the file `name`; raise InputError unless they are of its classes."""
    labels = None if found is None else _labels(found)
    if not num_classes and not labels:
        return None
    if found is not None and (labels is None or not all(0 <= index < num_classes for index in labels)):
        raise InputError(f"{name}: its labels are not the JSON this project writes, a name for each of its classes")
    return labels


def _labels(found: Any) -> dict[int, str] | None:
    """Return a list of names, or an object of index and name, by index; None if it is neither."""
    items = (
        enumerate(found) if isinstance(found, list | tuple) else found.items() if isinstance(found, Mapping) else None
    )
    try:
        labels = None if items is None else {int(index): label for index, label in items}
    except (ValueError, TypeError):
        return None
    return labels if labels is not None and all(isinstance(text, str) for text in labels.values()) else None
