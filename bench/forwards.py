"""Forwards of an engine under given choices, each held against the reference model before its time counts."""

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import dvit_infer as dvit
from dvit_infer.backends.captured import Answers, CapturedRunner
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.benchmark.timing import Timing
from dvit_infer.config import Config
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.fill import fill
from dvit_infer.models.vit.read import DEIT, LVVIT
from dvit_infer.ops.choices import Choices, using
from dvit_infer.parity.verification import MOST_RMS, RMS_FACTOR, evaluate

Call = Callable[[], object]
PATCH = 16  # pixels
SAME_RMS = 0.05  # of the logits' rms, by the engine's own choice of tokens: near ties may fall otherwise
FLOAT32_RMS = 1e-4  # the same with the reference's kept sets, in float32


@functools.cache
def checkpoint(arch: str, dry: bool) -> dict[str, Any]:
    """Random weights for `arch`, or of a tiny model of its family."""
    return _tiny_checkpoint(LVVIT.name if "lvvit" in arch else DEIT.name) if dry else example_checkpoint(arch)


def _tiny_checkpoint(family: str) -> dict[str, Any]:
    """64 channels, two blocks, four patches."""
    size = (2 * PATCH, 2 * PATCH)
    config = Config(
        **{"arch": "tiny", "family": family, "image_size": size, "trained_size": size, "patch_size": PATCH},
        **{"num_classes": 10, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_dim": 128, "eps": 1e-6},
        **{"num_prefix": 1, "method": "none", "prune_at": (1,), "keep_rate": 1.0, "stem_dim": 16},
    )
    with torch.device("meta"):
        model = (LVVIT if family == LVVIT.name else DEIT).reference(config)
    state = {k: torch.from_numpy(fill(k, tuple(v.shape), 0)) for k, v in model.state_dict().items()}
    args = argparse.Namespace(base_rate=0.7, num_heads=2, **({"skip_lam": 2.0} if family == LVVIT.name else {}))
    return {"model": state, "args": args}


class Uncaptured:
    """Stands for a captured forward on a CPU, in the suite's dry run."""

    buffer_bytes = 0

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner

    def __call__(self, images: torch.Tensor, return_kept: bool) -> Answers:
        return self._runner(images)


def engine_under(choices: Choices, source: Mapping[str, Any], device: torch.device, **options: Any) -> dvit.Engine:
    """An engine that runs by these choices; on a CPU, for which there are none, behind the same interface."""
    with chosen(choices):
        engine = dvit.convert(source, device=device, **options)
    if device.type == "cpu":
        runner = engine.runner
        engine.runner = CapturedRunner(runner, lambda batch, dtype: Uncaptured(runner))
    return engine


def chosen(choices: Choices) -> contextlib.AbstractContextManager[None]:
    """Inside, a GPU goes by these choices. A dry run does not: they would take it to Triton's interpreter."""
    return using(choices) if torch.cuda.is_available() else contextlib.nullcontext()


def under(choices: Choices, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with these choices: what is captured keeps them, what is not reads them every time."""

    def run() -> Any:
        with chosen(choices):
            return call()

    return run


def programmatic(choices: Choices) -> contextlib.AbstractContextManager[None]:
    """Inside, launches are programmatic ones if the choices say so and the GPU has them."""
    if not (choices.programmatic and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)):
        return contextlib.nullcontext()
    from dvit_kernels.launch import programmatic_launches

    return programmatic_launches(True)


@dataclass(frozen=True)
class Expected:
    """What a model should answer for some images: the reference's in float32, and plain PyTorch's error in the dtype.

    Attributes:
        images: as the engine takes them.
        logits, kept: the reference's.
        error, given_error: plain PyTorch's (`typical_error`), by its own choice of tokens and with `kept` given.
    """

    images: torch.Tensor
    logits: torch.Tensor
    kept: list[torch.Tensor]
    error: float
    given_error: float

    @classmethod
    def of(cls, source: Mapping[str, Any], batch: int, device: torch.device, dtype: torch.dtype) -> "Expected":
        reference = dvit.load_reference(source).to(device)
        size = PATCH * math.isqrt(reference.pos_embed.shape[1] - reference.num_prefix)
        images = sample_images(batch, (size, size), seed=2).to(device)
        expected = evaluate(reference, images)
        plain = reference.to(dtype)
        own, given = (evaluate(plain, images, kept).logits for kept in ((), expected.kept))
        errors = (typical_error(logits, expected.logits) for logits in (own, given))
        return cls(images.to(dtype), expected.logits, expected.kept, *errors)

    def disagreement(self, logits: torch.Tensor, given: torch.Tensor | None = None) -> str | None:
        """Say how an engine's logits are not those of this model, by its own choice or with `kept` given; or None."""
        checks = [(logits, min(MOST_RMS, max(SAME_RMS, RMS_FACTOR * self.error)), "its own choice of tokens")]
        if given is not None:
            checks.append((given, max(FLOAT32_RMS, RMS_FACTOR * self.given_error), "the reference's kept sets"))
        for found, limit, by in checks:
            error = typical_error(found, self.logits)
            if not error <= limit:  # NaN is none either
                return f"rms error {error:.1e} of the logits' rms by {by}, at most {limit:.1e} is expected"
        return None


def typical_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over images of the rms error, over the rms of the expected logits."""
    errors = (logits.float() - expected).square().mean(dim=1).sqrt()
    return (errors.median() / expected.square().mean().sqrt()).item()


@dataclass(frozen=True)
class Forward:
    """A model as it is run: its row's `runtime` and `variant`, and the calls.

    Attributes:
        call: () -> logits, on the images of an `Expected`.
        given: the same with the reference's kept sets; None: it cannot be given any.
    """

    runtime: str
    variant: str | None
    choices: Choices
    engine: dvit.Engine
    call: Callable[[], torch.Tensor]
    given: Callable[[], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        return f"{self.runtime}, {self.variant or 'defaults'}"

    def beside(self, variant: str, call: Callable[[], torch.Tensor]) -> "Forward":
        """Another call of the same engine."""
        return replace(self, variant=variant, call=under(self.choices, call))

    def row(self, batch: int, timing: Timing, logits: torch.Tensor, expected: Expected) -> dict[str, Any]:
        return {
            **self.identity(batch),
            **timing.rates(batch),
            "gmacs": self.engine.graph.gmacs,
            "peak_mib": timing.peak_mib,
            "max_logit_error": (logits - expected.logits).abs().max().item(),
            "top1_agreement": (logits.argmax(dim=1) == expected.logits.argmax(dim=1)).float().mean().item(),
        }

    def identity(self, batch: int) -> dict[str, Any]:
        config, dtype = self.engine.config, str(self.engine.dtype).removeprefix("torch.")
        model = {"model": config.arch, "keep_rate": 1.0 if config.method == "none" else config.keep_rate}
        where = {"device": self.engine.device.type, "dtype": dtype, "batch": batch}
        return {"op": "forward", **model, "runtime": self.runtime, "variant": self.variant, **where}


def forward_of(
    source: Mapping[str, Any],
    choices: Choices,
    expected: Expected,
    runtime: str = "engine",
    variant: str | None = None,
    captured: bool = True,
) -> Forward:
    """The engine under these choices on the expected images, dense if that is the runtime."""
    device, dtype = expected.logits.device, expected.images.dtype
    dense = {"method": "none"} if runtime == "dense" else {}
    engine = engine_under(choices, source, device, dtype=dtype, **dense)
    images, kept = expected.images, None if dense else expected.kept

    def given() -> torch.Tensor:  # never captured, so programmatic launches are asked for here
        with programmatic(choices):
            return engine(images, kept=kept)

    call = (lambda: engine(images)) if captured else (lambda: engine.runner.runner(images)[0])
    return Forward(runtime, variant, choices, engine, under(choices, call), under(choices, given))


PLAIN = Choices()


def with_programmatic(choices: Choices) -> Choices:
    return replace(choices, programmatic=True)


def with_two_branches(choices: Choices) -> Choices:
    return replace(choices, two_branches_from=2)
