"""Find the state dict in a loaded object, and give its tensors their official names."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dvit_infer.errors import InputError
from dvit_infer.models.header import WEIGHT_SETS
from dvit_infer.models.pickled import Inert

PREFIXES = ("module.", "backbone.", "_orig_mod.")

# Modules at the top of a model: the names of its parts, not of a wrapper.
_PARTS = ("blocks", "embeddings", "features", "head", "layers", "norm", "patch_embed", "score_predictor", "stages")
# What PyTorch's own loading skips or makes anew: counters of averaging and of thop, positions of tokens.
_NO_WEIGHTS = ("n_averaged", "position_ids", "total_ops", "total_params")
_GAMMA = re.compile(r"^(blocks\.\d+)\.gamma_([12])$")  # layer scale, as DeiT III calls what timm calls ls1 and ls2
# timm's Eva and Beit call it gamma_1 and gamma_2 too; these parts, or no pos_embed, are theirs alone.
_OF_EVA = re.compile(r"rope\.|rel_pos_bias\.|blocks\.\d+\.(attn\.(q_bias|q_proj\.|relative_position)|mlp\.fc1_g\.)")
_INDEX = re.compile(r"(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index")  # made anew from the grid
_MOST = 100_000  # dicts to look at


@dataclass(frozen=True)
class Found:
    """A state dict in an object, the key it lies under (None: it is the object), the others, and the trainer's args."""

    state: Mapping[Any, Any]
    key: str | None
    others: tuple[str, ...]
    args: Any


def find_weights(name: str, content: Any, wanted: str | None, or_bare: bool = False) -> Found:
    """Find the weights in what a file holds.

    Args:
        name: of the file, for messages.
        content: the loaded object.
        wanted: the key of the state dict, with dots between the keys of dicts in dicts; None: the first of
            `WEIGHT_SETS`, else the object itself, else the only state dict anywhere in it. A prefix of names may
            follow, for one of several models in a state dict.
        or_bare: whether weights without a key do for `wanted`.

    Raises:
        InputError: there are none, or several and none of them is known.
    """
    if isinstance(content, Inert):
        raise InputError(_whole_model(name, content, "") if content.is_module else f"{name}: holds a {content.name}")
    if not isinstance(content, Mapping):
        raise InputError(f"{name}: holds a {type(content).__name__}, no state dict")
    sets: dict[str, tuple[Mapping[Any, Any], Any]] = {
        key: (content[key], content) for key in WEIGHT_SETS if _is_state_dict(content.get(key))
    }
    is_bare = not sets and _is_state_dict(content) and not any(map(_is_state_dict, content.values()))
    if not is_bare:
        sets |= {path: found for path, found in _state_dicts(content) if path not in sets}
    if not is_bare and not sets:  # the names of a tiny model may have no dots
        sets = {key: (content[key], content) for key in WEIGHT_SETS if _has_tensors(content.get(key))}
        is_bare = not sets and _has_tensors(content)
    if isinstance(wanted, str) and wanted not in sets:
        sets |= _under_prefix(wanted, {"": (content, content)} if is_bare else sets)
        is_bare = is_bare and wanted not in sets
    wanted = None if or_bare and is_bare else wanted
    if wanted is not None and wanted not in list(sets):
        there = ", ".join(sets) if sets else "none: its weights are bare" if is_bare else "none"
        raise InputError(f"{name}: weights={wanted!r} is not in it; sets of weights there: {there}")
    if is_bare:
        return Found(content, None, (), None)
    if not sets:
        raise InputError(_none(name, content))
    known = next((key for key in sets if key in WEIGHT_SETS), None)
    if wanted is None and known is None and len(sets) > 1:
        counts = ", ".join(f"{path} ({len(state)} entries)" for path, (state, _) in list(sets.items())[:8])
        raise InputError(f"{name}: holds several state dicts: {counts}; assume weights=KEY says which")
    chosen = wanted or known or next(iter(sets))
    state, parent = sets[chosen]
    return Found(state, chosen, tuple(key for key in sets if key != chosen), parent.get("args", content.get("args")))


def official_names(
    name: str, state: Mapping[Any, Any], as_saved: bool = False
) -> tuple[dict[str, tuple[str, Any]], tuple[str, ...]]:
    """Return the entries of a state dict by their names without wrappers' prefixes, each with its key in the file.

    `as_saved`: layer scales keep their names, as in files that this project saved.

    Returns:
        Those that are weights, and the keys of those that are none.

    Raises:
        InputError: a key is no name, or two become the same.
    """
    for key in state:
        if not isinstance(key, str) or not key.isprintable() or not 0 < len(key) < 300:
            raise InputError(f"{name}: {str(key)[:40]!r} is no parameter name")
    skipped = [key for key in state if key.rpartition(".")[2] in _NO_WEIGHTS]
    keys = {key: _stripped(key) for key in state if key.rpartition(".")[2] not in _NO_WEIGHTS}
    stripped = [*PREFIXES]
    while prefix := _shared(keys.values()):
        stripped.append(prefix)
        keys = {key: _stripped(short.removeprefix(prefix)) for key, short in keys.items()}
    names = {*keys.values()}
    keeps_gamma = as_saved or "pos_embed" not in names or any(map(_OF_EVA.match, names))
    named: dict[str, tuple[str, Any]] = {}
    for key, stripped_key in keys.items():
        if _INDEX.fullmatch(stripped_key):
            skipped.append(key)
            continue
        short = stripped_key if keeps_gamma else _GAMMA.sub(r"\1.ls\2.gamma", stripped_key)
        if short in named:
            raise InputError(f"{name}: two tensors are called {short!r} once {', '.join(stripped)} are stripped")
        named[short] = key, state[key]
    if not named:
        raise InputError(f"{name}: holds no state dict, only {', '.join(skipped[:3])}")
    return named, tuple(skipped)


def _stripped(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p) and key != p), None):
        key = key.removeprefix(prefix)
    return key


def _shared(keys: Collection[str]) -> str:
    """Return the prefix, with its dot, that all keys share and that is a wrapper's, no part of a model; else ''."""
    paths = [key.split(".") for key in keys]
    columns = zip(*(path[:-1] for path in paths), strict=False)
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len({*parts}) == 1, columns)]
    if all(path[len(shared)].isdigit() for path in paths):  # the numbers of a list of modules, whose name it is
        shared = shared[:-1]
    shared = list(itertools.takewhile(lambda part: part not in _PARTS, shared))
    is_one_module = all(len(path) == len(shared) + 1 for path in paths)
    return "" if is_one_module else "".join(f"{part}." for part in shared)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _is_state_dict(value: Any) -> bool:
    """Return whether a dict holds tensors as models have them: some under names with a dot."""
    return isinstance(value, Mapping) and any(
        isinstance(v, torch.Tensor) and isinstance(key, str) and "." in key for key, v in value.items()
    )


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[tuple[str, tuple[Mapping[Any, Any], Any]]]:
    """Yield every state dict in a dict of dicts, with its path and the dict that holds it; the outermost come first."""
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    seen = {id(content)}
    while level and len(seen) < _MOST:
        deeper = []
        for path, parent in level:
            for key, value in parent.items():
                if not isinstance(value, Mapping) or not isinstance(key, str) or id(value) in seen:
                    continue
                if "optim" in key.lower():  # its state may be kept under the weights' names
                    continue
                seen.add(id(value))
                if _is_state_dict(value):
                    yield f"{path}{key}", (value, parent)
                else:
                    deeper.append((f"{path}{key}.", value))
        level = deeper


def _under_prefix(
    wanted: str, sets: Mapping[str, tuple[Mapping[Any, Any], Any]]
) -> dict[str, tuple[Mapping[Any, Any], Any]]:
    """Return the part of a state dict whose keys have a prefix, if `wanted` names its path and the prefix."""
    for path, (state, parent) in sets.items():
        prefix = wanted.removeprefix(f"{path}.") + "."
        if wanted.startswith(f"{path}." if path else ""):
            part = {key.removeprefix(prefix): v for key, v in state.items() if str(key).startswith(prefix)}
            if part:
                return {wanted: (part, parent)}
    return {}


def _none(name: str, content: Mapping[Any, Any]) -> str:
    """Return the line for an object without weights."""
    for key, value in content.items():
        if isinstance(value, Inert) and value.is_module:
            return _whole_model(name, value, f"[{str(key)[:40]!r}]")
    arrays = any(isinstance(value, np.ndarray) for value in content.values())
    keys = ", ".join(str(key)[:40] for key in list(content)[:8]) or "nothing"
    why = (
        "NumPy arrays, not tensors, are there" if arrays else "looked for tensors at the top and in the dicts below it"
    )
    return f"{name}: holds no state dict ({why}); its keys: {keys}"


def _whole_model(name: str, model: Inert, at: str) -> str:
    return (
        f"{name}: holds a whole model ({model.name}), which its own code alone can read; where that code is:"
        f" model = torch.load({name!r}, weights_only=False){at}; torch.save(model.state_dict(), 'weights.pth')"
    )
