"""The rows of the GPU suite: written as they come, only for correct outputs; and the choices that follow from them."""

import json
import sys

import torch
from commands import ROOT

sys.path.append(str(ROOT / "bench"))
import tune
from candidates import DEIT_B, DEIT_S, PLAN, linear_candidates, linear_tiles, linears, shapes_of
from candidates import attention_tiles as tiles_of_attention
from forwards import Expected, checkpoint
from rows import Part, Rows

CPU = torch.device("cpu")


def test_a_job_that_fails_fails_alone(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"

    def breaks():
        yield {"op": "first"}
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def rows():
        return [row["op"] for row in json.loads(path.read_text())["rows"]]

    jobs = [("one", breaks), ("two", lambda: iter([{"op": "second"}]))]
    assert Part(Rows(path), CPU, 60).run(jobs) == 1
    assert rows() == ["first", "second"]
    assert Part(Rows(path, add=True), CPU, 60).run(jobs[1:]) == 0
    assert rows() == ["first", "second", "second"]
    assert Part(Rows(path), CPU, 60).run([("wrong", lambda: iter([{"op": "x", "failed": "wrong"}]))]) == 1

    monkeypatch.setattr("rows.usable", lambda device: False)  # as after an illegal access
    assert Part(Rows(path), CPU, 60).run(jobs) == 1
    assert rows() == ["first"]
    assert "it ends here and keeps its rows" in capsys.readouterr().out
    assert Part(Rows(path), CPU, 0.0).run(jobs) == 0
    assert capsys.readouterr().out == "one: NOT MEASURED, no time left\ntwo: NOT MEASURED, no time left\n"


def test_a_row_is_written_before_the_next_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("rows.OFTEN_S", 0.0)
    path, seen = tmp_path / "rows.json", []

    def job():
        for i in range(3):
            yield {"op": str(i)}
            seen.append(len(json.loads(path.read_text())["rows"]))

    Part(Rows(path), CPU, 60).run([("job", job)])
    assert seen == [1, 2, 3]


def test_wrong_logits_are_told_from_right_ones():
    expected = Expected.of(checkpoint("dynamicvit-deit-s", dry=True), 4, CPU, torch.bfloat16)
    assert expected.disagreement(expected.logits, expected.logits) is None
    off = expected.logits * 1.03 + 0.03 * expected.logits.abs().max()
    assert "by the reference's kept sets" in expected.disagreement(expected.logits, off)
    assert "by its own choice" in expected.disagreement(-expected.logits)
    assert expected.disagreement(expected.logits * float("nan"))


def measured(size: int, batch: int, us: float, tile: list[int] | None, dim_in: int = 384) -> dict:
    kind = {"op": "linear", "dtype": "bfloat16", "in": dim_in, "out": 1152, "does": "norm"}
    runtime = "triton" if tile else "pytorch"
    return {**kind, "batch": batch, "size": size, "runtime": runtime, "tile": tile, "us": us}


def test_choices():
    """The default within the margin, else the fastest; none without batch 1, which is said by name."""
    default, other = [128, 128, 64, 8, 3, 0], [64, 128, 64, 4, 3, 0]
    rows = [
        *(measured(50432, 256, 100.0, None), measured(50432, 256, 102.0, default), measured(50432, 256, 99.5, other)),
        *(measured(197, 1, 9.0, None), measured(197, 1, 5.0, default), measured(197, 1, 4.0, other)),
        *(measured(50432, 256, 100.0, None, 768), {**measured(50432, 256, 0, None), "not_run": "too large"}),
    ]
    del rows[-1]["us"]
    chosen, without = tune.choose(rows)
    assert [(row["size"], row["by"], row["tile"]) for row in chosen] == [
        (50432, "triton", default),
        (197, "triton", other),
    ]
    assert without == ["linear bfloat16 768 1152 norm"]
    assert tune.choose(rows[:3]) == ([], ["linear bfloat16 384 1152 norm"])


def test_candidates():
    """In the order of their value; none that cannot be fast; cuBLAS pays for the statistics it does not leave."""
    assert [(model, batch) for model, batch in PLAN[:3]] == [(DEIT_S, 256), (DEIT_S, 1), (DEIT_B, 256)]
    for model, batch in PLAN:
        assert {shape.batch for shape in shapes_of(model, batch, torch.bfloat16)} == {batch}
    for shape in linears(256, 197, 384, 1536, torch.bfloat16):
        tiles = linear_tiles(shape, torch.bfloat16, False)
        assert len(tiles) == len(set(tiles)) > 8
        assert all(tile.block_m >= 64 for tile in tiles)
    assert (
        min(t.block_m for t in linear_tiles(linears(1, 197, 384, 1536, torch.bfloat16)[1], torch.bfloat16, False)) < 64
    )
    for n in (197, 138, 97, 68):
        for tile in tiles_of_attention(n, 64, torch.bfloat16):
            assert (tile.block_m, tile.num_warps) != (128, 4) or tile.chunk_a + tile.chunk_b < 192
    qkv, proj, *_ = linears(1, 5, 64, 128, torch.float32)
    for shape, parts in ((proj, 1), (qkv, None)):
        y, stats = linear_candidates(shape, torch.float32, CPU, 1, [])["pytorch"][0]()
        assert y.shape == (5, shape.dim_out)
        assert (None if stats is None else stats.shape[1]) == parts
