"""Reports of a run: after a step, after an epoch, and when it fails."""

from collections.abc import Sequence
from dataclasses import dataclass

from dvit_infer.training.settings import Settings

COLLAPSED = 0.005  # a mean share of patches over an epoch that is this close to none or all


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
        warnings: what is going wrong, one line each.
        top1: top-1 accuracy of the pruned model on the held-out images, in percent; None: there are none, or the run
            was stopped before.
    """

    last: Step
    losses: tuple[float, ...]
    kept: tuple[float, ...]
    unreadable: tuple[tuple[str, str], ...]
    unreadable_count: int
    top1: float | None
    warnings: tuple[str, ...] = ()


def collapse_warnings(kept: Sequence[float], ratios: Sequence[float], settings: Settings) -> tuple[str, ...]:
    """Return a warning for stages whose keep ratio was zero, and for those where it was one, for a whole epoch.

    A ratio of nearly 0 or 1 means scores so large that hardly a decision changes: their gradient has vanished.

    Args:
        kept: mean share of patches that each stage kept, of those in the image.
        ratios: the shares that they are to keep.
    """
    none = [stage for stage, share in enumerate(kept) if share <= COLLAPSED < ratios[stage]]
    every = [stage for stage, share in enumerate(kept) if share >= 1 - COLLAPSED > ratios[stage]]
    cure = f"a lower --lr (now {settings.peak_lr:g}) or a higher --ratio-weight (now {settings.ratio_weight:g})"
    found = []
    for stages, what in ((none, "no patch"), (every, "every patch")):
        if stages:
            which = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
            wanted = ", ".join(f"{ratios[stage]:.3g}" for stage in stages)
            found.append(f"{which} kept {what} in the whole epoch, {wanted} is wanted; start anew with {cure}")
    return tuple(found)
