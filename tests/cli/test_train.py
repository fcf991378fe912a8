"""dvit-train from end to end: what it writes, how it stops and resumes, with one process and with several."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ENV, run
from drawn import write_text
from small_training import PLAIN, arguments, trained

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.training import held_out, loop


def same(a: Path, b: Path) -> bool:
    ours, theirs = trained(a), trained(b)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_folders_that_are_left_out_are_named(dense, folder, tmp_path, capsys):
    for name in (".cache", "__MACOSX"):
        (shutil.copytree(folder, tmp_path / "with", dirs_exist_ok=True) / name).mkdir()
    assert train.main(arguments(dense, tmp_path / "with", tmp_path / "out.pth", "--epochs", "1")) == 0
    warning = f"warning: {tmp_path}/with: 2 folders left out, hidden or left by a tool: '.cache', '__MACOSX'\n"
    assert capsys.readouterr().err == warning


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
        pattern = rf"epoch {epoch} of 2: loss {number} \({parts}\), kept {number}, "
        pattern += rf".* images/s, \d:\d\d:\d\d left, top-1 {number}%"
        assert re.search(pattern, out.out), out.out
    assert "24 images of 3 classes; " in out.out
    assert out.err == ""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert len(log.Scalars("loss/loss")) == 12
    assert len(log.Scalars("val/top-1")) == 2


def test_the_backbone_is_frozen_at_first(dense, folder, tmp_path):
    assert train.main(arguments(dense, folder, tmp_path / "out.pth", "--freeze-epochs", "2")) == 0
    before, after = trained(dense), trained(tmp_path / "out.pth")
    assert all(torch.equal(after[key], value) for key, value in before.items())


def _started(*command: str) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell or torchrun starts it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=ENV, text=True, start_new_session=True, **pipes)


def _wait_for(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


LONG = ["--epochs", "3", "--ema", "0.9"]

# In the third step of the second epoch it sends the signal to its process group, as a terminal does.
STOPS_ITSELF = """
import os, sys
from dvit_infer.cli.train import main
from dvit_infer.training.loop import Run

step = Run._step


def stops(self, *given):
    if (self.epoch, self.step) == (1, 2):
        os.killpg(0, {})
    return step(self, *given)


Run._step = stops
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def long_run(dense, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "out.pth"
    assert train.main(arguments(dense, folder, out, *LONG)) == 0
    return out


FEW_STOPS = (signal.SIGKILL, 2), (signal.SIGINT, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers"),
    [
        pytest.param(how, workers, marks=() if (how, workers) in FEW_STOPS else pytest.mark.large)
        for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
        for workers in (0, 2)
    ],
)
def test_goes_on_to_the_bit_after_it_was_stopped(how, workers, dense, folder, long_run, tmp_path):
    out, long = tmp_path / "out.pth", [*LONG, "--workers", str(workers)]
    process = _started("-c", STOPS_ITSELF.format(int(how)), *arguments(dense, folder, out, *long))
    said, errors = process.communicate()
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert errors == "error: interrupted\n"
        assert "stopped after step 3 of epoch 2; --resume continues" in said
    state = torch.load(out, weights_only=False)["training"]
    assert (state["epoch"], state["step"]) == ((1, 0) if how == signal.SIGKILL else (1, 3))
    again = run("-m", "dvit_infer.cli.train", *arguments(dense, folder, out, *long, "--resume"))
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert same(out, long_run)


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _losses(said: str) -> list[float]:
    lines = re.findall(r"epoch .*?: (loss .*?), \d+\.\d images/s", said)
    return [float(n) for line in lines for n in re.findall(r"\d+\.\d+(?:e-\d+)?", line)]


def _two_processes() -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _free_port()]


@pytest.mark.slow
@pytest.mark.parametrize(("per_image", "accumulate"), [("on", "1"), pytest.param("off", "2", marks=pytest.mark.large)])
def test_two_processes_lose_what_one_does(per_image, accumulate, dense, folder, tmp_path):
    more = ["--batch", "8", "--per-image", per_image, "--accumulate", accumulate, "--val", folder]
    one = run("-m", "dvit_infer.cli.train", *arguments(dense, folder, tmp_path / "one.pth", *more))
    assert one.returncode == 0, one.stderr
    both = arguments(dense, folder, tmp_path / "two.pth", *more)
    two = run(*_two_processes(), "-m", "dvit_infer.cli.train", *both)
    assert two.returncode == 0, two.stderr
    assert "Warning" not in two.stderr
    expected, found = _losses(one.stdout), _losses(two.stdout)
    assert len(expected) == len(found) == 2 * 8
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)
    top1 = [re.findall(r"top-1 (.*)%", out) for out in (one.stdout, two.stdout)]
    assert len(top1[0]) == 2
    assert top1[0] == top1[1]
    ours, theirs = trained(tmp_path / "two.pth"), trained(tmp_path / "one.pth")
    assert all(torch.allclose(ours[key], value, atol=1e-4) for key, value in theirs.items())


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(dense, folder, tmp_path):
    out = tmp_path / "out.pth"
    long = arguments(dense, folder, out, "--epochs", "400")
    process = _started(*_two_processes(), "-m", "dvit_infer.cli.train", *long)
    _wait_for(out.exists, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    said, errors = process.communicate()
    # The file is there at the end of an epoch: the signal may come before the next one's first step.
    assert re.search(r"stopped after (step \d+ of )?epoch \d+; --resume continues", said), errors
    assert errors.count("error: interrupted") == 2
    other = arguments(dense, folder, out, "--resume", "--epochs", "400", "--batch", "8")
    again = run("-m", "dvit_infer.cli.train", *other)
    assert "was trained with batch 4, this run has 8" in again.stderr


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
    more = ["--lr", "9e5", "--clip", "9e5", "--epochs", "9", "--backbone-lr-scale", "1", "--freeze-epochs", "0"]
    assert train.main(arguments(dense, folder, tmp_path / "out.pth", *more)) == 1
    assert re.search(r"error: the (loss|gradient) is not finite at step \d+ of epoch \d", capsys.readouterr().err)


def test_a_image_that_cannot_be_read_is_skipped_and_counted(dense, folder, tmp_path, capsys):
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in (folder / name).iterdir():
            (tmp_path / "data" / name / path.name).write_bytes(path.read_bytes())
    write_text(tmp_path / "data" / "b" / "000.png")
    (tmp_path / "data" / "b" / "bad.jpg").write_bytes(b"")
    assert train.main(arguments(dense, tmp_path / "data", tmp_path / "out.pth", "--batch", "13", *PLAIN)) == 0
    said = capsys.readouterr().out
    assert "b/bad.jpg" in said
    assert re.search(r"epoch 1 of 2: .* [12] images skipped", said)


def test_a_stop_ends_the_counting_of_held_out_images(dense, folder, tmp_path, capsys, monkeypatch):
    shown, go = [], loop.Run.go

    def on_counted(done: int, total: int) -> None:
        shown.append((done, total))

    def going(self, on_step, on_epoch, _, stop) -> bool:
        return go(self, on_step, on_epoch, on_counted, lambda: bool(shown))

    monkeypatch.setattr(loop.Run, "go", going)
    monkeypatch.setattr(held_out, "AT_ONCE", 8)
    argv = arguments(dense, folder, tmp_path / "out.pth", "--val", folder)
    assert train.main(argv) == 130
    assert shown == [(8, 24)]
    said = capsys.readouterr().out
    assert "epoch 1 of 2: loss" in said
    assert "top-1" not in said


@pytest.mark.slow
def test_a_process_whose_peer_dies_says_so(dense, folder, tmp_path):
    dies = "import os, sys, dvit_infer.training.loop as loop\n"
    dies += "step = loop.Run._step\n"
    dies += "def dying(self, *given):\n    os.environ['RANK'] == '1' and os._exit(1)\n    return step(self, *given)\n"
    dies += "loop.Run._step = dying\n"
    dies += "from dvit_infer.cli.train import main; sys.exit(main(sys.argv[1:]))\n"
    argv, place = arguments(dense, folder, tmp_path / "out.pth"), {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    place["MASTER_PORT"] = _free_port()
    both = [
        subprocess.Popen([sys.executable, "-c", dies, *argv], env={**ENV, **place, "RANK": rank}, **pipes)
        for rank in ("0", "1")
    ]
    errors = [process.communicate()[1] for process in both]
    assert (both[0].returncode, both[1].returncode) == (2, 1)
    assert errors[0].splitlines()[-1].startswith("error: WORLD_SIZE: another process has ended")
    assert "Traceback" not in errors[0]


def test_a_stop_at_the_end_of_an_epoch_still_reports_it(dense, folder, tmp_path, capsys, monkeypatch):
    asked = []
    found = loop.Run._step

    def step(self, *given):
        asked.append(self.step == 5)
        return found(self, *given)

    monkeypatch.setattr(loop.Run, "_step", step)
    go = loop.Run.go
    monkeypatch.setattr(loop.Run, "go", lambda self, *said: go(self, *said[:3], lambda: asked[-1]))
    assert train.main(arguments(dense, folder, tmp_path / "out.pth")) == 130
    said = capsys.readouterr().out
    assert "epoch 1 of 2: loss" in said
    assert "stopped after epoch 1; --resume" in said
    assert torch.load(tmp_path / "out.pth", weights_only=False)["epoch"] == 1


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_file_whole(dense, folder, tmp_path):
    out = tmp_path / "out.pth"
    assert train.main(arguments(dense, folder, out, "--epochs", "1")) == 0
    # Twice a finished file has room for the first epoch's, in which the optimiser knows only the predictors.
    room = 2 * out.stat().st_size
    out.unlink()
    limited = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}));"
    limited += "from dvit_infer.cli.train import main; sys.exit(main(sys.argv[1:]))"
    three = arguments(dense, folder, out, "--epochs", "3")
    stopped = run("-c", limited, *three)
    assert stopped.returncode == 2
    assert re.fullmatch(r"error: --out: .*out.pth.*\n", stopped.stderr), stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
    assert train.main([*three, "--resume"]) == 0
