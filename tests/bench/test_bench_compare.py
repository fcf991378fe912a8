"""bench/compare.py: what is a regression, and what is noise, drift, or no result file."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ROOT, fails

pytestmark = pytest.mark.usefixtures("_empty_folder")
_spec = importlib.util.spec_from_file_location("bench_compare", ROOT / "bench" / "compare.py")
compare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare)


def op(runtime: str, us: float, spread: float = 0.02, error: float = 1e-6) -> dict:
    ends = {"p20_us": us * (1 - spread / 2), "p80_us": us * (1 + spread / 2)}
    same = {"op": "attention", "runtime": runtime, "dtype": "float32", "batch": 8, "shape": [197, 6, 64]}
    return same | {"us": us, **ends, "max_error": error}


def model(runtime: str, rate: float, spread: float = 0.02, error: float = 1e-6) -> dict:
    ends = {"p20_images_per_s": rate * (1 - spread / 2), "p80_images_per_s": rate * (1 + spread / 2)}
    same = {"model": "dynamicvit-deit-s", "keep_rate": 0.7, "runtime": runtime, "variant": None, "device": "cpu"}
    same |= {"dtype": "float32", "batch": 8}
    return same | {"images_per_s": rate, **ends, "max_logit_error": error}


def write(name: str, rows: list[dict], machine: str = "here") -> str:
    where = {"machine": machine, "commit": name}
    Path(name).write_text(json.dumps({"version": 2, "environment": where, "rows": rows}))
    return name


def status(old: list[dict], new: list[dict], capsys) -> SimpleNamespace:
    code = compare.main([write("old.json", old), write("new.json", new)])
    out = capsys.readouterr()
    return SimpleNamespace(code=code, out=out.out, err=out.err)


@pytest.mark.parametrize("row", [op, lambda runtime, us, *rest: model(runtime, 1e4 / us, *rest)])
def test_slower_beyond_the_noise_is_a_regression(row, capsys):
    old = [row("op", 100.0), row("eager", 200.0)]
    assert status(old, [row("op", 102.0), row("eager", 200.0)], capsys).code == 0
    found = status(old, [row("op", 120.0), row("eager", 200.0)], capsys)
    assert found.code == 1
    assert found.err.startswith("error: 1 regressions: ")
    assert " op " in found.err
    assert ": slower" in found.err
    assert status(old, [row("op", 80.0), row("eager", 200.0)], capsys).out.count("faster") >= 1
    noisy = [row("op", 120.0, 0.5), row("eager", 200.0)]
    assert status(old, noisy, capsys).code == 0


def test_a_slower_machine_is_taken_out(capsys):
    old = [op("op", 100.0), op("eager", 200.0), op("sdpa", 150.0)]
    assert status(old, [op("op", 150.0), op("eager", 300.0), op("sdpa", 225.0)], capsys).code == 0
    found = status(old, [op("op", 100.0), op("eager", 140.0), op("sdpa", 105.0)], capsys)
    assert found.code == 1
    assert "0.700 x" in found.out


def test_an_answer_further_off_is_a_regression(capsys):
    old = [model("engine", 30.0)]
    assert status(old, [model("engine", 30.0, error=9e-5)], capsys).code == 0
    found = status(old, [model("engine", 30.0, error=1e-2)], capsys)
    assert found.code == 1
    assert "further off" in found.err


@pytest.mark.parametrize("spoiled", [{"max_logit_error": None}, {"top1_agreement": 0.5}, {"top1_agreement": None}])
def test_an_answer_that_is_no_longer_one_is_a_regression(spoiled, capsys):
    good = model("engine", 30.0) | {"top1_agreement": 1.0}
    assert status([good], [good], capsys).code == 0
    found = status([good], [good | spoiled], capsys)
    assert found.code == 1
    assert "further off" in found.err


def test_where_the_noise_is_not_known_nothing_is_slower(capsys):
    bare = {key: value for key, value in op("op", 100.0).items() if not key.startswith("p")}
    assert status([bare], [bare | {"us": 200.0}], capsys).code == 0


def test_what_the_machine_can_do_at_best_is_not_judged(capsys):
    limit = op("measured limit: copy", 100.0) | {"op": "copy"}
    assert status([op("op", 1.0), limit], [op("op", 1.0), limit | {"us": 500.0}], capsys).code == 0


def test_rows_of_one_file_alone_are_counted(capsys):
    found = status([op("op", 1.0), op("gone", 1.0)], [op("op", 1.0), op("new", 1.0)], capsys)
    assert found.code == 0
    assert "1 rows only in the old file" in found.out
    assert "1 rows only in the new file" in found.out


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"environment": {"machine": "here"}, "rows": [{"op": "x"}]}',
        '{"environment": {"machine": "here"}, "rows": [{"images_per_s": 1.0}]}',
        '{"environment": {"machine": "here"}, "rows": [{"images_per_s": 0}]}',
        '{"environment": {"machine": "here"}, "rows": [{"us": "fast"}]}',
        '{"environment": {}, "rows": []}',
        '{"version": 2, "results": []}',
        '{"environment": "here", "rows": []}',
        '{"environment": {"machine": "here"}, "rows": [{"us": 1, "max_error": "x"}]}',
        '{"environment": {"machine": "here"}, "rows": [{"us": 1' + "0" * 400 + "}]}",
        "[" * 200000,
    ],
)
def test_what_is_no_result_file(content, capsys):
    good = write("good.json", [op("op", 1.0)])
    Path("bad.json").write_text(content)
    for files in (["bad.json", good], [good, "bad.json"]):
        assert "bad.json" in fails(compare, files, capsys)


def test_a_file_of_version_1_is_held_against_one_of_version_2(capsys):
    new = [model("engine", 30.0) | {"variant": "native"}, op("op", 100.0), op("eager", 200.0)]
    old_names = {"runtime": "how", "variant": "mode"}
    old = [{old_names.get(key, key): value for key, value in row.items()} for row in new]
    Path("old.json").write_text(json.dumps({"environment": {"machine": "here"}, "rows": old}))
    slower = [new[0], op("op", 120.0), new[2]]
    for files in (["old.json", write("new.json", new)], ["new.json", "old.json"]):
        assert compare.main(files) == 0
        assert "only in" not in capsys.readouterr().out
    assert compare.main(["old.json", write("slower.json", slower)]) == 1
    assert "1 regressions: attention op float32" in capsys.readouterr().err


def test_a_file_of_another_version_is_refused(capsys):
    good = write("good.json", [op("op", 1.0)])
    Path("later.json").write_text(json.dumps({**json.loads(Path(good).read_text()), "version": 3}))
    for files in (["later.json", good], [good, "later.json"]):
        assert "later.json: is a result file of version 3" in fails(compare, files, capsys)


def test_a_commit_need_not_be_known(capsys):
    write("a.json", [op("op", 1.0)])
    content = json.loads(Path("a.json").read_text())
    del content["environment"]["commit"]
    Path("a.json").write_text(json.dumps(content))
    assert compare.main(["a.json", "a.json"]) == 0


def test_files_that_cannot_be_compared(capsys):
    here = write("here.json", [op("op", 1.0)])
    there = write("there.json", [op("op", 1.0)], machine="there")
    other = write("other.json", [model("engine", 1.0)])
    assert "there" in fails(compare, [here, there], capsys)
    assert "no row in common" in fails(compare, [here, other], capsys)
    assert "none.json" in fails(compare, [here, "none.json"], capsys)


def test_committed_results_can_be_compared(capsys):
    """What `make bench` and bench/cpu.py have written is of this version."""
    results = ROOT / "bench" / "results"
    files = [*results.glob("*/cpu.json"), *results.glob("*/bench-*.json")]
    assert files
    for file in files:
        assert compare.main([str(file), str(file)]) == 0
