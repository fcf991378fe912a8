"""Reports of a run: after a step, after an epoch, and when it fails."""

from dataclasses import dataclass


class NotFiniteError(Exception):
    """The loss or its gradient is NaN or infinite; the message is one line that names the step."""


@dataclass(frozen=True)
class Step:
    """The state after a step.

    Attributes:
        epoch, step: from 0; the step within the epoch, which has `steps`.
        losses: total, cross-entropy, ratio, logits, tokens (`Losses.parts`).
        kept: share of patches kept at each stage.
        lr: the predictors' learning rate.
        images_per_s: over the epoch so far, all processes together.
        seconds_left: time to the end of the run, at that rate.
    """

    epoch: int
    step: int
    steps: int
    losses: tuple[float, ...]
    kept: tuple[float, ...]
    lr: float
    images_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Epoch:
    """Means over the steps of an epoch, or over its steps since the run was resumed.

    Attributes:
        unreadable: some of the unreadable image files with reasons; `unreadable_count` is their number.
        top1: top-1 accuracy of the pruned model on the held-out images, in percent; None: there are none, or the run
            was stopped before.
    """

    last: Step
    losses: tuple[float, ...]
    kept: tuple[float, ...]
    unreadable: tuple[tuple[str, str], ...]
    unreadable_count: int
    top1: float | None
