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
    for found in (
        ours.get("classes") if isinstance(ours, Mapping) else None,
        config.get("id2label", config.get("label_names")) if isinstance(config, Mapping) else None,
    ):
        labels = _labels(found)
        if labels and labels.keys() == set(range(num_classes)):
            return labels
    return None


def checked_labels(name: str, found: Any, num_classes: int) -> dict[int, str] | None:
    """Return names that this project stored in the file `name`; raise InputError unless they are of its classes."""
    labels = None if found is None else _labels(found)
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
