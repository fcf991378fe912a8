"""For dvit-train: a small dense model, images, and a run that is at its end; for dvit-bench: two tiny models."""

import pytest
import torch
from golden_cases import official_checkpoint, state_dict
from small_training import arguments, write_dense, write_folder

from dvit_infer.cli import train


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense") / "dense.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(dense, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.pth"
    assert train.main(arguments(dense, folder, out)) == 0
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "tiny.pth"
    torch.save(official_checkpoint("tiny-deit-r0.7-s1") | {"args": {"num_heads": 2, "base_rate": 0.7}}, path)
    return str(path)


@pytest.fixture(scope="module")
def tiny_lvvit(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "tiny-lvvit.pth"
    args = {"num_heads": 2, "skip_lam": 2.0, "base_rate": 0.7}
    torch.save({"model": state_dict("tiny-lvvit", 1), "args": args}, path)
    return str(path)
