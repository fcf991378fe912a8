"""Files of other owners' vision transformers, made from lists of names and shapes."""

import json
from pathlib import Path

import torch

from dvit_infer.models.checkpoint import Checkpoint, read_checkpoint

KEYS = Path(__file__).parents[1] / "golden" / "keys"
State = dict[str, torch.Tensor]


def file_of(case: str) -> State:
    """Tensors of the case's names and shapes, no two of whose values are equal in a tensor."""
    state: State = {}
    for i, (key, (dtype, shape)) in enumerate(json.loads((KEYS / f"{case}.json").read_text()).items()):
        count = torch.Size(shape).numel()
        values = torch.arange(count) if dtype == "int64" else torch.linspace(i, i + 0.5, count, dtype=torch.float32)
        state[key] = values.reshape(shape)
        if key.endswith("bias_mask"):
            state[key] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(count // 3)
    return state


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.state.keys() == b.state.keys() and all(torch.equal(a.state[key], b.state[key]) for key in a.state)


def timms() -> State:
    """A plain ViT under timm's names."""
    return {key: w for key, w in read_checkpoint(file_of("hf-vit-tiny")).state.items() if "head" not in key}
