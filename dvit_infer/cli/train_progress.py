"""Progress of dvit-train: a bar with losses, a line per epoch, TensorBoard logs."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.images import shown
from dvit_infer.errors import InputError

if TYPE_CHECKING:
    from dvit_infer.training.reports import Epoch, Step

_NAMES = ("loss", "cross-entropy", "ratio", "logits", "tokens")
_NAMED = 3  # unreadable images of an epoch that are named; the rest are only counted

# Called after a step; called after some held-out images; hides the bar while the block prints.
_Bar = tuple[
    Callable[["Step"], None], Callable[[int, int], None], Callable[[], contextlib.AbstractContextManager[None]]
]
Show = tuple[Callable[["Step"], None], Callable[["Epoch"], None], Callable[[int, int], None]]


def check_logdir(folder: str) -> None:
    """Create the log folder.

    Raises:
        InputError: TensorBoard is not installed, or the folder cannot be created.
    """
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise InputError("logdir: TensorBoard is not installed; pip install 'dvit-infer[train]'") from None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"logdir: {folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def showing(epochs: int, logdir: str | None) -> Iterator[Show]:
    """Yield the functions to call after every step, every epoch, and every few held-out images.

    The bar is shown on stderr, if that is a terminal. Call `check_logdir` first.
    """
    with contextlib.ExitStack() as stack:
        bar, counted, hidden = stack.enter_context(_bar(epochs))
        log = stack.enter_context(_log(logdir))

        def on_step(step: "Step") -> None:
            bar(step)
            log(_at(step), _values(step.losses, step.kept) | {"lr": step.lr, "images/s": step.images_per_s})

        def on_epoch(epoch: "Epoch") -> None:
            with hidden():
                for path, why in epoch.unreadable[:_NAMED]:
                    print(shown(f"cannot be read, skipped: {path}: {why}"))
                print(_line(epoch, epochs), flush=True)
                for warning in epoch.warnings:
                    print(f"warning: {warning}", file=sys.stderr)
            if epoch.top1 is not None:
                log(_at(epoch.last), {"val/top-1": epoch.top1})

        yield on_step, on_epoch, counted


def _at(step: "Step") -> int:
    return step.epoch * step.steps + step.step


def _values(losses: Sequence[float], kept: Sequence[float]) -> dict[str, float]:
    values = {f"loss/{name}": value for name, value in zip(_NAMES, losses, strict=True)}
    return values | {f"kept/{stage}": share for stage, share in enumerate(kept)}


def _line(epoch: "Epoch", epochs: int) -> str:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in zip(_NAMES[1:], epoch.losses[1:], strict=True))
    kept = ", ".join(f"{share:.3f}" for share in epoch.kept)
    line = f"epoch {epoch.last.epoch + 1} of {epochs}: loss {epoch.losses[0]:.4f} ({losses}), kept {kept}"
    line += f", {epoch.last.images_per_s:.1f} images/s, {_left(epoch.last)} left"
    if epoch.unreadable_count:
        line += f", {epoch.unreadable_count} images skipped"
    return line if epoch.top1 is None else f"{line}, top-1 {epoch.top1:.2f}%"


def _left(step: "Step") -> timedelta:
    return timedelta(seconds=round(step.seconds_left))


@contextlib.contextmanager
def _bar(epochs: int) -> Iterator[_Bar]:
    if not sys.stderr.isatty():
        yield (lambda step: None), (lambda done, total: None), contextlib.nullcontext
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[said]}")
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("training", total=None, said="")

        def show(step: "Step") -> None:
            kept = " ".join(f"{share:.2f}" for share in step.kept)
            said = f"loss {step.losses[0]:.3f}, kept {kept}, {step.images_per_s:.1f} images/s, {_left(step)} left"
            name = f"epoch {step.epoch + 1} of {epochs}"
            bar.update(task, description=name, total=step.steps, completed=step.step + 1, said=said)

        def show_counted(done: int, total: int) -> None:
            bar.update(task, description="held-out images", total=total, completed=done, said="")

        @contextlib.contextmanager
        def hidden() -> Iterator[None]:
            bar.stop()
            yield
            bar.start()

        yield show, show_counted, hidden


@contextlib.contextmanager
def _log(folder: str | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    if folder is None:
        yield lambda step, values: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(folder)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()
