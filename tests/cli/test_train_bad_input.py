"""dvit-train given what it cannot use: one line that names it, exit 2, and nothing left behind."""

import os
import subprocess
import sys

import pytest
import torch
from commands import ENV, fails
from drawn import draw_all
from small_training import PLAIN, QUICK, arguments, write_dense

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.training.loop import Run


@pytest.mark.usefixtures("_empty_folder")
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--keep-rate", "1"], "--keep-rate: 1 keeps every patch"),
        (["--keep-rate", "0"], "--keep-rate: 0.0 is not a keep rate"),
        (["--keep-rate", "nan"], "--keep-rate: nan is not a keep rate"),
        (["--keep-rate", "0.1"], "--keep-rate: a keep rate of 0.1 leaves no patch"),
        (["--prune-at", "1,9"], "--prune-at: there is no block 9"),
        (["--epochs", "0"], "--epochs: 0 is not"),
        (["--batch", "0"], "--batch: 0"),
        (["--batch", "25", *PLAIN], "--batch: 24 images are fewer"),
        (["--batch", "5"], "--batch: 5"),
        (["--batch", "4", "--accumulate", "3"], "--accumulate"),
        (["--lr", "0"], "--lr: 0 is not a positive number"),
        (["--ema", "1"], "--ema: 1 is not"),
        (["--optimizer", "sgd"], "--optimizer: sgd is not"),
        (["--dtype", "float16"], "--dtype: float16 is not"),
        (["--flip", "2"], "--flip"),
        (["--seed", "18446744073709551616"], "--seed: 18446744073709551616 is not"),
        (["-o", "out.safetensors"], "--out: out.safetensors: the output is not a safetensors file"),
        (["--logdir", "/dev/null/logs"], "--logdir: /dev/null/logs: Not a directory"),
        (["--image-size", "30"], "--image-size: 30x30 is not a multiple"),
        (["--resume", "nothing.pth"], "--resume: nothing.pth: No such file"),
        (["-o", "nowhere/out.pth"], "--out: nowhere/out.pth: there is no folder"),
        (["--device", "tpu"], "--device: 'tpu' is not a device"),
    ],
)
def test_bad_options_are_named(more, expected, dense, folder, capsys):
    assert expected in fails(train, [*arguments(dense, folder, "out.pth"), *more], capsys)


@pytest.mark.usefixtures("_empty_folder")
def test_a_model_that_is_reduced_without_predictors_is_no_start(dense, folder, tmp_path, capsys):
    content = torch.load(dense, weights_only=False)
    vars(content["args"])["base_keep_rate"] = 0.7
    torch.save(content, tmp_path / "evit.pth")
    dvit.convert(dense, method="tome", device="cpu").save(tmp_path / "tome.safetensors")
    for name in ("evit.pth", "tome.safetensors"):
        said = fails(train, arguments(tmp_path / name, folder, "out.pth"), capsys)
        assert f"{name}: runs as {name.split('.')[0]}, which is not trained here" in said


@pytest.mark.usefixtures("_empty_folder")
def test_bad_files_and_folders_are_named(dense, folder, tmp_path, capsys):
    no_rate = [dense, folder, "-o", "out.pth", *QUICK]
    assert "--keep-rate: is needed, e.g. 0.7" in fails(train, no_rate, capsys)
    assert "is the input itself" in fails(train, arguments(dense, folder, dense), capsys)
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in fails(train, arguments(dense, tmp_path / "empty", "out.pth"), capsys)
    draw_all(tmp_path / "one" / "a", 8)
    assert "has only one class folder" in fails(train, arguments(dense, tmp_path / "one", "out.pth"), capsys)
    assert "there is no such folder" in fails(train, arguments(dense, tmp_path / "none", "out.pth"), capsys)
    for name in "bc":
        (tmp_path / "one" / name).mkdir()
    assert "no image in the class folder 'b'" in fails(train, arguments(dense, tmp_path / "one", "out.pth"), capsys)
    (tmp_path / "one" / "a").rename(tmp_path / "one" / "x")
    (tmp_path / "one" / "b").rmdir()
    val = ["--val", tmp_path / "one"]
    assert "has a class folder 'x', which" in fails(train, arguments(dense, folder, "out.pth", *val), capsys)


@pytest.mark.usefixtures("_empty_folder")
def test_only_the_same_run_goes_on(dense, folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.pth"
    save = Run.save

    def save_and_stop(self) -> None:
        save(self)
        raise _StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", save_and_stop)
        with pytest.raises(_StoppedError):
            train.main(arguments(dense, folder, out))
    resume = ["--resume", out]
    assert "holds an unfinished training" in fails(train, arguments(dense, folder, out), capsys)
    half = arguments(dense, folder, out, *resume, "--keep-rate", "0.5")
    assert "keep_rate 0.7, this run has 0.5" in fails(train, half, capsys)
    assert "lr 0.001, this run has 0.01" in fails(train, arguments(dense, folder, out, *resume, "--lr", "0.01"), capsys)
    other = write_dense(tmp_path / "other.pth")
    content = torch.load(other, weights_only=False)
    content["model"]["head.bias"] += 1
    torch.save(content, other)
    assert "another dense model" in fails(train, arguments(other, folder, out, *resume), capsys)
    draw_all(tmp_path / "data" / "a", 9)
    draw_all(tmp_path / "data" / "b", 9)
    draw_all(tmp_path / "data" / "c", 9)
    assert "other images" in fails(train, arguments(dense, tmp_path / "data", out, *resume), capsys)
    assert "no unfinished training" in fails(train, arguments(dense, folder, "out.pth", "--resume", whole), capsys)
    content = torch.load(out, weights_only=False)
    for place in ({"step": 6}, {"epoch": 2}, {"epoch": -1}):
        torch.save(content | {"training": content["training"] | place}, tmp_path / "changed.pth")
        changed = arguments(dense, folder, out, "--resume", tmp_path / "changed.pth")
        assert "holds an unfinished training" in fails(train, changed, capsys)
        changed = arguments(dense, folder, "new.pth", "--resume", tmp_path / "changed.pth")
        assert "does not fit this run" in fails(train, changed, capsys)
    no_file = arguments(dense, folder, "out.pth", "--resume", folder / "a" / "000.png")
    assert "is not a file of dvit-train" in fails(train, no_file, capsys)


class _StoppedError(Exception):
    pass


@pytest.mark.usefixtures("_empty_folder")
def test_a_batch_that_the_processes_cannot_share_is_refused(dense, folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch: 4 images" in fails(train, arguments(dense, folder, "out.pth"), capsys)
    monkeypatch.setenv("RANK", "7")
    assert "RANK: 7" in fails(train, arguments(dense, folder, "out.pth"), capsys)


@pytest.mark.slow
def test_a_worker_that_is_killed(dense, folder, tmp_path):
    killed = "import os, signal, dvit_infer.training.data as data, sys\n"
    killed += "data._Maker.__getitem__ = lambda self, at: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed += "from dvit_infer.cli.train import main; sys.exit(main(sys.argv[1:]))"
    argv = arguments(dense, folder, tmp_path / "out.pth", "--workers", "1")
    done = subprocess.run([sys.executable, "-c", killed, *argv], capture_output=True, text=True, env=ENV, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "error: --workers: a worker process was killed" in done.stderr
    assert not os.listdir(tmp_path)
