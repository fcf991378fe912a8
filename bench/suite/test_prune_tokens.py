"""prune_tokens against the predictor, the sort and the gather in eager PyTorch: the three stages of DeiT-S/0.7."""

import pytest
import torch

import dvit_infer as dvit
from dvit_infer.models.example import example_checkpoint

STAGES = ((196, 137), (137, 96), (96, 67))  # patch tokens in, kept
EPS = 1e-5


@pytest.fixture(scope="module")
def predictors() -> torch.nn.ModuleList:
    return dvit.load_reference(example_checkpoint("dynamicvit-deit-s")).score_predictor


def eager(predictor: torch.nn.Module, x: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Prune like the reference model."""
    logits = predictor(x[:, 1:]).float()
    order = (logits[..., 0] - logits[..., 1]).sort(dim=1, descending=True, stable=True).indices
    rows = torch.cat([order.new_zeros(len(x), 1), order[:, :num_keep].sort(dim=1).values + 1], dim=1)
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


@pytest.mark.parametrize("stage", range(len(STAGES)))
@pytest.mark.parametrize("runtime", ["eager", "op"])
def test_prune_tokens(stage, runtime, predictors, device, dtype, batch, timed):
    n, num_keep = STAGES[stage]
    x = torch.randn(batch, n + 1, 384, generator=torch.Generator().manual_seed(stage)).to(device, dtype)
    predictor = predictors[stage].to(device, dtype)
    packed = dvit.pack_predictor(predictor, dtype)
    calls = {
        "eager": lambda: eager(predictor, x, num_keep),
        "op": lambda: torch.ops.dvit.prune_tokens(x, packed, num_keep, 1, EPS)[0],
    }
    # Near ties may differ in bfloat16; the tests compare the op with the reference.
    right = calls["eager" if dtype == torch.float32 else runtime]().float()
    row = {"op": "prune_tokens", "runtime": runtime, "batch": batch, "shape": [n + 1, 384, num_keep]}
    timed(calls[runtime], right, f"prune_tokens, stage {stage}", **row)
