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
    assert machine_name("NVIDIA H200") == "h200"


def test_files_are_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": [1, float("nan")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "b", "out") as part:
        part.write_text(f"{1 / 0}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
