"""What a run says of itself: after a step, after an epoch, and when it cannot go on."""

from dataclasses import dataclass


class NotFiniteError(Exception):
    """The loss, or its gradient, is NaN or infinite: one line that names the step."""


@dataclass(frozen=True)
class Step:
    """What is known after a step.

    Attributes:
        epoch, step: from 0; the step is counted within the epoch, of `steps`.
        losses: total, cross-entropy, ratio, logits, tokens (`Losses.parts`).
        kept: share of the patches that every stage kept.
        lr: the predictors' learning rate.
        images_per_s: over the epoch so far, all processes together.
        seconds_left: to the end of the run, at that rate.
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
    """Means over the steps of an epoch, or of what was done of it since the run went on.

    Attributes:
        unreadable: images that could not be read, and how many more were left out for that reason.
        top1: percent of the held-out images that the pruned model is right about; None: there are none, or the run
            is to stop, and they were not counted.
    """

    last: Step
    losses: tuple[float, ...]
    kept: tuple[float, ...]
    unreadable: tuple[tuple[str, str], ...]
    unreadable_count: int
    top1: float | None
