"""Result files: the environment in them, whole or not there at all."""

import json

import pytest
import torch

from dvit_infer.files import whole_file
from dvit_infer.results import environment, machine_name, write_json


def test_environment_is_complete():
    found = environment()
    assert found.keys() == {"machine", "gpu", "driver", "torch", "triton", "commit", "date"}
    assert found["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon-processor"),
    ],
)
def test_the_name_of_a_machine(gpu, name):
    assert machine_name(gpu) == name


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("DVIT_COMMIT", "0123456789abcdef0123456789abcdef01234567")
    assert environment()["commit"] == "0123456789ab"


def test_files_are_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": [1, float("nan")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "b", "out") as part:
        part.write_text(f"{1 / 0}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
