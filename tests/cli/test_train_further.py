"""dvit-train goes on: for more epochs, and from a dynamic model."""

import re

import pytest
import torch
from commands import fails
from small_training import QUICK, arguments, trained, write_dense

import dvit_infer as dvit
from dvit_infer.cli import train
from dvit_infer.models.vit.lvvit import LVViT
from dvit_infer.training.loop import Run
from dvit_infer.training.student import make_pair

pytestmark = pytest.mark.slow  # as a whole: each of them runs commands for half a second


def stopped(dense, folder, out, monkeypatch, *more):
    """A run that was stopped after its first epoch."""

    class StoppedError(Exception):
        pass

    def save(self):
        original(self)
        raise StoppedError

    original = Run.save
    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", save)
        with pytest.raises(StoppedError):
            train.main(arguments(dense, folder, out, *more))
    return out


@pytest.mark.parametrize("ema", [[], ["--ema", "0.9"]])
def test_a_stopped_run_resumes_with_more_epochs(ema, dense, folder, tmp_path, capsys, monkeypatch):
    out = stopped(dense, folder, tmp_path / "out.pth", monkeypatch, *ema)
    capsys.readouterr()
    assert train.main(arguments(dense, folder, out, *ema, "--epochs", "4", "--resume")) == 0
    said = capsys.readouterr().out
    assert "resuming from" in said
    # Step 7 is the end of the warm-up: the peak, under both schedules.
    assert "4 epochs instead of 2: the schedule of 4 epochs from here on, learning rate 0.001 (was 0.001)" in said
    assert "anew" not in said
    assert [int(n) for n in re.findall(r"epoch (\d) of 4", said)] == [2, 3, 4]
    assert torch.load(out, weights_only=False)["epoch"] == 4


def test_a_finished_run_resumes_with_more_epochs(dense, folder, whole, tmp_path, capsys, monkeypatch):
    rates, step = [], Run._step

    def watched(self, *given):
        values = step(self, *given)
        rates.append(max(group["lr"] for group in self.optimizer.param_groups))
        return values

    monkeypatch.setattr(Run, "_step", watched)
    out = tmp_path / "longer.pth"
    assert train.main(arguments(dense, folder, out, "--epochs", "4", "--resume", whole)) == 0
    said = capsys.readouterr().out
    assert f"resuming from {whole}: epoch 3, step 1" in said
    rate = re.search(r"4 epochs instead of 2: .*, learning rate (\S+) \(was 1e-06\)", said)[1]
    assert "the optimiser starts anew: a finished file does not hold its state" in said
    # The cosine of 4 epochs with one of warm-up, a third of the way: 3/4 of the peak.
    assert rates[0] == pytest.approx(float(rate), rel=1e-2)
    assert rates[0] == pytest.approx(0.00075, rel=1e-2)
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 12
    assert dvit.verify(dvit.convert(out, device="cpu"), out).passed
    # And once more, from its own file.
    assert train.main(arguments(dense, folder, out, "--epochs", "5", "--resume")) == 0


@pytest.mark.usefixtures("_empty_folder")
def test_what_does_not_resume(dense, folder, whole, tmp_path, capsys, monkeypatch):
    same = arguments(dense, folder, "out.pth", "--resume", whole)
    assert "its 2 epochs are done, and a larger --epochs would resume it" in fails(train, same, capsys)
    assert "--epochs: 1, but" in fails(train, [*same, "--epochs", "1"], capsys)
    other = [*same, "--epochs", "3", "--keep-rate", "0.5"]
    assert "keep_rate 0.7, this run has 0.5" in fails(train, other, capsys)
    assert "with new_head False, this run has True" in fails(train, [*same, "--epochs", "3", "--new-head"], capsys)
    teacher = [*same, "--epochs", "3", "--teacher", write_dense(tmp_path / "teacher.pth")]
    assert "by another teacher" in fails(train, teacher, capsys)
    part = stopped(dense, folder, tmp_path / "part.pth", monkeypatch, "--epochs", "3")
    fewer = arguments(dense, folder, "out.pth", "--resume", part, "--epochs", "1")
    assert f"--epochs: 1, but {part} has done 1; a larger number" in fails(train, fewer, capsys)
    content = torch.load(whole, weights_only=False)
    vars(content["args"])["dvit_infer"]["run"]["epochs"] = "two"
    torch.save(content, tmp_path / "odd.pth")
    odd = arguments(dense, folder, "out.pth", "--resume", tmp_path / "odd.pth", "--epochs", "3")
    assert "is not a file of dvit-train" in fails(train, odd, capsys)
    del vars(content["args"])["dvit_infer"]["run"]  # a file of an earlier version
    torch.save(content, tmp_path / "old.pth")
    old = arguments(dense, folder, "out.pth", "--resume", tmp_path / "old.pth", "--epochs", "3")
    assert "holds no unfinished training" in fails(train, old, capsys)


def further(start, folder, out, *more):
    return [str(a) for a in (start, folder, "-o", out, *QUICK, *more)]


@pytest.mark.parametrize("saved", [False, True])
def test_a_dynamic_model_is_trained_further(saved, folder, whole, tmp_path, capsys):
    start, out = whole, tmp_path / "out.pth"
    if saved:
        start = tmp_path / "saved.safetensors"
        dvit.convert(whole, device="cpu").save(start)
    assert train.main(further(start, folder, out, "--freeze-epochs", "2")) == 0
    said = capsys.readouterr()
    assert f"{start} is dynamic: its predictors are trained further; keep rate 0.7, before blocks 1,2,3" in said.out
    assert f"the teacher is {start} without its predictors" in said.out
    assert said.err == ""
    before, after = trained(whole), trained(out)
    assert before.keys() == after.keys()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith("score_predictor.")}
    pair = make_pair(start, None)
    begins = pair.student.state_dict()
    assert all(torch.equal(begins[key], value) for key, value in before.items())
    assert not any(key.startswith("score_predictor.") for key in pair.teacher.state_dict())
    assert train.main(further(start, folder, out, "--epochs", "3", "--freeze-epochs", "2", "--resume")) == 0


def test_a_dynamic_model_with_another_rate_blocks_and_teacher(dense, folder, whole, tmp_path, capsys):
    out = tmp_path / "out.pth"
    more = ["--keep-rate", "0.8", "--prune-at", "0,1,3", "--teacher", dense, "--epochs", "1"]
    assert train.main(further(whole, folder, out, *more)) == 0
    said = capsys.readouterr().out
    assert "keep rate 0.8, before blocks 0,1,3" in said
    assert f"the teacher is {dense}" in said
    config = dvit.convert(out, device="cpu").config
    assert (config.prune_at, config.num_keep) == ((0, 1, 3), (12, 10, 8))
    assert vars(torch.load(out, weights_only=False)["args"])["base_rate"] == 0.8


@pytest.mark.usefixtures("_empty_folder")
def test_what_cannot_be_trained_further(dense, folder, whole, tmp_path, capsys):
    assert "but the weights hold 3 predictors" in fails(
        train, further(whole, folder, "o.pth", "--prune-at", "1"), capsys
    )
    assert "is the input itself" in fails(train, further(whole, folder, whole), capsys)
    assert "is the input itself" in fails(train, further(whole, folder, dense, "--teacher", dense), capsys)
    wide = write_dense(tmp_path / "wide.pth", embed_dim=64)
    assert "whose tokens are not those of" in fails(train, further(whole, folder, "o.pth", "--teacher", wide), capsys)
    stem = write_dense(tmp_path / "lvvit.pth", LVViT, stem_dim=8, mlp_dim=96)
    assert "whose tokens are not those of" in fails(train, further(whole, folder, "o.pth", "--teacher", stem), capsys)
    content = torch.load(dense, weights_only=False)
    content["args"].mean = [0.1] * 3
    torch.save(content, tmp_path / "bright.pth")
    bright = further(whole, folder, "o.pth", "--teacher", tmp_path / "bright.pth")
    assert "has another mean or std" in fails(train, bright, capsys)
    gone = further(whole, folder, "o.pth", "--teacher", "gone.pth")
    assert "gone.pth: No such file" in fails(train, gone, capsys)
