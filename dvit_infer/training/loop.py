"""The training loop: steps, epochs, averaged weights, and a file from which a run can resume at any time."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dvit_infer.errors import InputError
from dvit_infer.images.tensors import normalise
from dvit_infer.training import saving
from dvit_infer.training.augment import Augmentation
from dvit_infer.training.data import Batch, ImageFiles, Loading, batches, mixed, steps_an_epoch, targets
from dvit_infer.training.distributed import World
from dvit_infer.training.held_out import top1
from dvit_infer.training.losses import Losses, Objective, losses
from dvit_infer.training.reports import Epoch, NotFiniteError, Step, collapse_warnings
from dvit_infer.training.settings import Settings, make_optimizer
from dvit_infer.training.student import Pair, official_content, set_training


class Run:
    """A training run.

    Args:
        pair: student and teacher.
        out: the output path.
        held_out: images and classes for measuring top-1 after every epoch.
        world: the processes that train together, already connected.
    """

    def __init__(
        self,
        pair: Pair,
        image_files: ImageFiles,
        settings: Settings,
        *,
        out: Path,
        augmentation: Augmentation,
        device: torch.device,
        workers: int = 0,
        world: World | None = None,
        held_out: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.world = world or World()
        self.pair, self.image_files, self.settings, self.out = pair, image_files, settings, out
        self.augmentation, self.device, self.held_out, self.workers = augmentation, device, held_out, workers
        config = pair.config
        stages = len(config.reduction.stages)
        self.loading = Loading(
            settings.batch,
            settings.accumulate,
            settings.seed,
            workers,
            self.world.rank,
            self.world.size,
            settings.mixup,
            settings.cutmix,
            noise=(stages, config.num_patches),
        )
        self.steps = steps_an_epoch(image_files, self.loading)
        self.objective = Objective(
            tuple(config.reduction.keep_rate ** (stage + 1) for stage in range(stages)),
            settings.token_loss or (pair.student.token_loss if pair.distils_logits else "mse"),
            settings.per_image,
            ratio=settings.ratio_weight,
            logits=0.5 if pair.distils_logits else 0.0,
        )
        by = augmentation.torchvision and bool(settings.randaugment or settings.erase)
        self.identity = saving.identity(settings, pair.args, pair.origin, image_files.digest, by)
        self.student = pair.student.to(device)
        self.teacher = pair.teacher.to(device).requires_grad_(False)
        for model in (self.student, self.teacher):
            set_training(model)
        self.optimizer = make_optimizer(self.student, settings, pair.is_new)
        self.averaged = {k: v.clone() for k, v in self.student.state_dict().items()} if settings.ema else None
        self.epoch = self.step = 0  # the next epoch, and the next step within it
        self.has_saved = False  # whether the file was written by this run

    # -- the file ---------------------------------------------------------------------------------

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Return the weights that the file holds under `model`: the averaged ones, if present."""
        return self.student.state_dict() if self.averaged is None else self.averaged

    def save(self) -> None:
        """Write the file in the first process. If that fails, raise InputError in all; the old file remains."""
        failed: InputError | None = None
        if self.world.is_first:
            try:
                saving.write(self.out, self._content())
            except InputError as error:
                failed = error
        if self._any(failed is not None):
            raise failed or InputError(f"out: {self.out}: the first process cannot write it")
        self.has_saved = True

    def _content(self) -> dict[str, object]:
        args = dict(self.pair.args)
        if self.epoch < self.settings.epochs:
            state = {
                "identity": self.identity,
                "epoch": self.epoch,
                "step": self.step,
                "student": None if self.averaged is None else self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            return official_content(self.weights(), args, self.epoch) | {saving.KEY: state}
        args["dvit_infer"] = {**args["dvit_infer"], "run": self.identity}
        return official_content(self.weights(), args, self.epoch)

    # -- the loop ---------------------------------------------------------------------------------

    def go(
        self,
        on_step: Callable[[Step], None],
        on_epoch: Callable[[Epoch], None],
        on_counted: Callable[[int, int], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Train to the end, writing the file after every epoch. Return False, with the file written, if stopped.

        Args:
            on_counted: called with the number of held-out images done, and their total.

        Raises:
            NotFiniteError: The loss or its gradient is NaN or infinite; the last file remains.
            InputError: The file cannot be written, or no image can be read.
        """
        frozen: bool | None = None
        model: nn.Module = self.student
        while self.epoch < self.settings.epochs:
            if frozen != (now := self.epoch < self.settings.freeze_epochs):
                frozen, model = now, self._wrapped(frozen=now)
            if not self._epoch(model, on_step, on_epoch, on_counted, stop):
                return False
        return True

    def _wrapped(self, frozen: bool) -> nn.Module:
        """Return the student wrapped for all processes; called again when the set of trained parameters changes."""
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(self.pair.is_new(name) or not frozen)
            parameter.grad = None
        if self.world.size == 1:
            return self.student
        return DistributedDataParallel(self.student)

    def _epoch(
        self,
        model: nn.Module,
        on_step: Callable[[Step], None],
        on_epoch: Callable[[Epoch], None],
        on_counted: Callable[[int, int], None],
        stop: Callable[[], bool],
    ) -> bool:
        start, first = time.perf_counter(), self.step
        sums, count = torch.zeros(0), 0
        unreadable: list[tuple[str, str]] = []
        for parts in _steps(
            batches(self.image_files, self.augmentation, self.loading, self.epoch, first), self.loading
        ):
            found = self._step(model, parts)
            sums = found if not len(sums) else sums + found
            mine = [one for part in parts for one in part.unreadable]
            unreadable += mine[: 10 - len(unreadable)]
            count += len(mine)
            self.step += 1
            last = self._known(found, start, first)
            on_step(last)
            if self._any(stop()) and self.step < self.steps:
                self.save()
                return False
        means = (sums / (self.steps - first)).tolist()
        count = int(self.world.all_reduce(torch.tensor(float(count), device=self.device)))
        if count == (self.steps - first) * self.settings.batch:
            raise InputError(f"{unreadable[0][0] if unreadable else 'image_files'}: like all others, cannot be read")
        self.epoch, self.step = self.epoch + 1, 0
        self.save()
        accuracy = self._top1(on_counted, stop) if self.held_out else None
        warnings = collapse_warnings(means[5:], self.objective.ratios, self.settings)
        on_epoch(Epoch(last, tuple(means[:5]), tuple(means[5:]), tuple(unreadable), count, accuracy, warnings))
        return self.epoch == self.settings.epochs or not self._any(stop())

    def _top1(self, on_counted: Callable[[int, int], None], stop: Callable[[], bool]) -> float | None:
        return top1(
            self.student,
            self.weights(),
            self.pair.config,
            self.held_out,
            workers=self.workers,
            world=self.world,
            device=self.device,
            on_counted=on_counted,
            stop=stop,
        )

    def _any(self, here: bool) -> bool:
        """Return whether `here` is True in any process."""
        if self.world.size == 1:
            return here
        return bool(self.world.all_reduce(torch.tensor(float(here), device=self.device)))

    def _known(self, found: torch.Tensor, start: float, first: int) -> Step:
        done, seconds = self.step - first, time.perf_counter() - start
        left = (self.settings.epochs - self.epoch) * self.steps - self.step
        values = tuple(found.tolist())
        return Step(
            self.epoch,
            self.step - 1,
            self.steps,
            values[:5],
            values[5:],
            max(group["lr"] for group in self.optimizer.param_groups),
            done * self.settings.batch / seconds,
            left * seconds / done,
        )

    def _step(self, model: nn.Module, parts: Sequence[Batch]) -> torch.Tensor:
        """Run one optimiser step; return the mean of `Losses.parts` over its accumulation."""
        self._set_rates()
        found = []
        for i, part in enumerate(parts):
            is_last = i + 1 == len(parts)
            # Gradients are exchanged once per step, with the last part.
            apart: AbstractContextManager[None] = nullcontext()
            if isinstance(model, DistributedDataParallel) and not is_last:
                apart = model.no_sync()
            with apart:
                out = self._losses(model, part)
                # DistributedDataParallel averages over processes, but the sum of their parts is needed.
                torch.autograd.backward(out.total * (self.world.size / len(parts)))
            found.append(out.parts())
        values = torch.stack(found).mean(dim=0).cpu()
        learning = [p for p in self.student.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(learning, self.settings.clip)
        if not (torch.isfinite(values).all() and torch.isfinite(norm)):
            what = "the loss" if not torch.isfinite(values).all() else "the gradient"
            raise NotFiniteError(f"{what} is not finite at step {self.step + 1} of epoch {self.epoch + 1}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        return values

    def _losses(self, model: nn.Module, part: Batch) -> Losses:
        config = self.pair.config
        images = mixed(normalise(part.images.to(self.device), config.mean, config.std), part)
        wanted = targets(part, config.num_classes, self.settings.smoothing).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            with torch.no_grad():
                teacher_out = self.teacher(images)
            out = model(images, noise=part.noise.to(self.device))
        return losses(self.objective, out, teacher_out, wanted, part.weights.to(self.device), self.world.all_reduce)

    def _set_rates(self) -> None:
        rate = self.settings.peak_lr * self.settings.lr_factor(self.epoch * self.steps + self.step, self.steps)
        for group in self.optimizer.param_groups:  # the optimiser skips frozen parameters, which have no gradient
            group["lr"] = rate * group["scale"]

    @torch.no_grad()
    def _average(self) -> None:
        """Update the averaged weights; with a lower decay in the beginning, when there is little to average."""
        if self.averaged is None:
            return
        done = self.epoch * self.steps + self.step
        decay = min(self.settings.ema, (1 + done) / (10 + done))
        for name, value in self.student.state_dict().items():
            if value.is_floating_point():
                self.averaged[name].lerp_(value, 1 - decay)


def _steps(parts: Iterator[Batch], loading: Loading) -> Iterator[list[Batch]]:
    """Group the parts of a process's share by step."""
    group = []
    for part in parts:
        group.append(part)
        if len(group) == loading.accumulate:
            yield group
            group = []
