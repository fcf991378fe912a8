"""Training settings, the optimiser, and the learning rate schedule."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.training.losses import TokenLoss
from dvit_infer.utils.bounds import check_bound

MOST_EPOCHS = 1_000_000
BOUND = 1e6  # of rates, norms and decays: beyond, no training makes sense, and products may overflow


@dataclass(frozen=True)
class Settings:
    """The settings that determine a run's outcome, beside model and images. Defaults: Rao et al. 2021, section 4.1.

    Attributes:
        keep_rate: share of the patches that the first stage keeps; None: the model's own.
        batch: images per optimiser step, over all processes and accumulation steps.
        accumulate: parts into which a process splits its share of a step, to save memory. Losses are averaged over the
            parts, so a mean over the batch (ratio loss without `per_image`, token loss) becomes one over a part.
        lr: learning rate of the predictors and of a new head; None: 0.001 for a batch of 1024, scaled linearly for
            others.
        backbone_lr_scale: learning rate of all other weights, relative to `lr`.
        freeze_epochs: epochs in which only the predictors and a new head are trained.
        clip: gradient norm at which gradients are clipped.
        ema: decay of the averaged weights, which are then written to the file; 0: none.
        per_image, token_loss: `Objective`; `ratio_weight` is its `ratio`.
        mixup, cutmix: parameters of their beta distributions; 0: off.
        scale, flip, randaugment, erase: `Augmentation`.
        dtype: 'float32', or 'bfloat16' by autocast.

    Raises:
        InputError: A number is out of range.
    """

    keep_rate: float | None = None
    epochs: int = 30
    batch: int = 128
    accumulate: int = 1
    lr: float | None = None
    min_lr: float = 1e-6
    backbone_lr_scale: float = 0.01
    freeze_epochs: int = 5
    warmup_epochs: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.0
    per_image: bool = True
    token_loss: TokenLoss | None = None
    ratio_weight: float = 2.0
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    scale: float = 0.08
    flip: float = 0.5
    randaugment: int = 9
    erase: float = 0.25
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"epochs": 1, "freeze_epochs": 0}
        for name, least in whole.items():
            check_bound(name, getattr(self, name), MOST_EPOCHS)
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)} is not a number of epochs from {least} on")
        above = {"lr": self.lr, "clip": self.clip}
        for name, value in above.items():
            if value is not None and not value > 0:
                raise InputError(f"{name}: {value:g} is not a positive number")
            if value is not None:
                check_bound(name, value, BOUND, excluded=True)
        shares = ("backbone_lr_scale", "smoothing")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name):g} is not between 0 and 1")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema: {self.ema:g} is not from 0 to below 1")
        for name in ("weight_decay", "warmup_epochs", "min_lr", "ratio_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}: {getattr(self, name):g} is negative or not a number")
            check_bound(name, getattr(self, name), BOUND, excluded=True)
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype: {self.dtype} is not one of float32, bfloat16")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed: {self.seed} is not from 0 to 2**63 - 1")
        if self.optimizer != "adamw":
            raise InputError(f"optimizer: {self.optimizer} is not adamw")

    @property
    def peak_lr(self) -> float:
        """The predictors' highest learning rate."""
        return 1e-3 * self.batch / 1024 if self.lr is None else self.lr

    def lr_factor(self, step: int, steps_an_epoch: int) -> float:
        """Return a step's share of the peak learning rate: linear warm-up, cosine (Loshchilov & Hutter 2017)."""
        total, warm_up = self.epochs * steps_an_epoch, self.warmup_epochs * steps_an_epoch
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        least = min(1.0, self.min_lr / self.peak_lr)
        done = (step - warm_up) / max(1.0, total - warm_up)
        return least + (1 - least) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: Settings, is_new: Callable[[str], bool]
) -> list[dict[str, object]]:
    """Group parameters by new or old, and by matrix (with weight decay) or other (without).

    Every group has a `scale`, its share of the learning rate.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        decays = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token", "dist_token"))
        groups.setdefault((is_new(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "scale": 1.0 if new else settings.backbone_lr_scale,
        }
        for (new, decays), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, settings: Settings, is_new: Callable[[str], bool]) -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), settings, is_new)
    return torch.optim.AdamW(groups, lr=settings.peak_lr, fused=True)
