"""The golden cases of other owners' vision transformers, written as a user has them; what their own code answered."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dvit_infer.images.synthetic import image
from dvit_infer.models.fill import fill

HERE = Path(__file__).parents[1] / "golden"
ROWS: list[dict[str, Any]] = json.loads((HERE / "cases_anyvit.json").read_text())
CASES = {row["id"]: row for row in ROWS}
_LARGE = json.loads((HERE / "keys" / "of_large_vits.json").read_text())  # shapes; # stands for each block's number
_CONFIGS = json.loads((HERE / "configs_anyvit.json").read_text())
State = dict[str, torch.Tensor]


def shapes_named(keys: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the list `keys`."""
    if keys not in _LARGE:
        listed = json.loads((HERE / "keys" / f"{keys}.json").read_text())
        return {name: tuple(shape) for name, (_, shape) in listed.items()}
    shapes, blocks = _LARGE[keys]["shapes"], _LARGE[keys]["blocks"]
    numbers = {name: range(blocks) if "#" in name else (0,) for name in shapes}
    return {name.replace("#", str(i)): tuple(shape) for name, shape in shapes.items() for i in numbers[name]}


def shapes_of(case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the case's file."""
    row = CASES[case]
    return shapes_named(row.get("keys", f"timm-{row['model']}"))


def _is_large(case: str) -> bool:
    return sum(map(math.prod, shapes_of(case).values())) > 5_000_000


TINY = [case for case in CASES if not _is_large(case)]
_VARIANTS = ("-tame", "-at-", "-full", "-bare", "-perblock", "-proj", "-v5names")  # of cases that the quick tests have
_QUICK = [case for case in TINY if not any(variant in case for variant in _VARIANTS)]
EVERY_CASE = [
    pytest.param(case, marks=() if case in _QUICK else pytest.mark.large if _is_large(case) else pytest.mark.slow)
    for case in CASES
]


@functools.lru_cache(maxsize=4)
def arrays(case: str) -> dict[str, np.ndarray]:
    """The weights, under the names of the file."""
    row = CASES[case]
    found = {}
    for name, shape in shapes_of(case).items():
        if name == "rope_embed.periods":
            found[name] = np.array(row["rope_periods"], np.float32)
        elif name.endswith("bias_mask"):
            found[name] = np.repeat(np.array([1, 0, 1], np.float32), shape[0] // 3)
        else:
            found[name] = np.ascontiguousarray(fill(name, shape, row["seed"], row.get("tame", False), row.get("loud")))
    return found


def state_dict(case: str) -> State:
    return {name: torch.from_numpy(array) for name, array in arrays(case).items()}


def config_of(case: str) -> dict[str, Any] | None:
    """The config.json of the case's folder; None: its owner writes none."""
    if "config" not in CASES[case]:
        return None
    config = dict(_CONFIGS[CASES[case]["config"]])
    if "id2label" in config:  # stored as their number
        names = [f"LABEL_{i}" for i in range(config["id2label"])]
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return config


def write(case: str, folder: Path) -> Path:
    """Write the weights as the owner does: a folder with config.json, an `.npz` file or a state dict in a `.pth`."""
    folder.mkdir(exist_ok=True)
    if CASES[case]["system"] == "big_vision":
        np.savez(folder / "model.npz", **arrays(case))
        return folder / "model.npz"
    config = config_of(case)
    if config is None:
        torch.save(state_dict(case), folder / "model.pth")
        return folder / "model.pth"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state_dict(case), folder / "model.safetensors")
    return folder


def assumptions(case: str) -> dict[str, Any]:
    """What the file as it is written does not say."""
    row = CASES[case]
    if row["system"] == "big_vision" or "config" in row:
        return {}
    known = {"num_heads": row["num_heads"], "eps": row["eps"]}
    return known | ({"act": row["act"]} if row["system"] == "open_clip" else {})


def size_of(case: str) -> tuple[int, int]:
    size = CASES[case]["image_size"]
    return tuple(size) if isinstance(size, list) else (size, size)


def options(case: str) -> dict[str, Any]:
    """What `convert` and `load_reference` are to be told."""
    return {"assume": assumptions(case), "image_size": size_of(case)}


def case_images(case: str) -> torch.Tensor:
    return torch.from_numpy(image(CASES[case]["batch"], size_of(case), CASES[case]["seed"]))


def answers(case: str, exact_gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The owner's logits or embedding, and a part of its tokens: every `token_stride`th, their first channels.

    An `.npz` was answered twice: with Flax's GELU, which is tanh, and, but for the tokens, with the exact one.
    """
    name = CASES[case].get("answer", "logits")
    with np.load(HERE / f"{case}.npz") as data:
        found = {key: torch.from_numpy(data[key]) for key in data.files}
    if exact_gelu:
        return found[name], None
    return found.get(f"{name}_tanh", found[name]), found.get("features")


def part(case: str, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens that `answers` holds."""
    row = CASES[case]
    return tokens[:, :: row["token_stride"], : row["feature_channels"]]
