"""Choices: what was measured on a GPU decides, the nearest size of the same kind; where nothing was, the default."""

import json

import pytest
import torch

from dvit_infer.ops import linear as linear_op
from dvit_infer.ops.choices import FOLDER, Choice, Choices, choices_for, read_choices, runs_triton, using

ROWS = (
    {"op": "linear", "dtype": "bfloat16", "size": 197, "in": 384, "out": 1152, "does": "norm", "by": "pytorch"},
    {
        **{"op": "linear", "dtype": "bfloat16", "size": 50432, "in": 384, "out": 1152, "does": "norm"},
        **{"by": "triton", "tile": [128, 128, 64, 8, 3]},
    },
)
KIND = {"in": 384, "out": 1152, "does": "norm"}


def test_the_nearest_size_of_the_same_kind():
    choices = Choices(ROWS)
    near, far = Choice("pytorch"), Choice("triton", (128, 128, 64, 8, 3))
    sizes = (50, 197, 788, 12608, 50432, 201728)
    assert [choices.of("linear", torch.bfloat16, n, **KIND) for n in sizes] == [near, near, near, far, far, far]
    for beyond in (1, 49, 789, 3000, 12607, 201729, 10**7):  # over four times from what was measured
        assert choices.of("linear", torch.bfloat16, beyond, **KIND) == Choice("triton")
    closer = Choices((*ROWS, ROWS[0] | {"size": 300, "by": "triton"}))
    assert [closer.of("linear", torch.bfloat16, n, **KIND).by for n in (197, 240, 250)] == ["pytorch"] * 2 + ["triton"]
    for other in ({**KIND, "does": "norm+gelu"}, {**KIND, "out": 384}):
        assert choices.of("linear", torch.bfloat16, 197, **other) == Choice("triton")
    assert choices.of("linear", torch.float16, 197, **KIND) == Choice("triton")
    assert choices.of("attention", torch.bfloat16, 197, **KIND) == Choice("triton")


def test_the_default():
    assert Choices().of("linear", torch.float16, 5, **KIND) == Choice("triton")
    assert Choices().of("linear", torch.float32, 5, **KIND) == Choice("pytorch")
    assert Choices(otherwise="triton").of("linear", torch.float32, 5, **KIND) == Choice("triton")
    assert Choices(ROWS, otherwise="triton").of("linear", torch.bfloat16, 100, **KIND) == Choice("pytorch")
    assert Choices(ROWS, otherwise="pytorch").of("linear", torch.bfloat16, 5, **KIND) == Choice("pytorch")


def test_given_choices_hold_inside_only():
    cpu = torch.device("cpu")
    assert not runs_triton(cpu)
    with using(Choices(ROWS)):
        assert runs_triton(cpu)
        assert choices_for(cpu).rows == ROWS
        with pytest.raises(ZeroDivisionError), using(Choices()):
            1 / 0  # noqa: B018
        assert choices_for(cpu).rows == ROWS
    assert not runs_triton(cpu)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_files_in_the_package_can_be_read(path):
    choices = read_choices(path)
    for row in choices.rows:
        assert row["by"] in ("pytorch", "triton")
        assert row["size"] >= 1


def test_a_gpus_file(tmp_path, monkeypatch):
    content = {"environment": {}, "rows": list(ROWS), "programmatic": True, "two_branches_from": 128}
    (tmp_path / "made-up-h9.json").write_text(json.dumps(content))
    choices = read_choices(tmp_path / "made-up-h9.json")
    assert (choices.programmatic, choices.two_branches_from, len(choices.rows)) == (True, 128, 2)

    monkeypatch.setattr("dvit_infer.ops.choices.FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Made-Up H9")
    assert choices_for(torch.device("cuda", 0)) == choices
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Made-Up H10")
    assert choices_for(torch.device("cuda", 0)) == Choices()


@pytest.mark.interpreter
def test_a_linear_goes_the_chosen_way(monkeypatch):
    """And leaves statistics only where its own launch has them for nothing."""
    taken = []
    monkeypatch.setattr(
        "dvit_kernels.linear.launch_linear",
        lambda *given, tile: taken.append(tile) or linear_op.linear_ref(*given),
    )
    x, weight = torch.randn(6, 64), torch.randn(64, 64)
    row = {"op": "linear", "dtype": "float32", "size": 6, "in": 64, "out": 64, "does": "residual"}
    cpu = torch.device("cpu")
    for by, tile, block in (
        ("pytorch", None, 0),
        ("triton", [64, 32, 16, 4, 2], 32),
        ("triton", [64, 48, 16, 4, 2], 0),
    ):
        with using(Choices(({**row, "by": by, "tile": tile},))):
            assert linear_op.free_stats_block(cpu, torch.float32, 6, 64, 64) == block
            linear_op.linear(x, weight, None, x, stats_block=block)
    assert [None if tile is None else tile.block_n for tile in taken] == [32, 48]
