"""float16 names the weight that it cannot hold, and nothing is written."""

import os

import pytest
import torch
from commands import fails
from golden_cases import state_dict

import dvit_infer as dvit
from dvit_infer.cli import convert

pytestmark = pytest.mark.usefixtures("_empty_folder")


@pytest.mark.parametrize("options", [[], ["--format", "onnx"]], ids=["engine", "onnx"])
def test_float16_names_the_tensor_that_overflows(options, capsys):
    if options:
        pytest.importorskip("onnxruntime")
    state = state_dict("tiny-deit", 1)
    state["blocks.1.mlp.fc2.bias"][3] = -9e4
    torch.save(state, "big.pth")
    line = fails(convert, ["big.pth", "--assume", "num_heads=2", "--dtype", "float16", *options], capsys)
    assert line == (
        "error: big.pth: blocks.1.mlp.fc2.bias holds -90000, more than float16's largest 65504; "
        "bfloat16 or float32 hold it\n"
    )
    assert os.listdir() == ["big.pth"]


def test_the_weights_that_are_folded_decide():
    state = state_dict("tiny-deit", 1)
    state["blocks.0.mlp.fc1.weight"][0] *= 1e4
    state["blocks.0.norm2.weight"] *= 1e2
    assert all(w.abs().max() < 65504 for w in state.values())
    with pytest.raises(dvit.InputError, match=r"blocks\.0\.mlp\.fc1\.weight holds .*float16's largest"):
        dvit.convert(state, assume={"num_heads": 2}, device="cpu", dtype="float16")
    dvit.convert(state, assume={"num_heads": 2}, device="cpu", dtype="bfloat16")
    state = state_dict("tiny-deit", 1)
    state["score_predictor.1.out_conv.0.weight"] *= 1e7
    with pytest.raises(dvit.InputError, match=r"prune\.1\.packed\.3 holds a value over float16's largest"):
        dvit.convert(state, assume={"num_heads": 2}, device="cpu", dtype="float16")
