"""The golden cases of models of four stages: what the official models answered, and their weights rebuilt."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvit_infer.images.synthetic import image
from dvit_infer.models.fill import fill

HERE = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in json.loads((HERE / "cases_hierarchical.json").read_text())
}
SMALL = [case for case in CASES if "tiny-" in case.replace("swin_tiny-", "").replace("convnext_tiny-", "")]
EVERY_CASE = [pytest.param(case, marks=() if case in SMALL else pytest.mark.slow) for case in CASES]


def state_dict(case: str, keys: str | None = None) -> dict[str, torch.Tensor]:
    """Return the weights of a case; buffers, which the model makes itself, are zeros."""
    facts = CASES[case]
    scaled = facts.get("scaled", {"by": 1.0, "names_ending": []})
    state = {}
    for name, (dtype, shape) in json.loads((HERE / "keys" / f"{keys or facts['keys']}.json").read_text()).items():
        if name.endswith(("relative_position_index", "attn_mask")):
            state[name] = torch.zeros(shape, dtype=torch.int64 if dtype == "int64" else torch.float32)
            continue
        by = np.float32(scaled["by"] if name.endswith(tuple(scaled["names_ending"])) else 1.0)
        state[name] = torch.from_numpy(fill(name, tuple(shape), facts["seed"]) * by)
    return state


def checkpoint(case: str) -> dict[str, Any]:
    """Return the weights as the official trainer saves them, or bare."""
    if "keep_rate" not in CASES[case]:
        return state_dict(case)
    return {"model": state_dict(case), "epoch": 1, "args": argparse.Namespace(base_rate=CASES[case]["keep_rate"])}


def small_checkpoint(case: str) -> dict[str, Any]:
    """Return the weights of a dynamic case for images of 64x64, a Swin's with windows of 2x2."""
    found = checkpoint(case)
    model = {n: w for n, w in found["model"].items() if not n.endswith(("relative_position_index", "attn_mask"))}
    tables = {name: w[:9].clone() for name, w in model.items() if name.endswith("relative_position_bias_table")}
    return found | {"model": model | tables}


def options(case: str) -> dict[str, Any]:
    size = CASES[case]["image_size"]
    return {} if size == 224 else {"image_size": tuple(size)}


def images(case: str) -> torch.Tensor:
    size = CASES[case]["image_size"]
    size = size if isinstance(size, int) else tuple(size)
    return torch.from_numpy(image(CASES[case]["batch"], size, CASES[case]["seed"]))


def answers(case: str) -> dict[str, torch.Tensor]:
    """Return logits, and features or kept sets with the margins of their cuts, as the official model gave them."""
    with np.load(HERE / f"{case}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def kept_of(golden: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [golden[f"kept{stage}"].long() for stage in range(3) if f"kept{stage}" in golden]
