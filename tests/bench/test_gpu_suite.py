"""The suite for a GPU, on a CPU: its whole order in a dry run, bad input, what stays of a part that is cut off."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, run

sys.path.append(str(ROOT / "bench"))
import children
import compare
import gpu
import gpu_checks
import gpu_tests
import kernel_cache
import tune
from candidates import DEIT_B, DEIT_S, PLAN, linear_candidates, linear_tiles, linears, shapes_of
from candidates import attention_tiles as tiles_of_attention
from forwards import Expected, checkpoint
from rows import Part, Rows

from dvit_infer.errors import InputError

CPU = torch.device("cpu")


def suite(*argv: str):
    return run(str(ROOT / "bench" / "gpu.py"), *argv)


@pytest.mark.slow
def test_a_dry_run_walks_the_whole_order(tmp_path):
    done = suite("--dry", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "compiled kernels: a dry run needs none"
    begun = [line.split()[1].rstrip(",") for line in lines if line.startswith("== ") and ", at most" in line]
    assert begun == [part for part in gpu.PARTS if part not in ("second", "more")]
    assert "no part failed" in lines[-1]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(
        ["gpu.txt", "smoke.json", "models.json", "tune.json", "choices.json", "machine.json", "prune_tokens.json"]
    )
    for name in files[:-1]:
        if name.endswith(".json"):
            content = json.loads((tmp_path / "out" / name).read_text())
            assert content["environment"]["torch"] == torch.__version__
            assert content["rows"]
            assert not [row for row in content["rows"] if "failed" in row]
            if name not in ("choices.json", "models.json"):  # in a dry run two models are one
                assert len(compare.read(str(tmp_path / "out" / name))[1]) == len(content["rows"]), (
                    "a row's name is its own"
                )
    assert (tmp_path / "out" / "gpu.txt").read_text() == done.stdout
    smoke = json.loads((tmp_path / "out" / "smoke.json").read_text())["rows"]
    variants = ["not captured", "captured", "programmatic"]
    assert [(r["batch"], r["variant"]) for r in smoke] == [
        *((2, v) for v in [*variants, "two branches"]),
        *((1, v) for v in variants),
    ]
    again = [r for r in json.loads((tmp_path / "out" / "models.json").read_text())["rows"] if "variant" in r]
    assert {(r["runtime"], r["variant"]) for r in again} >= {
        (runtime, variant) for runtime in ("engine", "dense") for variant in (None, "measured choices")
    }


@pytest.mark.slow
def test_the_second_run_walks_too(tmp_path):
    done = suite("--dry", "--only", "second", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "second.json").read_text())["rows"]
    beside = [row for row in rows if "baseline" in row]
    assert {row["variant"] for row in beside} == {"registers as they come", "at most 128 registers"}
    assert all(row["max_error"] == 0 for row in beside)


@pytest.mark.parametrize("budget", ["0", "-5", "soon", "nan", "inf", ""])
def test_a_budget_that_is_none(budget, tmp_path, capsys):
    assert gpu.main(["--dry", "--out", str(tmp_path / "out"), f"--budget={budget}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: BUDGET: {budget!r} is not a number of seconds; more than 0 are needed, 540 are usual\n"
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_each(tmp_path, capsys):
    def error(*argv: str) -> str:
        assert gpu.main(argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    expected = "error: ONLY: 'nonsense' is not a part of the suite; these are: smoke, models, "
    assert error("--only", "smoke,nonsense").startswith(expected)
    (tmp_path / "file").write_text("")
    expected = f"error: {tmp_path}/file/out: results cannot be written there (Not a directory)"
    assert error("--dry", "--out", str(tmp_path / "file" / "out")).startswith(expected)
    if not torch.cuda.is_available():
        assert error("--out", str(tmp_path / "none")).startswith("error: there is no NVIDIA GPU here")
        assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense\n"


@pytest.fixture
def _on_an_h100(monkeypatch, tmp_path):
    """What the checks ask of a machine, answered as one with a GPU would."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", sys.executable)  # any program that is there
    gpu_checks.check_machine()


@pytest.mark.usefixtures("_on_an_h100")
def test_a_machine_that_will_not_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(InputError, match="no C compiler here"):
        gpu_checks.check_machine()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no C compiler here"):
        gpu_checks.check_machine()
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    (tmp_path / "home").write_text("a home folder that cannot be written, for root either")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match=r"home/\.triton/cache, where Triton keeps kernels: Not a directory; TRITON_"):
        gpu_checks.check_machine()
    monkeypatch.setenv("DVIT_KERNELS", "perhaps")
    with pytest.raises(InputError, match=r"^DVIT_KERNELS: 'perhaps'; require, off or nothing is expected"):
        gpu_checks.check_machine()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match=r"compute capability 7\.5; the kernels need 8\.0 or later"):
        gpu_checks.check_machine()


def test_parts_come_in_the_suites_order():
    assert gpu.parts_of("tune, smoke") == ["smoke", "tune"]
    assert gpu.parts_of("second,sanitizer") == ["second", "sanitizer"]
    assert gpu.parts_of(None)[:3] == ["smoke", "models", "capture"]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_what_is_cut_off_ends_with_all_that_it_started():
    """A child that will not end when asked, and one of its own that would outlive it."""
    script = """if 1:
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
        time.sleep(600)
    """
    said: list[str] = []
    assert children.run([sys.executable, "-c", script], 3.0, said.append) == children.CUT_OFF
    assert len(said) == 1
    end = time.monotonic() + 30
    while alive(int(said[0])) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(int(said[0]))


def test_output_comes_as_it_is_printed_and_the_status_with_it():
    said: list[str] = []
    script = "import sys, os; print('one'); print('two', file=sys.stderr); os._exit(3)"
    assert children.run([sys.executable, "-c", script], 60, said.append) == 3
    assert said == ["one", "two"]


@pytest.fixture
def parts_made_of(monkeypatch, tmp_path):
    """Runs parts whose scripts are these lines of Python, in the given seconds; returns outcome and log."""

    def run_parts(seconds: float, **scripts: str):
        monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(scripts, 1))
        monkeypatch.setattr(gpu, "command", lambda part, *_: [sys.executable, "-c", scripts[part]])
        said: list[str] = []
        found = gpu.run_parts(list(scripts), tmp_path, time.monotonic() + seconds, False, said.append)
        return found, said

    return run_parts


def test_a_part_that_fails_or_is_cut_off_leaves_the_others(parts_made_of, tmp_path):
    write = "from pathlib import Path; Path({!r}).write_text('kept');"
    slow = write.format(str(tmp_path / "a.json")) + write.format(str(tmp_path / ".a.json.x.part"))
    slow += "import time; print('before', flush=True); time.sleep(600)"
    found, said = parts_made_of(18.0, slow=slow, bad="import os; os.abort()", good="print('ran')")
    assert found == {"failed": ["bad"], "cut off": ["slow"], "not run": []}
    assert "before" in said
    assert "ran" in said
    assert any(line.startswith("== slow: CUT OFF") for line in said)
    assert any(line.startswith("== bad: FAILED, status -6") for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_part_without_time_says_so(parts_made_of):
    found, said = parts_made_of(3.0, one="print('ran')", two="print('ran')")
    assert found == {"failed": [], "cut off": [], "not run": ["one", "two"]}
    assert said == ["== one: NOT RUN, no time left", "== two: NOT RUN, no time left"]


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


def test_tests_for_a_gpu_are_found_the_most_telling_first():
    names = [path.name for path in gpu_tests.test_files()]
    assert names[: len(gpu_tests.FIRST)] == list(gpu_tests.FIRST)
    assert "test_native_cuda.py" not in names  # it would be built first: its own part, the last
    assert {"test_linear_tma_kernels.py", "test_patch_embedding_kernels.py"} < {*names}


def test_a_failing_test_is_told_when_it_happens(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_bad():\n    assert 1 == 2\ndef test_that_ends_the_process():\n    os._exit(9)\n"
    )
    said: list[str] = []
    command = [sys.executable, "-m", "pytest", "-p", "first_failures", "-q", "--tb=short", "--no-summary"]
    status = children.run([*command, "-c", os.devnull, str(tmp_path / "test_two.py")], 60, said.append)
    assert status == 9
    text = "\n".join(said)
    assert "test_two.py::test_bad (call, " in text
    assert "assert 1 == 2" in text


@pytest.fixture
def packed(tmp_path):
    """A cache of one kernel, as Triton leaves it, packed for Triton's own key and sm_90."""
    pytest.importorskip("triton")
    from triton.runtime.cache import triton_key

    kernel = tmp_path / "made" / "ABC"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ptx", "k.ttir", "__grp__k.json"):
        (kernel / name).write_text(f"{name} of /elsewhere")
    manifest = {"triton_key": kernel_cache.short(triton_key()), "target": "sm_90"}
    path = tmp_path / "kernels.tar.xz"
    assert kernel_cache.pack(tmp_path / "made", manifest | {"sources": kernel_cache.fingerprint()}, path) == 1
    return path


@pytest.mark.usefixtures("_on_an_h100")
def test_compiled_kernels_are_unpacked_where_triton_finds_them(packed, tmp_path, monkeypatch):
    line = kernel_cache.unpack(packed)
    assert line.startswith("compiled kernels: HIT: 1 for Triton's key ")
    folder = tmp_path / "cache" / "ABC"
    assert sorted(path.name for path in folder.iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    from triton.runtime.cache import FileCacheManager

    manager = FileCacheManager("ABC")
    assert manager.get_group("k.json") == {name: str(folder / name) for name in ("k.cubin", "k.json")}

    monkeypatch.setattr(kernel_cache, "fingerprint", lambda: {"linear.py": "another"})
    assert "HIT in part, 1 files of kernels have changed since: 1 for" in kernel_cache.unpack(packed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "MISS, the GPU is sm_80, they are for sm_90" in kernel_cache.unpack(packed)
    monkeypatch.setattr("triton.runtime.cache.triton_key", lambda: "another Triton")
    assert "MISS, Triton's key is " in kernel_cache.unpack(packed)
    assert "MISS, none were taken along" in kernel_cache.unpack(tmp_path / "nothing.tar.xz")
    for content in (b"", b"no archive", packed.read_bytes()[:90]):
        (tmp_path / "broken.tar.xz").write_bytes(content)
        assert "broken.tar.xz cannot be read (" in kernel_cache.unpack(tmp_path / "broken.tar.xz")


@pytest.mark.interpreter
def test_launches_are_recorded_and_nothing_is_launched(monkeypatch):
    """Every kernel of a forward, its tensors without memory, with programmatic launches and without."""
    build = pytest.importorskip("kernel_cache_build")
    monkeypatch.setattr(build, "ARCHS", ("dynamicvit-deit-s", "dynamicvit-lvvit-s"))
    monkeypatch.setattr(build, "checkpoint", lambda arch, dry: checkpoint(arch, True))
    launches = list(build.recorded())
    names = {launch.kernel.__name__ for launch in launches}
    assert names >= {"_linear_kernel", "_attention_kernel", "_project_kernel", "_score_kernel", "_select_kernel"}
    assert names >= {"_patch_embedding_kernel"}
    assert {launch.arguments["PDL"] for launch in launches} == {True, False}
    tensors = [v for launch in launches for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    assert all(tensor.is_meta for tensor in tensors)
    assert torch.uint8 in {tensor.dtype for tensor in tensors}


def test_a_key_is_that_of_another_triton_of_the_same_version_alone(tmp_path):
    build = pytest.importorskip("kernel_cache_build")
    import triton
    from triton.runtime.cache import triton_key

    here, other = Path(triton.__file__).parent, tmp_path / "triton"
    (other / "_C").mkdir(parents=True)
    for entry in here.iterdir():
        if entry.name != "_C":
            (other / entry.name).symlink_to(entry)
    (other / "_C" / "libtriton.so").write_bytes(b"of another Python")
    key = build.key_for(tmp_path)
    assert key != triton_key()
    assert len(key) == len(triton_key())
    (other / "__init__.py").unlink()
    with pytest.raises(SystemExit, match=r"__init__\.py: is not the same as Triton"):
        build.key_for(tmp_path)
