"""The golden cases: what the official models answered, and their weights rebuilt from names and shapes."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import dvit_infer as dvit
from dvit_infer.images.synthetic import image
from dvit_infer.models.fill import fill
from dvit_infer.models.reference import TrainOutput

HERE = Path(__file__).parents[1] / "golden"
OFFICIAL: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text())
PEERS: list[dict[str, Any]] = json.loads((HERE / "cases_peers.json").read_text())
CASES = {case["id"]: case for case in OFFICIAL + PEERS}
_SMALL = ("tiny-", "timm-deit_tiny")  # the others take seconds, most of them for making weights
EVERY_CASE = [pytest.param(case, id=case, marks=() if case.startswith(_SMALL) else pytest.mark.large) for case in CASES]
FLOPS: dict[str, Any] = json.loads((HERE / "flops.json").read_text())
TRAINED_AS = {"dynamicvit-deit-256": "deit-256", "dynamicvit-deit-s": "deit-s", "dynamicvit-deit-b": "deit-b"}


def state_dict(keys: str, seed: int, tame: bool = False) -> dict[str, torch.Tensor]:
    shapes = json.loads((HERE / "keys" / f"{keys}.json").read_text())
    return {
        name: torch.from_numpy(np.asarray(fill(name, tuple(shape), seed, tame), dtype))
        for name, (dtype, shape) in shapes.items()
    }


def keys_of(case: dict[str, Any]) -> str:
    if case.get("system") == "timm":
        return f"timm-{case['model']}"
    if "variant" not in case:
        return str(case["id"])
    return case["variant"] + ("-384" if case["image_size"] == 384 else "")


@functools.lru_cache(maxsize=2)
def official_checkpoint(case_id: str) -> dict[str, Any]:
    """The case's weights as the official trainer (dynamic models) or its system saves them."""
    case = CASES[case_id]
    state = state_dict(keys_of(case), case["seed"], case.get("tame", False))
    if "keep_rate" not in case:
        return {"state_dict": state} if case["system"] == "token labeling" else {"model": state}
    args = argparse.Namespace(model=TRAINED_AS.get(case["variant"], "lvvit-s"), base_rate=case["keep_rate"], lr=1e-3)
    return {"model": state, "optimizer": {"state": {}}, "epoch": 29, "scaler": {}, "args": args}


def options(case_id: str) -> dict[str, Any]:
    """What a file of the case cannot say: the tiny models have heads and skips unlike any published one."""
    case, chosen = CASES[case_id], {}
    if case_id.startswith("tiny-"):
        chosen["assume"] = {"num_heads": 2, "skip_lam": 2.0} if "lvvit" in case_id else {"num_heads": 2}
    if "trained_size" in case:
        chosen["image_size"] = tuple(case["image_size"])
    return chosen


def case_images(case_id: str) -> torch.Tensor:
    case = CASES[case_id]
    size = case["image_size"]
    return torch.from_numpy(image(case["batch"], tuple(size) if isinstance(size, list) else size, case["seed"]))


def answers(case_id: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Logits, kept sets and the margins of their cuts, as the official model gave them."""
    with np.load(HERE / f"{case_id}.npz") as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files}
    kept = [arrays[f"kept{s}"].long() for s in range(3) if f"kept{s}" in arrays]
    return arrays["logits"], kept, arrays.get("margin", torch.empty(len(arrays["logits"]), 0))


def same_kept(ours: list[torch.Tensor], theirs: list[torch.Tensor], margin: torch.Tensor) -> bool:
    """The margin rule: compared only where the gap at this cut and at every earlier one is over 1e-5."""
    clear = torch.cumprod(margin > 1e-5, dim=1).bool()
    return all(torch.equal(a[clear[:, s]], b[clear[:, s]]) for s, (a, b) in enumerate(zip(ours, theirs, strict=True)))


def training_case(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[TrainOutput, TrainOutput, dict[str, torch.Tensor]]:
    """Student and teacher outputs of a training case, its Gumbel samples replaced by the plain argmax."""

    def argmax(logits: torch.Tensor, hard: bool) -> torch.Tensor:
        assert hard
        return F.one_hot(logits.argmax(-1), 2).to(logits.dtype)

    monkeypatch.setattr(F, "gumbel_softmax", argmax)
    variant, digits = name.removeprefix("train-").rsplit("-s", 1)
    seed = int(digits)
    assume = {"num_heads": 2} | ({"skip_lam": 2.0} if "lvvit" in variant else {})
    student = dvit.load_reference({"model": state_dict(variant, seed)}, assume=assume)
    dense = {k: v for k, v in state_dict(variant, seed + 100).items() if not k.startswith("score_predictor")}
    teacher = dvit.load_reference({"model": dense}, assume=assume)
    for model in (student, teacher):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    images = torch.from_numpy(image(3, 64 if "lvvit" in variant else 224, seed))
    golden = {key: torch.from_numpy(value) for key, value in np.load(HERE / f"{name}.npz").items()}
    out, expected = student(images), teacher(images)
    assert isinstance(out, TrainOutput)
    assert isinstance(expected, TrainOutput)
    return out, expected, golden
