"""Literal tables of names, and the loop that applies one to the keys of a file."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from dvit_infer.errors import InputError
from dvit_infer.models.vit.names.draft import Draft

How = Callable[[torch.Tensor], torch.Tensor]
# A key's new name, and how its values are put in another order. A key that ends in .* stands for .weight and .bias.
Row = str | tuple[str, How]
Rows = Mapping[str, Row]


class Table(NamedTuple):
    """The names of one owner's models.

    Attributes:
        owner: the value of the fact 'owner'.
        whose: the owner and the model, for notes.
        anchor: a key that all such files have; what stands before it is the prefix of `block` and `rest`.
        blocks: what stands before a block's rows, with {i} for its number and {c} for one that does not count.
        block: rows of a block.
        rest: rows of the other parts under the prefix.
        top: rows of parts at the top, where no prefix stands.
        unused: under the prefix, keys, or beginnings of keys with a star, and why they are not used.
        beside: the same at the top, where there is a prefix to tell them from the model's own.
        finish: completes the translation: joins parts, states facts.
        signs: patterns, for each of which some key is in such files, and not in others with the same anchor.
        timms: what stands, under the prefix, before names that are timm's already; None: there are none.
        into: whose names they become.
    """

    owner: str
    whose: str
    anchor: str
    blocks: tuple[str, ...]
    block: Rows
    rest: Rows
    top: Rows
    unused: Mapping[str, str]
    beside: Mapping[str, str]
    finish: Callable[[Draft], None]
    signs: tuple[str, ...] = ()
    timms: str | None = None
    into: str = "timm's"


class Place(NamedTuple):
    """Where a key goes: its new name, how its values change, and the row; or why it is not used."""

    to: str = ""
    how: How | None = None
    row: str = ""
    block: int = -1
    unused: tuple[str, str] | None = None


def prefix_of(table: Table, keys: Mapping[str, object]) -> str | None:
    """Return the prefix of a file's keys, or None if they are not the table's."""
    if not all(any(re.search(sign, key) for key in keys) for sign in table.signs):
        return None
    anchors = [key for key in keys if key == table.anchor or key.endswith((f".{table.anchor}", f"/{table.anchor}"))]
    for anchor in sorted(anchors, key=len):
        prefix = anchor.removesuffix(table.anchor)
        if any(place.block >= 0 for key in keys if (place := place_of(table, prefix, key)) is not None):
            return prefix
    return None


def place_of(table: Table, prefix: str, key: str) -> Place | None:
    """Return where a key goes; None: the table does not have it."""
    if key.startswith(prefix):
        inner = key.removeprefix(prefix)
        for before in table.blocks:
            if found := _pattern(before).match(inner):
                number, rest = int(found[1]), inner[found.end() :]
                if (row := _row(table.block, rest)) is not None:
                    to, how = row
                    return Place(f"blocks.{number}.{to}", how, before + rest, number)
        if (row := _row(table.rest, inner)) is not None:
            return Place(*row, inner)
    if (row := _row(table.top, key)) is not None:
        return Place(*row, key)
    for before, patterns in ((prefix, table.unused), ("", table.beside if prefix else {})):
        for pattern, why in patterns.items():
            whole, beginning = before + pattern, before + pattern.removesuffix("*")
            if key.startswith(beginning) if beginning != whole else key == whole:
                return Place(unused=(whole, why))
    if table.timms is None or not key.startswith(prefix + table.timms):
        return None
    to = key.removeprefix(prefix + table.timms)
    found = re.match(r"blocks\.(\d{1,4})\.", to)
    if found is None:
        return Place(to, None, table.timms + to)
    return Place(to, None, f"{table.timms}blocks.{{i}}.{to[found.end() :]}", int(found[1]))


@functools.cache
def _pattern(before: str) -> re.Pattern[str]:
    return re.compile(re.escape(before).replace(r"\{i\}", r"(\d{1,4})").replace(r"\{c\}", r"\d+"))


def _row(rows: Rows, key: str) -> tuple[str, How | None] | None:
    row = rows.get(key)
    if row is None:
        module, _, leaf = key.rpartition(".")
        starred = rows.get(f"{module}.*") if leaf in ("weight", "bias") else None
        return None if not isinstance(starred, str) else (starred.removesuffix("*") + leaf, None)
    return (row, None) if isinstance(row, str) else row


class Plan(NamedTuple):
    """A table, the prefix in a file, and where each of its keys goes."""

    table: Table
    prefix: str
    places: Mapping[str, Place]


def plan(name: str, table: Table, prefix: str, keys: Mapping[str, str]) -> Plan:
    """Return where every key goes.

    Args:
        name: of the file, for messages.
        table: whose names they are.
        prefix: see `prefix_of`.
        keys: the keys without wrappers' prefixes -> the keys in the file.

    Raises:
        InputError: a key is unknown, or two become the same; the message names the key in the file.
    """
    places: dict[str, Place] = {}
    seen: dict[str, str] = {}
    for key, in_file in keys.items():
        place = place_of(table, prefix, key)
        if place is None:
            is_outside = table.top and prefix and not key.startswith(prefix)
            heads = f"; its heads are called {', '.join(table.top)}" if is_outside else ""
            raise InputError(f"{name}: unexpected key {in_file}: {table.whose} has no such name{heads}")
        if place.to and place.to in seen:
            raise InputError(f"{name}: {seen[place.to]} and {in_file} are the same part of {table.whose}")
        if place.to:
            seen[place.to] = in_file
        places[key] = place
    return Plan(table, prefix, places)


def apply(name: str, plan: Plan, state: dict[str, torch.Tensor], keys: Mapping[str, str]) -> Draft:
    """Return the tensors under their new names.

    Args:
        name: of the file, for messages.
        plan: where each key goes.
        state: the tensors that are used at least; it is emptied of them, so that none is held beside its new form.
        keys: as for `plan`.
    """
    table, prefix, places = plan
    used = {key: place for key, place in places.items() if place.unused is None}
    draft = Draft(name, {}, {place.to: keys[key] for key, place in used.items()}, prefix=prefix)
    draft.shapes = {place.to: tuple(state[key].shape) for key, place in used.items()}
    draft.depth = 1 + max((place.block for place in used.values()), default=-1)
    hows = {}
    for key, place in used.items():
        draft.state[place.to] = state.pop(key)
        if place.how is not None:
            hows[place.to] = place.how
    for key, place in places.items():
        if place.unused is not None:
            pattern, why = place.unused
            draft.left_over[_in_file(pattern, key, keys[key])] = why
    draft.left_over = dict(sorted(draft.left_over.items()))
    for to, how in hows.items():
        draft.change(to, how)
    draft.files = {**_of_missing(table, prefix, used, draft.depth), **draft.files}
    if draft.shapes.get("reg_token", ())[1:2] == (0,):
        draft.drop("reg_token", "it is empty: the model has no registers")
    table.finish(draft)
    return draft


def _in_file(pattern: str, key: str, in_file: str) -> str:
    """Return a pattern with the wrappers' prefix that a key has in the file."""
    return in_file.removesuffix(key) + pattern if in_file.endswith(key) else pattern


def _of_missing(table: Table, prefix: str, used: Mapping[str, Place], depth: int) -> dict[str, str]:
    """Return the keys that parts would have in the file, by their new names: in every block as in the others."""
    files: dict[str, str] = {}
    for place in used.values():
        if place.block >= 0:
            part = place.to.split(".", 2)[2]
            for i in range(depth if depth <= len(used) else 0):
                files.setdefault(f"blocks.{i}.{part}", prefix + place.row.replace("{c}", "*").replace("{i}", str(i)))
    for rows, before in ((table.rest, prefix), (table.top, "")):
        for key, row in rows.items():
            to = row if isinstance(row, str) else row[0]
            for leaf in ("weight", "bias") if key.endswith("*") else ("",):
                files.setdefault(to.removesuffix("*") + leaf, before + key.removesuffix("*") + leaf)
    return files
