"""Result files: the environment in them, whole or not there at all."""

import json

import pytest
import torch
from commands import ROOT

from dvit_infer.benchmark.results import environment, machine_name, read_results, write_json
from dvit_infer.errors import InputError
from dvit_infer.utils.files import atomic_write, atomic_write_json

MODEL = {"model": "dynamicvit-deit-s", "keep_rate": 0.7, "batch": 8, "images_per_s": 32.0, "baseline": "reference"}
OP = {"op": "blocks.0.mlp", "dtype": "float32", "batch": 8, "shape": [[8, 197, 384], [8, 197, 384]], "us": 9.5}
VERSION_1 = [
    MODEL | {"how": "compile", "mode": "default", "gflops": 2.987611968},
    OP | {"how": "engine", "gflops": 0.232},
]
VERSION_2 = [
    MODEL | {"runtime": "compile", "variant": "default", "gmacs": 2.987611968},
    OP | {"runtime": "engine", "gmacs": 0.232},
]


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
    atomic_write_json(tmp_path / "a.json", {"a": 1})
    atomic_write_json(tmp_path / "a.json", {"a": [1, float("nan")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "b", "out") as part:
        part.write_text(f"{1 / 0}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("said", [{}, {"version": 1}])
def test_version_1_is_read_as_version_2(said, tmp_path):
    where = {"machine": "here", "commit": None}
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({**said, "environment": where, "rows": VERSION_1}))
    write_json(new, {"environment": where, "rows": VERSION_2})
    assert json.loads(new.read_text()) == {"version": 2, "environment": where, "rows": VERSION_2}
    assert read_results(old) == read_results(new) == json.loads(new.read_text())


@pytest.mark.parametrize("version", [3, 0, "2", None, [2], 10**50])
def test_another_version_is_refused(version, tmp_path):
    path = tmp_path / "later.json"
    path.write_text(json.dumps({"version": version, "environment": {}, "rows": []}))
    with pytest.raises(InputError, match=r"later\.json: is a result file of version .{1,20}; 1 and 2 can be read"):
        read_results(path)


def test_committed_results_are_read_and_keep_their_numbers():
    files = [path for path in (ROOT / "bench" / "results").glob("*/*.json") if path.name != "ceilings.json"]
    assert files
    for path in files:
        before, after = json.loads(path.read_text())["rows"], read_results(path)["rows"]
        assert [list(row.values()) for row in after] == [list(row.values()) for row in before]
        assert not {"how", "mode", "gflops"} & set().union(*after)
