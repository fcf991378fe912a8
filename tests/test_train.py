"""dvit-train from end to end: what it writes, how it goes on, what it refuses."""

import argparse
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ENV, fails, run
from drawn import draw_all, write_text

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.fill import fill
from dvit_infer.reference.deit import DeiT
from dvit_infer.training import loop

KEEP = ["--keep-rate", "0.7"]
QUICK = ["--epochs", "2", "--batch", "4", "--workers", "0", "--lr", "1e-3", "--freeze-epochs", "1", "--device", "cpu"]
PLAIN = ["--mixup", "0", "--cutmix", "0"]


def dense_checkpoint(path: Path, classes: int = 3) -> Path:
    """A DeiT of four blocks for pictures of 32 x 32; says how many heads it has, and how it was evaluated."""
    with torch.device("meta"):
        model = DeiT(
            patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_dim=64, num_classes=classes, num_patches=16, eps=1e-6
        )
    state = {k: torch.from_numpy(fill(k, tuple(v.shape), 3)) for k, v in model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace(num_heads=2, mean=[0.4] * 3, std=[0.3] * 3)}, path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_checkpoint(tmp_path_factory.mktemp("dense") / "dense.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of eight pictures, some of formats and sizes of their own."""
    where = tmp_path_factory.mktemp("pictures")
    for label in range(3):
        draw_all(where / "abc"[label], 8, 100 * label)
    return where


def trained(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=False)
    return content["model"]


def same(a: Path, b: Path) -> bool:
    ours, theirs = trained(a), trained(b)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def arguments(dense, folder, out, *more) -> list[str]:
    return [str(a) for a in (dense, folder, *KEEP, "-o", out, *QUICK, *more)]


@pytest.fixture(scope="module")
def whole(dense, folder, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out.pth"
    assert train.main(arguments(dense, folder, out)) == 0
    return out


def test_what_it_writes_is_read_back_without_help(whole, dense):
    content = torch.load(whole, weights_only=False)
    assert content.keys() == {"model", "args", "epoch"}
    said = vars(content["args"])
    assert (said["base_rate"], said["num_heads"], said["prune_at"], said["skip_lam"]) == (0.7, 2, [1, 2, 3], 1.0)
    engine = dvit.convert(whole)
    assert engine.config.num_keep == (11, 7, 5)
    assert engine.config.prune_at == (1, 2, 3)
    assert engine.config.mean == (0.4, 0.4, 0.4)
    assert dvit.verify(engine, whole).passed
    before = trained(dense)
    moved = {key for key, value in trained(whole).items() if key in before and not torch.equal(value, before[key])}
    assert "blocks.0.attn.qkv.weight" in moved


def test_says_how_it_goes(dense, folder, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        (tmp_path / "data" / name).symlink_to(folder)
    more = ["--logdir", tmp_path / "logs", "--ema", "0.9", "--per-image", "off"]
    assert train.main(arguments(dense, tmp_path / "data", tmp_path / "out.pth", *more)) == 0
    out = capsys.readouterr()
    number = r"\d+(\.\d+)?(e-\d+)?"
    for epoch in (1, 2):
        parts = rf"cross-entropy {number}, ratio {number}, logits {number}, tokens {number}"
        pattern = rf"epoch {epoch} of 2: loss {number} \({parts}\), kept {number}, .* images/s, top-1 {number}%"
        assert re.search(pattern, out.out), out.out
    assert "24 pictures of 3 classes; " in out.out
    assert out.err == ""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert len(log.Scalars("loss/loss")) == 12
    assert len(log.Scalars("val/top-1")) == 2


def test_the_backbone_is_frozen_at_first(dense, folder, tmp_path):
    assert train.main(arguments(dense, folder, tmp_path / "out.pth", "--freeze-epochs", "2")) == 0
    before, after = trained(dense), trained(tmp_path / "out.pth")
    assert all(torch.equal(after[key], value) for key, value in before.items())


def _started(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dvit_infer.cli.train", *argv]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_goes_on_to_the_bit_after_it_was_stopped(how, dense, folder, tmp_path):
    out = tmp_path / "out.pth"
    long = ["--epochs", "6", "--ema", "0.9"]
    plain = tmp_path / "plain.pth"
    assert run("-m", "dvit_infer.cli.train", *arguments(dense, folder, plain, *long)).returncode == 0
    process = _started(*arguments(dense, folder, out, *long))
    _wait_for(out.exists, process)
    process.send_signal(how)
    said, errors = process.communicate()
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert errors == "error: interrupted\n"
        assert re.search(r"stopped after step \d+ of epoch \d+; --resume goes on", said)
    assert "training" in torch.load(out, weights_only=False)  # it was not at its end yet
    again = run("-m", "dvit_infer.cli.train", *arguments(dense, folder, out, *long, "--resume"))
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    assert same(out, plain)


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _losses(said: str) -> list[float]:
    lines = re.findall(r"epoch .*?: (loss .*?), \d+\.\d images/s", said)
    return [float(n) for line in lines for n in re.findall(r"\d+\.\d+(?:e-\d+)?", line)]


@pytest.mark.parametrize("per_image", ["on", "off"])
def test_two_processes_lose_what_one_does(per_image, dense, folder, tmp_path):
    more = ["--batch", "8", "--per-image", per_image]
    one = run("-m", "dvit_infer.cli.train", *arguments(dense, folder, tmp_path / "one.pth", *more))
    assert one.returncode == 0, one.stderr
    two = run(
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _free_port()),
        *("-m", "dvit_infer.cli.train", *arguments(dense, folder, tmp_path / "two.pth", *more)),
    )
    assert two.returncode == 0, two.stderr
    expected, found = _losses(one.stdout), _losses(two.stdout)
    assert len(expected) == len(found) == 2 * 8
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)
    ours, theirs = trained(tmp_path / "two.pth"), trained(tmp_path / "one.pth")
    assert all(torch.allclose(ours[key], value, atol=1e-4) for key, value in theirs.items())


@pytest.mark.parametrize(("step", "there"), [(2, "nothing was written"), (9, "holds the last good state")])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(step, there, dense, folder, tmp_path, capsys, monkeypatch):
    found, calls = loop.losses, []

    def losses(*given):
        calls.append(given)
        out = found(*given)
        return replace(out, total=out.total * torch.nan) if len(calls) == step else out

    monkeypatch.setattr(loop, "losses", losses)
    out = tmp_path / "out.pth"
    assert train.main(arguments(dense, folder, out)) == 1
    error = capsys.readouterr().err
    where = f"step {step} of epoch 1" if step <= 6 else f"step {step - 6} of epoch 2"
    assert re.fullmatch(rf"error: the loss is not finite at {where}; .*{there}.*\n", error)
    assert out.exists() == (step > 6)
    if step > 6:
        assert train.main(arguments(dense, folder, out, "--resume")) == 0


def test_a_step_too_long_ends_in_a_loss_that_is_not_finite(dense, folder, tmp_path, capsys):
    more = ["--lr", "9e5", "--clip", "9e5", "--epochs", "9", "--backbone-lr", "1", "--freeze-epochs", "0"]
    assert train.main(arguments(dense, folder, tmp_path / "out.pth", *more)) == 1
    assert re.search(r"error: the (loss|gradient) is not finite at step \d+ of epoch \d", capsys.readouterr().err)


def test_a_picture_that_cannot_be_read_is_skipped_and_counted(dense, folder, tmp_path, capsys):
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in (folder / name).iterdir():
            (tmp_path / "data" / name / path.name).write_bytes(path.read_bytes())
    write_text(tmp_path / "data" / "b" / "000.png")
    (tmp_path / "data" / "b" / "bad.jpg").write_bytes(b"")
    assert train.main(arguments(dense, tmp_path / "data", tmp_path / "out.pth", "--batch", "13", *PLAIN)) == 0
    said = capsys.readouterr().out
    assert "b/bad.jpg" in said
    assert re.search(r"epoch 1 of 2: .* [12] pictures skipped", said)


def test_a_full_disk_leaves_the_last_file_whole(dense, folder, tmp_path, capsys, monkeypatch):
    import errno

    out, saved, calls = tmp_path / "out.pth", torch.save, []

    def save(content, path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(content, path)

    monkeypatch.setattr(torch, "save", save)
    assert train.main(arguments(dense, folder, out)) == 2
    assert re.fullmatch(r"error: --out: .*out.pth: No space left on device\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
    monkeypatch.undo()
    assert train.main(arguments(dense, folder, out, "--resume")) == 0


@pytest.mark.usefixtures("_empty_folder")
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--keep-rate", "1"], "--keep-rate: 1 keeps every patch"),
        (["--keep-rate", "0"], "--keep-rate: 0.0 is no share"),
        (["--keep-rate", "nan"], "--keep-rate: nan is no share"),
        (["--keep-rate", "0.1"], "--keep-rate: a keep rate of 0.1 leaves no patch"),
        (["--prune-at", "1,9"], "--prune-at: there is no block 9"),
        (["--epochs", "0"], "--epochs: 0 is not"),
        (["--batch", "0"], "--batch: 0"),
        (["--batch", "25", *PLAIN], "--batch: 24 pictures are fewer"),
        (["--batch", "5"], "--batch: 5"),
        (["--batch", "4", "--accumulate", "3"], "--accumulate"),
        (["--lr", "0"], "--lr: 0 is no positive number"),
        (["--ema", "1"], "--ema: 1 is not"),
        (["--optimizer", "sgd"], "--optimizer: sgd is not"),
        (["--dtype", "float16"], "--dtype: float16 is not"),
        (["--flip", "2"], "--flip"),
        (["--image-size", "30"], "--image-size: 30x30 is no multiple"),
        (["--resume", "nothing.pth"], "--resume: nothing.pth: No such file"),
        (["-o", "nowhere/out.pth"], "--out: nowhere/out.pth: there is no folder"),
        (["--device", "tpu"], "--device: 'tpu' is no device"),
    ],
)
def test_bad_options_are_named(more, expected, dense, folder, capsys):
    assert expected in fails(train, [*arguments(dense, folder, "out.pth"), *more], capsys)


@pytest.mark.usefixtures("_empty_folder")
def test_bad_files_and_folders_are_named(dense, folder, whole, tmp_path, capsys):
    other = dense_checkpoint(tmp_path / "five.pth", classes=5)
    assert "3 class folders, but" in fails(train, arguments(other, folder, "out.pth"), capsys)
    assert "holds score predictors already" in fails(train, arguments(whole, folder, "out.pth"), capsys)
    assert "is the input itself" in fails(train, arguments(dense, folder, dense), capsys)
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in fails(train, arguments(dense, tmp_path / "empty", "out.pth"), capsys)
    draw_all(tmp_path / "one" / "a", 8)
    assert "has one class folder" in fails(train, arguments(dense, tmp_path / "one", "out.pth"), capsys)
    assert "there is no such folder" in fails(train, arguments(dense, tmp_path / "none", "out.pth"), capsys)


@pytest.mark.usefixtures("_empty_folder")
def test_only_the_same_run_goes_on(dense, folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.pth"
    with monkeypatch.context() as patched:
        patched.setattr("dvit_infer.training.loop.Run._finish_epoch", _stop_after_one)
        with pytest.raises(_StoppedError):
            train.main(arguments(dense, folder, out))
    resume = ["--resume", out]
    assert "holds an unfinished training" in fails(train, arguments(dense, folder, out), capsys)
    half = arguments(dense, folder, out, *resume, "--keep-rate", "0.5")
    assert "keep_rate 0.7, this run has 0.5" in fails(train, half, capsys)
    assert "lr 0.001, this run has 0.01" in fails(train, arguments(dense, folder, out, *resume, "--lr", "0.01"), capsys)
    other = dense_checkpoint(tmp_path / "other.pth")
    content = torch.load(other, weights_only=False)
    content["model"]["head.bias"] += 1
    torch.save(content, other)
    assert "another dense model" in fails(train, arguments(other, folder, out, *resume), capsys)
    draw_all(tmp_path / "data" / "a", 9)
    draw_all(tmp_path / "data" / "b", 9)
    draw_all(tmp_path / "data" / "c", 9)
    assert "other pictures" in fails(train, arguments(dense, tmp_path / "data", out, *resume), capsys)
    assert "no unfinished training" in fails(train, arguments(dense, folder, out, "--resume", whole), capsys)
    no_file = arguments(dense, folder, out, "--resume", folder / "a" / "000.png")
    assert "is no file of dvit-train" in fails(train, no_file, capsys)


class _StoppedError(Exception):
    pass


def _stop_after_one(self, finished: bool) -> None:
    self.epoch, self.step = 1, 0
    self.save()
    raise _StoppedError


@pytest.mark.usefixtures("_empty_folder")
def test_a_batch_that_the_processes_cannot_share_is_refused(dense, folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch: 4 pictures" in fails(train, arguments(dense, folder, "out.pth"), capsys)
    monkeypatch.setenv("RANK", "7")
    assert "RANK: 7" in fails(train, arguments(dense, folder, "out.pth"), capsys)
