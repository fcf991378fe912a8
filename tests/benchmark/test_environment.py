"""dvit-bench --environment: what a bug report needs, without a model."""

import platform

import pytest
import torch

import dvit_infer as dvit
from dvit_infer.benchmark import environment
from dvit_infer.cli import bench


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines that the command prints, by their first word."""
    assert bench.main(["--environment"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return {name: value.strip() for name, value in (line.split(maxsplit=1) for line in out.out.splitlines())}


def test_it_says_what_runs_here_and_why(capsys, monkeypatch):
    monkeypatch.setenv("DVIT_PRUNE", "native")
    found = shown(capsys)
    assert found["dvit-infer"].startswith(dvit.__version__)
    assert found["Python"].startswith(f"{platform.python_version()}, ")
    assert found["packages"].startswith(f"torch {torch.__version__}, triton ")
    assert "CPUs, quota " in found["processor"]
    assert "thread" in found["processor"]
    assert {"DVIT_KERNELS=require", "DVIT_PRUNE=native"} <= set(found["variables"].split(", "))
    if not torch.cuda.is_available():
        assert found["GPU"].startswith("none")
        assert found["backend"] == "torch on cpu: openvino has prune_tokens of its own, not that of DVIT_PRUNE"


def test_a_gpu_and_a_variable_that_is_wrong(capsys, monkeypatch):
    gpu = type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 140 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu.name)
    monkeypatch.setattr("dvit_infer.ops.choices._is_recent", lambda device: True)  # what it finds is kept
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = shown(capsys)
    assert found["cuda:0"].startswith("NVIDIA H200, compute capability 9.0, 140.0 GiB, driver ")
    assert found["backend"] == "triton on cuda:0: the fastest that is installed"
    monkeypatch.setenv("DVIT_KERNELS", "maybe")
    assert shown(capsys)["backend"] == "none on cuda:0: DVIT_KERNELS: 'maybe'; require, off or nothing is expected"


def test_packages_that_are_not_there(monkeypatch):
    monkeypatch.setattr(environment, "package_version", lambda name: None)
    assert ", onnx -, " in environment.describe_environment()
