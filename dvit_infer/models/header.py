"""The header of a saved file: write its config as JSON, read it, and check every value."""

import json
from dataclasses import asdict, fields
from typing import Any

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models.facts import (
    block_indices,
    crop_pct,
    image_size,
    keep_rate,
    method,
    positive_float,
    positive_int,
    three_floats,
)

WEIGHT_SETS = ("model", "state_dict", "state_dict_ema", "model_ema", "model_state", "teacher", "student")
HEADER_KEY = "dvit_infer"  # the safetensors metadata entry of a file this project saved
FORMAT = 1
_OPTIONAL = ("crop_pct", "weights")  # keys that a saved config may omit or set to None
_FAMILIES = ("deit", "lvvit")
_MOST_BLOCKS = 1000


def header_text(config: Config) -> str:
    """Return the text that a file of this project holds under `HEADER_KEY`."""
    return json.dumps({"format": FORMAT, "config": asdict(config)})


def read_header(name: str, text: str) -> dict[str, Any]:
    """Return the config values, types unchecked, that `header_text` wrote into the file `name`.

    Raises:
        InputError: the text is no such header, or has another version.
    """
    try:
        header = json.loads(text)
        version, config = header["format"], header["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{name}: its {HEADER_KEY} header is not the JSON this project writes") from None
    if version is True or version != FORMAT:
        raise InputError(f"{name}: its format is {str(version)[:20]}, this version reads format {FORMAT}")
    names = {f.name for f in fields(Config)}
    if isinstance(config, dict):
        config = dict.fromkeys(_OPTIONAL) | config
    if not isinstance(config, dict) or config.keys() != names:
        wrong = sorted(names ^ config.keys())[0] if isinstance(config, dict) else "config"
        raise InputError(f"{name}: its {HEADER_KEY} header is damaged at {str(wrong)[:40]!r}")
    if empty := [key for key, value in config.items() if value is None and key not in _OPTIONAL]:
        raise InputError(f"{name}: its {HEADER_KEY} header does not say {empty[0]}")
    return config


def saved_config(name: str, text: str) -> Config:
    """Return the config in a file's header, as `header_text` wrote it.

    Args:
        name: the file name, for messages.
        text: the text of the header.

    Raises:
        InputError: the header has another version, or its values are impossible.
    """
    header = read_header(name, text)
    try:
        return _checked(header)
    except InputError as error:
        raise InputError(f"{name}: its {HEADER_KEY} header cannot be true: {error}") from None


def _checked(header: dict[str, Any]) -> Config:
    for key, allowed in (("family", _FAMILIES), ("weights", (None, *WEIGHT_SETS))):
        if header[key] not in allowed:
            raise InputError(f"{key}: {header[key]!r} is not known")
    if not isinstance(header["arch"], str) or not header["arch"].isprintable() or not header["arch"]:
        raise InputError(f"arch: {header['arch']!r} is no name")
    counts = ("patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_dim", "num_prefix")
    numbers = {key: positive_int(key, header[key]) for key in counts}
    if numbers["depth"] > _MOST_BLOCKS or numbers["embed_dim"] % numbers["num_heads"]:
        raise InputError(f"depth: {numbers['depth']} blocks of {numbers['num_heads']} heads cannot be")
    sizes = {key: image_size(key, header[key], numbers["patch_size"]) for key in ("image_size", "trained_size")}
    at = block_indices("prune_at", header["prune_at"], numbers["depth"], len(header["prune_at"] or ()))
    facts: dict[str, Any] = dict(
        arch=header["arch"],
        family=header["family"],
        **sizes,
        **numbers,
        method=method("method", header["method"], bool(at), "the file"),
        prune_at=at,
        keep_rate=keep_rate("keep_rate", header["keep_rate"]),
        **{key: positive_float(key, header[key]) for key in ("eps", "predictor_eps", "skip_lam")},
        stem_dim=0 if header["stem_dim"] == 0 else positive_int("stem_dim", header["stem_dim"]),
        mean=three_floats("mean", header["mean"], positive=False),
        std=three_floats("std", header["std"], positive=True),
        crop_pct=crop_pct("crop_pct", header["crop_pct"]),
        weights=header["weights"],
    )
    return Config(**facts)
