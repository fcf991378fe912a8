"""Options and models that dvit-bench cannot use: one line that names them."""

import importlib.util

import pytest
import torch
from commands import fails
from golden_cases import state_dict

from dvit_infer.cli import bench

pytestmark = pytest.mark.usefixtures("_empty_folder")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--sweep", "0.9:0.5:0.1"], "--sweep"),
        (["--sweep", "0.5:0.9"], "--sweep"),
        (["--sweep", "0.5:0.9:0"], "--sweep"),
        (["--sweep", "0.5:1.5:0.1"], "--sweep"),
        (["--sweep", "0:0.5:0.1"], "--sweep"),
        (["--sweep", "nan:0.5:0.1"], "--sweep"),
        (["--sweep", "0.5:0.9:1e-12"], "--sweep"),
        (["--load", "-1"], "--load"),
        (["--load", "1025"], "--load"),
        (["--load", "1" * 40], "--load"),
        (["--load", "1.5"], "--load"),
        (["--load", "two"], "--load"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--report", "."], "--report"),
        (["--report", "nowhere/x.html"], "--report"),
        (["--report", "same", "--json", "same"], "--report"),
        (["--compare", "onnxruntime", "--dtype", "bfloat16"], "onnxruntime"),
        (["--compare", "openvino", "--dtype", "float16"], "openvino"),
    ],
)
def test_bad_options(argv, named, tiny, capsys):
    assert named in fails(bench, [tiny, "--device", "cpu", *argv], capsys)


def test_a_dense_model_has_no_keep_rates(capsys):
    state = {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k}
    torch.save({"model": state, "args": {"num_heads": 2}}, "dense.pth")
    line = fails(bench, ["dense.pth", "--device", "cpu", "--sweep", "0.5:0.9:0.1"], capsys)
    assert line.startswith("error: --sweep: dense.pth holds no score predictors")


def test_a_swept_rate_that_leaves_no_token_is_named(tiny, capsys):
    line = fails(bench, [tiny, "--device", "cpu", "--sweep", "0.001:0.001:0.1"], capsys)
    assert line.startswith("error: --sweep: a keep rate of 0.001 leaves no patch token")


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime", "openvino", "timm", "transformers"])
def test_a_package_that_is_not_there_is_named(package, tiny, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    candidate = {"onnxscript": "onnxruntime"}.get(package, package)
    line = fails(bench, [tiny, "--device", "cpu", "--compare", candidate], capsys)
    assert package in line
    assert "pip install" in line


@pytest.mark.parametrize("package", ["timm", "transformers", "timm-compile"])
def test_no_other_package_has_lvvit(package, tiny_lvvit, capsys):
    owner = package.removesuffix("-compile")
    line = fails(bench, [tiny_lvvit, "--device", "cpu", "--compare", package], capsys)
    assert line == f"error: --compare: {owner} has no lvvit; leave {owner} out\n"
