"""The commands as a user types them: what they print, what they write, how they fail."""

import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden_cases import official_checkpoint, state_dict

import dvit_infer as dvit
from dvit_infer.cli import bench, convert

ROOT = Path(__file__).parent.parent
SCHEMA = """model keep_rate how mode device dtype batch images_per_s p20_images_per_s p80_images_per_s p50_ms p99_ms
    gflops params peak_mib max_logit_error top1_agreement baseline speedup"""
TINY = ["--assume", "num_heads=2", "--device", "cpu"]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "tiny.pth.tar"
    torch.save(official_checkpoint("tiny-deit-r0.7-s1"), path)
    return path


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def fails(command, argv, capsys) -> str:
    """Run a command that has to fail: exit 2, one line on stderr, nothing left behind. Returns the line."""
    before = sorted(os.listdir())
    try:
        status = command.main([str(a) for a in argv])
    except SystemExit as exit_:
        status = exit_.code
    out = capsys.readouterr()
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", out.err), out.err
    assert sorted(os.listdir()) == before
    return out.err


def test_convert_writes_a_verified_file(checkpoint, capsys):
    assert convert.main([str(checkpoint), *TINY, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert "parity passed: 8 pictures" in out
    assert re.search(r"read .*keep_rate.* 0\.7 .*base_rate", out)
    assert re.search(r"assumed .*prune_at.* 1,2,3", out)
    assert re.search(r"given .*num_heads.* 2 ", out)
    assert sorted(os.listdir()) == ["found.json", "tiny.dvit.safetensors"]
    found = json.loads(Path("found.json").read_text())
    assert found["parity"]["passed"] is True
    assert found["config"]["prune_at"] == [1, 2, 3]
    engine = dvit.load("tiny.dvit.safetensors", device="cpu")
    assert engine.config.num_heads == 2
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat("tiny.dvit.safetensors").st_mode) == 0o666 & ~umask


def test_convert_options_reach_the_engine(checkpoint):
    argv = [
        "--keep-rate",
        "0.5",
        "--prune-at",
        "0,2,3",
        "--image-size",
        "192x256",
        "--no-verify",
        "-o",
        "x.safetensors",
    ]
    assert convert.main([str(checkpoint), *TINY, *argv]) == 0
    config = dvit.load("x.safetensors", device="cpu").config
    assert (config.keep_rate, config.prune_at, config.image_size) == (0.5, (0, 2, 3), (192, 256))
    assert convert.main([str(checkpoint), *TINY, "--method", "none", "--dtype", "bfloat16", "-o", "d.safetensors"]) == 0
    assert dvit.load("d.safetensors", device="cpu").config.method == "none"


def test_convert_replaces_an_earlier_file_and_takes_its_own_output(checkpoint, capsys):
    Path("tiny.dvit.safetensors").write_text("old")
    assert convert.main([str(checkpoint), *TINY]) == 0
    assert convert.main(["tiny.dvit.safetensors", "--device", "cpu", "-o", "again.safetensors"]) == 0
    capsys.readouterr()
    assert "is the input itself" in fails(convert, ["tiny.dvit.safetensors", "--device", "cpu"], capsys)


def test_convert_exits_1_and_writes_nothing_when_parity_fails(checkpoint, capsys, monkeypatch):
    load = dvit.load

    def spoiled(*arguments, **options):
        engine = load(*arguments, **options)
        engine.graph.nodes[2].weights["fc1.weight"].mul_(1.01)
        return engine

    monkeypatch.setattr("dvit_infer.load", spoiled)
    assert convert.main([str(checkpoint), *TINY, "--json", "found.json"]) == 1
    out = capsys.readouterr()
    assert "parity FAILED" in out.out
    assert out.err.startswith("error: ")
    assert os.listdir() == ["found.json"]
    assert json.loads(Path("found.json").read_text())["parity"]["passed"] is False


def test_bench_measures_side_by_side(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.2)
    assert convert.main([str(checkpoint), *TINY, "--no-verify"]) == 0
    capsys.readouterr()
    argv = ["tiny.dvit.safetensors", "--device", "cpu", "--batch", "3,1", "--json", "rows.json"]
    assert bench.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("realised") == 2
    content = json.loads(Path("rows.json").read_text())
    assert content.keys() == {"environment", "rows"}
    assert content["environment"].keys() == {"machine", "gpu", "driver", "torch", "triton", "commit", "date"}
    rows = content["rows"]
    assert [(r["batch"], r["how"]) for r in rows] == [(b, h) for b in (3, 1) for h in ("reference", "dense", "engine")]
    assert list(rows[0]) == SCHEMA.split()
    for row in rows:
        assert row["max_logit_error"] < 1e-4
        assert row["top1_agreement"] == 1.0
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["p50_ms"] * 1e3)
        assert row["p20_images_per_s"] <= row["images_per_s"] <= row["p80_images_per_s"]
        assert row["keep_rate"] == (1.0 if row["how"] == "dense" else 0.7)
        assert row["baseline"] == "reference"
    reference, dense, engine = rows[:3]
    assert reference["speedup"] == 1.0
    assert engine["gflops"] < reference["gflops"] < dense["gflops"]
    assert dense["params"] < engine["params"] == reference["params"]


def test_bench_of_a_dense_model_and_of_chosen_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.1)
    torch.save(
        {
            "model": {k: v for k, v in state_dict("tiny-deit", 1).items() if "predictor" not in k},
            "args": {"num_heads": 2},
        },
        "d.pth",
    )
    assert bench.main(["d.pth", "--device", "cpu", "--batch", "2", "--json", "d.json"]) == 0
    assert [row["how"] for row in json.loads(Path("d.json").read_text())["rows"]] == ["reference", "dense"]
    torch.save(official_checkpoint("tiny-deit-r0.7-s1") | {"args": {"num_heads": 2}}, "p.pth")
    assert bench.main(["p.pth", "--device", "cpu", "--batch", "2", "--compare", "dense", "--json", "p.json"]) == 0
    rows = json.loads(Path("p.json").read_text())["rows"]
    assert [(row["how"], row["baseline"]) for row in rows] == [("dense", "dense"), ("engine", "dense")]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--keep-rate", "0"], "--keep-rate"),
        (["--keep-rate", "1.5"], "--keep-rate"),
        (["--keep-rate", "nan"], "--keep-rate"),
        (["--keep-rate", "-0.5"], "--keep-rate"),
        (["--keep-rate", "x"], "--keep-rate"),
        (["--keep-rate", "0.05"], "--keep-rate"),
        (["--prune-at", "3,3"], "--prune-at"),
        (["--prune-at", "12"], "--prune-at"),
        (["--prune-at", "-1"], "--prune-at"),
        (["--prune-at", "-1,1"], "--prune-at"),
        (["--prune-at=-1,1"], "--prune-at"),
        (["--prune-at", ""], "--prune-at"),
        (["--prune-at", "1,2,x"], "--prune-at"),
        (["--image-size", "225"], "--image-size"),
        (["--image-size", "-16"], "--image-size"),
        (["--image-size", "16x"], "--image-size"),
        (["--method", "magic"], "--method"),
        (["--arch", "resnet"], "dynamicvit-deit-s"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--assume", "heads"], "--assume"),
        (["--assume", "heads=2"], "--assume"),
        (["--assume", "num_heads=2,num_heads=4"], "--assume"),
        (["--assume", "num_heads=x"], "--assume num_heads"),
        (["--assume", "num_heads=2,skip_lam=2"], "--assume"),
        (["--format", "onnx3"], "--format"),
        (["-o", "."], "--out"),
        (["-o", "nowhere/x.safetensors"], "--out"),
        (["-o", "/dev/null"], "--out"),
        (["-o", "/proc/x"], "--out"),
        (["-o", ""], "--out"),
        (["-o", "x/"], "--out"),
        (["-o", os.fsdecode(b"\xff\xfe")], "--out"),
        (["-o", "x" * 300], "--out"),
        (["--json", "tiny.dvit.safetensors"], "--json"),
        (["--json", "nowhere/x.json"], "--json"),
        (["--surprise"], "--surprise"),
    ],
)
def test_bad_options_of_convert(argv, named, checkpoint, capsys):
    arguments = [] if "--assume" in argv else ["--assume", "num_heads=2"]
    arguments += [] if "--device" in argv else ["--device", "cpu"]
    assert named in fails(convert, [checkpoint, *arguments, *argv], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [convert, bench])
def test_cuda_without_one(command, checkpoint, capsys):
    assert "--device" in fails(command, [checkpoint, "--device", "cuda"], capsys)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch", "0"], "--batch"),
        (["--batch", "8,-1"], "--batch"),
        (["--batch", "99999999999999999999"], "--batch"),
        (["--batch", "x"], "--batch"),
        (["--compare", "magic"], "--compare"),
        (["--compare", ""], "--compare"),
        (["--dtype", "int8"], "--dtype"),
        (["--json", "."], "--json"),
    ],
)
def test_bad_options_of_bench(argv, named, checkpoint, capsys):
    assert named in fails(bench, [checkpoint, "--device", "cpu", *argv], capsys)


@pytest.mark.parametrize("command", [convert, bench])
def test_bad_files(command, checkpoint, capsys, tmp_path):
    good, state = checkpoint.read_bytes(), state_dict("tiny-deit", 1)
    files = tmp_path / "bad"
    files.mkdir()
    contents = {
        "empty.pth": b"",
        "text.pth": b"hello\n",
        "cut.pth": good[: len(good) // 2],
        "huge.safetensors": struct.pack("<Q", 2**60) + b"{}",
    }
    for name, content in contents.items():
        (files / name).write_bytes(content)
        assert name in fails(command, [files / name, "--device", "cpu"], capsys)
    spoiled = {
        "head.bias": {k: v for k, v in state.items() if k != "head.bias"},
        "surprise": state | {"surprise": torch.ones(1)},
        "blocks.1.attn.qkv.weight": state | {"blocks.1.attn.qkv.weight": torch.ones(191, 64)},
        "norm.bias": state | {"norm.bias": torch.full((64,), float("nan"))},
    }
    for key, content in spoiled.items():
        torch.save({"model": content, "args": {"num_heads": 2}}, files / "spoiled.pth")
        line = fails(command, [files / "spoiled.pth", "--device", "cpu"], capsys)
        assert key in line
        assert "spoiled.pth" in line
    assert "none.pth" in fails(command, [files / "none.pth"], capsys)


def test_a_pickle_that_calls_os_system(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": state_dict("tiny-deit", 1), "args": Evil()}, tmp_path / "evil.pth")
    assert "system" in fails(convert, [tmp_path / "evil.pth"], capsys)
    assert not (tmp_path / "ran").exists()


def test_output_that_would_overwrite_the_input(checkpoint, capsys):
    os.link(checkpoint, "same.pth")
    os.symlink(checkpoint, "link.pth")
    for name in (checkpoint, "same.pth", "link.pth"):
        assert "input itself" in fails(convert, [checkpoint, *TINY, "-o", name], capsys)
        assert "input itself" in fails(convert, [checkpoint, *TINY, "--json", name], capsys)


def test_what_a_file_says_is_printed_as_it_is(capsys, tmp_path):
    args = {"num_heads": 2, "model": "[bold]deit[/b] :smile: \x1b[31m"}
    torch.save({"model": state_dict("tiny-deit", 1), "args": args}, tmp_path / "odd.pth")
    assert convert.main([str(tmp_path / "odd.pth"), "--device", "cpu", "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "[bold]deit[/b] :smile:" in out
    assert "\x1b" not in out


def test_file_names_are_told_from_options(capsys, tmp_path):
    (tmp_path / "batch.pth").write_bytes(b"")
    assert "batch.pth: the file is empty" in fails(convert, [tmp_path / "batch.pth"], capsys)
    os.chdir(tmp_path)
    assert fails(bench, ["batch.pth"], capsys) == "error: batch.pth: the file is empty\n"


def test_memory_that_is_not_there(checkpoint, capsys, monkeypatch):
    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("dvit_infer.compare.interleave", no_memory)
    assert "--batch: 5 pictures do not fit" in fails(bench, [checkpoint, "--batch", "5", "--device", "cpu"], capsys)
    monkeypatch.setattr("dvit_infer.engine.fold", no_memory)
    assert "out of memory" in fails(convert, [checkpoint, *TINY], capsys)


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENV, check=False, **options)


@pytest.mark.parametrize("module", ["dvit_infer.cli.convert", "dvit_infer.cli.bench"])
def test_help_loads_no_torch(module):
    code = f"import sys, {module} as m\ntry: m.main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = run("-c", code)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr == ""


def test_import_loads_no_torch_and_names_are_there():
    code = (
        "import sys, dvit_infer as d; assert 'torch' not in sys.modules; assert set(d.__all__) <= set(dir(d));"
        "assert not any(m.startswith(('fvcore', 'onnx', 'matplotlib', 'triton')) for m in sys.modules);"
        "import dvit_infer.parity, dvit_infer.compare; assert all(callable(getattr(d, n)) for n in d.__all__);"
        "assert not any(m.split('.')[0] in ('fvcore', 'onnx', 'matplotlib') for m in sys.modules)"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert not hasattr(dvit, "nonsense")


def test_a_real_run_shows_no_progress_where_there_is_no_terminal(checkpoint):
    done = run("-m", "dvit_infer.cli.convert", str(checkpoint), *TINY)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_leaves_nothing_behind(stop, checkpoint):
    process = subprocess.Popen(
        [sys.executable, "-m", "dvit_infer.cli.convert", str(checkpoint), *TINY],
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not os.listdir() and process.poll() is None:  # until the file is being written
        time.sleep(0.01)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert "Traceback" not in err
    assert [name for name in os.listdir() if name.endswith(".part")] == []


def test_a_full_disk_leaves_nothing_behind(checkpoint, capsys, monkeypatch):
    def full(tensors, path, header):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dvit_infer.engine.save_file", full)
    assert "No space left" in fails(convert, [checkpoint, *TINY], capsys)


def test_a_full_disk_for_the_json_is_named_and_no_model_is_left(checkpoint, capsys, monkeypatch):
    def full(content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dvit_infer.timing._finite", full)
    assert "--json: " in fails(convert, [checkpoint, *TINY, "--json", "x.json"], capsys)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "> /dev/full"])
def test_closed_and_full_streams_raise_no_traceback(closed, checkpoint):
    command = f"{sys.executable} -m dvit_infer.cli.convert {checkpoint} {' '.join(TINY)} --no-verify {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENV, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "full" in closed else 0)
    assert os.listdir() == ["tiny.dvit.safetensors"]


def test_a_reader_that_goes_away_is_no_error(checkpoint):
    done = subprocess.run(
        f"{sys.executable} -m dvit_infer.cli.convert {checkpoint} {' '.join(TINY)} | head -1",
        shell=True, capture_output=True, text=True, env=ENV, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
