"""Keys of models of four stages -> the official ones, by a function for each owner."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.vit.names.draft import Draft
from dvit_infer.models.vit.names.table import Place, Plan, Table


def plan_by(
    name: str,
    keys: Mapping[str, str],
    whose: str,
    place: Callable[[str], Place],
    finish: Callable[[Draft], None],
    owner: str = "",
) -> Plan:
    """Return where every key goes.

    Args:
        name: of the file, for messages.
        keys: the keys without wrappers' prefixes -> the keys in the file.
        whose: the owner and the model, for notes.
        place: returns where a key goes.
        finish: states what follows from the keys.
        owner: whose names they are, if they change.

    Raises:
        InputError: two keys become the same.
    """
    places: dict[str, Place] = {}
    seen: dict[str, str] = {}
    for key, in_file in keys.items():
        places[key] = found = place(key)
        if found.to and found.to in seen:
            raise InputError(f"{name}: {seen[found.to]} and {in_file} are the same part of {whose}")
        seen[found.to] = in_file
    table = Table(owner, whose, "", (), {}, {}, {}, {}, {}, finish, into="the official ones")
    return Plan(table, "", places)


def load_renamed(model: nn.Module, weights: Mapping[str, torch.Tensor], rename: Callable[[str], str]) -> nn.Module:
    """Return timm's model with weights under their official names.

    Raises:
        InputError: they do not fit.
    """
    try:
        model.load_state_dict({rename(key): tensor for key, tensor in weights.items()})
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise InputError(f"compare: timm's {type(model).__name__} has other weights: {why}; leave timm out") from None
    return model
