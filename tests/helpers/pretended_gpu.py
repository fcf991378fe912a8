"""A machine with a GPU, for the checks of the GPU suite."""

import sys

import pytest
import torch


@pytest.fixture
def _on_an_h100(monkeypatch, tmp_path):
    """Answer what the checks ask of a machine as one with an H100 would."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", sys.executable)  # any program that is there
