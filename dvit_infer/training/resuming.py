"""Resume a run from its file: as it stood, or for another number of epochs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.training import saving
from dvit_infer.training.loop import Run


def resume(run: Run, path: str | Path) -> list[str]:
    """Resume the file's run; return what the user should know about how it goes on, one line each.

    With another number of epochs the learning rate follows the schedule of the new number from here on. A finished run
    goes on from its weights (the averaged ones, if present), with a new state of the optimiser.

    Raises:
        InputError: The file is of another run (the message names the difference), has nothing to resume, or is damaged.
    """
    content = saving.resumable(path)
    if content is None:
        raise InputError(f"resume: {path}: holds no unfinished training; there is nothing to resume")
    before = saving.check_same(path, content[saving.KEY], run.identity)
    try:
        finished = _restore(run, path, content, before)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"resume: {path}: does not fit this run: {first}") from None
    run.has_saved = Path(path).resolve() == run.out
    lines = [] if before == run.settings.epochs else [_other_schedule(run, before)]
    return [*lines, "the optimiser starts anew: a finished file does not hold its state"] if finished else lines


def _restore(run: Run, path: str | Path, content: Mapping[str, Any], before: int) -> bool:
    """Load the file's state into the run; return whether the file's run is finished."""
    state, epochs = content[saving.KEY], run.settings.epochs
    run.epoch, run.step = int(state["epoch"]), int(state["step"])
    finished = state["optimizer"] is None
    if finished and epochs == run.epoch:
        more = f"its {epochs} epochs are done, and a larger --epochs would resume it"
        raise InputError(f"resume: {path}: holds no unfinished training: {more}")
    if epochs <= run.epoch and epochs != before:
        raise InputError(f"epochs: {epochs}, but {path} has done {run.epoch}; a larger number is expected")
    run.student.load_state_dict(content["model"] if state["student"] is None else state["student"])
    if not finished:
        run.optimizer.load_state_dict(state["optimizer"])
    if run.averaged is not None:
        run.averaged = {k: content["model"][k].to(run.device) for k in run.averaged}
    if not (0 <= run.epoch < epochs and 0 <= run.step < run.steps):
        raise ValueError(f"step {run.step} of epoch {run.epoch} is out of range")
    return finished


def _other_schedule(run: Run, before: int) -> str:
    """Describe the learning rate at the step where the run stands, by the new and the old number of epochs."""
    at, epochs = run.epoch * run.steps + run.step, run.settings.epochs
    new, old = (
        settings.peak_lr * settings.lr_factor(at, run.steps)
        for settings in (run.settings, replace(run.settings, epochs=before))
    )
    schedule = f"the schedule of {epochs} epochs from here on"
    return f"{epochs} epochs instead of {before}: {schedule}, learning rate {new:.3g} (was {old:.3g})"
