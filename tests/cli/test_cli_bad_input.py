"""The commands given what cannot be used, or stopped: one line, exit 2, nothing left behind."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENV, TINY, fails
from golden_cases import state_dict

from dvit_infer.cli import bench, convert
from dvit_infer.models import torch_file

pytestmark = pytest.mark.usefixtures("_empty_folder")


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
        (["--dtype", "int4"], "--dtype"),
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
        (["--dtype", "int4"], "--dtype"),
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


def test_file_names_are_told_from_options(capsys, tmp_path):
    (tmp_path / "batch.pth").write_bytes(b"")
    assert "batch.pth: the file is empty" in fails(convert, [tmp_path / "batch.pth"], capsys)
    os.chdir(tmp_path)
    assert fails(bench, ["batch.pth"], capsys) == "error: batch.pth: the file is empty\n"


def test_memory_that_is_not_there(checkpoint, capsys, monkeypatch):
    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("dvit_infer.benchmark.base.interleave", no_memory)
    assert "--batch: 5 images do not fit" in fails(bench, [checkpoint, "--batch", "5", "--device", "cpu"], capsys)
    for place in ("dvit_infer.models.folded.fold_node", "dvit_infer.models.torch_file._mapped"):
        with monkeypatch.context() as patch:
            patch.setattr(place, no_memory)
            assert "out of memory" in fails(convert, [checkpoint, *TINY], capsys)


INTERRUPTED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from dvit_infer import engine
from dvit_infer.cli.convert import main

def half(tensors, path, header):
    Path(path).write_bytes(b"half of it")
    signal.raise_signal({0})

signal.signal({0}, signal.default_int_handler)  # nohup starts what it starts with SIGHUP ignored
engine.save_file = half
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_leaves_nothing_behind(stop, checkpoint):
    command = [sys.executable, "-c", INTERRUPTED_WHILE_WRITING.format(int(stop)), str(checkpoint), *TINY]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert os.listdir() == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_library_that_turns_the_interrupt_into_its_own_error_does_not_blame_the_file(
    stop, checkpoint, capsys, monkeypatch
):
    def masked(*args: object, **given: object) -> None:
        try:
            os.kill(os.getpid(), stop)
            time.sleep(5)  # until the handler has run
        except KeyboardInterrupt:
            raise RuntimeError("could not determine the shape of object type 'torch.storage'") from None

    monkeypatch.setattr("dvit_infer.models.torch_file._mapped", masked)
    before = signal.getsignal(stop)
    assert convert.main([str(checkpoint), *TINY]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert signal.getsignal(stop) == before


def test_an_interrupt_that_a_library_swallows_still_stops_the_command(checkpoint, capsys, monkeypatch):
    mapped = torch_file._mapped

    def swallows(*args: object, **given: object) -> object:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # until the handler has run
        except KeyboardInterrupt:
            pass
        return mapped(*args, **given)

    with monkeypatch.context() as patch:
        patch.setattr("dvit_infer.models.torch_file._mapped", swallows)
        assert convert.main([str(checkpoint), *TINY]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert os.listdir() == []
    assert convert.main([str(checkpoint), *TINY, "--no-verify"]) == 0  # the next command knows nothing of it


def test_a_full_disk_leaves_nothing_behind(checkpoint, capsys, monkeypatch):
    def full(tensors, path, header):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dvit_infer.engine.save_file", full)
    assert "No space left" in fails(convert, [checkpoint, *TINY], capsys)


def test_a_full_disk_for_the_json_is_named_and_no_model_is_left(checkpoint, capsys, monkeypatch):
    def full(content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dvit_infer.utils.files._finite", full)
    assert "--json: " in fails(convert, [checkpoint, *TINY, "--json", "x.json"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "> /dev/full"])
def test_closed_and_full_streams_raise_no_traceback(closed, checkpoint):
    command = f"{sys.executable} -m dvit_infer.cli.convert {checkpoint} {' '.join(TINY)} --no-verify {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENV, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "full" in closed else 0)
    assert os.listdir() == ["tiny.dvit.safetensors"]


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(checkpoint):
    done = subprocess.run(
        f"{sys.executable} -m dvit_infer.cli.convert {checkpoint} {' '.join(TINY)} | head -1",
        shell=True, capture_output=True, text=True, env=ENV, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert os.listdir() == ["tiny.dvit.safetensors"]
