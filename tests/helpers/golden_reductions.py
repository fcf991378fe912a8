"""The golden cases of EViT and ToMe: what their own code answered, and the files and options that ask for the same."""

import argparse
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from golden_vits import HERE, shapes_named

from dvit_infer.images.synthetic import image
from dvit_infer.models.fill import fill

ROWS: list[dict[str, Any]] = json.loads((HERE / "cases_reductions.json").read_text())
CASES = {row["id"]: row for row in ROWS}
QUICK = ("evit-deit-t-mixed", "evit-deit-t-tokens", "tome-deit_tiny_patch16_224-r8")  # the others take seconds
EVERY_CASE = [pytest.param(case, marks=() if case in QUICK else pytest.mark.large) for case in CASES]


@functools.lru_cache(maxsize=2)
def content(case: str) -> dict[str, Any]:
    """The case's checkpoint: EViT's trainer writes its settings beside the weights, ToMe has no file of its own."""
    row = CASES[case]
    state = {
        name: torch.from_numpy(np.ascontiguousarray(fill(name, shape, row["seed"], False, row["loud"])))
        for name, shape in shapes_named(row["keys"]).items()
    }
    if row["system"] == "tome":
        return state
    rate = row["keep_rate"] if isinstance(row["keep_rate"], float) else 0.7
    args = argparse.Namespace(base_keep_rate=rate, drop_loc=str(tuple(row["prune_at"])), fuse_token=row["fuse"])
    return {"model": state, "args": args}


def options(case: str) -> dict[str, Any]:
    """What `convert` and `load_reference` are to be told."""
    row = CASES[case]
    assume = {"num_heads": row["num_heads"]}
    if row["system"] == "evit":
        asked = {"keep_rate": row["keep_rate"]} if isinstance(row["keep_rate"], list) else {}
        return {"assume": assume, "image_size": row["image_size"], **asked}
    assume |= {what: row[what] for what in ("eps", "prop_attn")}
    assume |= {"pool": row["pool"], "act": "gelu"} if row["pool"] != "token" or row["eps"] != 1e-6 else {}
    return {"assume": assume, "method": "tome", "merge": row["merge"]}


def case_images(case: str) -> torch.Tensor:
    row = CASES[case]
    return torch.from_numpy(image(row["batch"], row["image_size"], row["seed"]))


def answers(case: str) -> dict[str, torch.Tensor]:
    """Logits (or `pooled`), and what is there of `kept0..2`, or `group`, `order`, `size` or `group_sizes`; `margin`."""
    with np.load(HERE / f"{case}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def same_choice(case: str, kept: list[torch.Tensor], positions: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """Whether each image's choices are the owner's, as far as its answers show them: (B,).

    Args:
        case: its id.
        kept: as an engine returns them.
        positions: of the patch tokens at last.
        num_prefix: the owner of ToMe counts these tokens too.
    """
    theirs = answers(case)
    if "logits" in theirs and "kept0" in theirs:
        stages = [theirs[f"kept{s}"] for s in range(3) if f"kept{s}" in theirs]
        return torch.stack([(a == b).all(dim=1) for a, b in zip(kept, stages, strict=False)]).all(dim=0)
    groups = kept[-1]
    held = torch.zeros_like(groups).scatter_add(1, groups, torch.ones_like(groups))
    sizes = torch.cat([held.new_ones(len(held), num_prefix), held.gather(1, positions)], dim=1)
    if "group_sizes" in theirs:
        return (sizes.sort(dim=1).values == theirs["group_sizes"].sort(dim=1).values).all(dim=1)
    same = (groups == theirs["group"][:, num_prefix:] - num_prefix).all(dim=1)
    same &= (positions == theirs["order"][:, num_prefix:] - num_prefix).all(dim=1)
    return same & (sizes == theirs["size"]).all(dim=1)
