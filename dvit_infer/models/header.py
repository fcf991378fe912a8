"""The header of a saved file: the JSON of its config, written and read; `saved.py` checks its values."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dvit_infer.config import Config
from dvit_infer.errors import InputError

WEIGHT_SETS = ("model", "state_dict", "state_dict_ema", "model_ema", "model_state", "teacher", "student")
HEADER_KEY = "dvit_infer"  # the safetensors metadata entry of a file this project saved
FORMAT = 2
# Of format 1, whose config was flat: the fields that became the body's, and those of the reduction.
_BODY_1 = (
    *("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "eps", "num_prefix"),
    *("stem_dim", "skip_lam"),
)
_REDUCTION_1 = ("method", "prune_at", "keep_rate", "predictor_eps")


def header_text(config: Config, labels: Mapping[int, str] | None = None) -> str:
    """Return the text that a file of this project holds under `HEADER_KEY`, with names of classes if there are any."""
    parts = asdict(config)
    for part in ("reduction", "learned"):
        parts[part]["settings"] = dict(parts[part]["settings"])
        del parts[part]["merges"]  # its method says so
    named = {} if labels is None else {"labels": {str(index): label for index, label in sorted(labels.items())}}
    return json.dumps({"format": FORMAT, "config": parts, **named})


def read_header(name: str, text: str) -> dict[str, Any]:
    """Return what `header_text` wrote into the file `name`, the config's fields as JSON; its values are not checked.

    Raises:
        InputError: the text is no such header, or has another version.
    """
    try:
        header = json.loads(text)
        version, config = header["format"], header["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{name}: its {HEADER_KEY} header is not the JSON this project writes") from None
    if version is True or version not in (1, FORMAT):
        raise InputError(f"{name}: its format is {str(version)[:20]}, this version reads formats 1 and {FORMAT}")
    if not isinstance(config, dict):
        raise InputError(f"{name}: its {HEADER_KEY} header is damaged at 'config'")
    return _from_version_1(name, config) if version == 1 else config


def _from_version_1(name: str, old: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a file of format 1 in the parts that it has now."""
    for key in (*_BODY_1, *_REDUCTION_1, "mean", "std"):
        if old.get(key) is None:
            raise InputError(f"{name}: its {HEADER_KEY} header does not say {key}")
    if later := old.keys() & {"body", "reduction", "learned"}:
        raise InputError(f"{name}: its {HEADER_KEY} header is damaged at {min(later)!r}")
    if not isinstance(old["prune_at"], list):
        raise InputError(f"{name}: its {HEADER_KEY} header is damaged at 'prune_at'")
    learned: dict[str, Any] = {}
    if old["prune_at"]:
        settings = {key: old[key] for key in ("keep_rate", "predictor_eps")}
        learned = {"method": "predictor", "stages": [{"block": b} for b in old["prune_at"]], "settings": settings}
    new = {key: value for key, value in old.items() if key not in (*_BODY_1, *_REDUCTION_1)}
    runs = {"method": old["method"]} if old["method"] == "none" else {**learned, "method": old["method"]}
    return {**new, "body": {key: old[key] for key in _BODY_1}, "reduction": runs, "learned": learned}
