"""Forwards of an engine under given choices, each compared with the reference model before it is timed."""

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import dvit_infer as dvit
from dvit_infer.backends.captured import CapturedRunner
from dvit_infer.backends.state import State
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.benchmark.timing import Timing
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.example import example_checkpoint, shapes_of
from dvit_infer.models.fill import fill
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.families import DEIT, LVVIT
from dvit_infer.ops.choices import Choices, using
from dvit_infer.parity.verification import MOST_RMS, RMS_FACTOR, evaluate

Call = Callable[[], object]
PATCH = 16  # pixels
SAME_RMS = 0.05  # rms error relative to the logits' rms, by the engine's own choice of tokens: near ties may differ
FLOAT32_RMS = 1e-4  # the same in float32, with the reference's kept sets given


@functools.cache
def checkpoint(arch: str, dry: bool) -> dict[str, Any]:
    """Return random weights for `arch`, or in a dry run for a tiny model of its family."""
    return _tiny_checkpoint(LVVIT.name if "lvvit" in arch else DEIT.name) if dry else example_checkpoint(arch)


def _tiny_checkpoint(family: str) -> dict[str, Any]:
    """Return a model with 64 channels, two blocks and four patches."""
    body = ViT(PATCH, 64, depth=2, num_heads=2, mlp_dim=128, eps=1e-6, stem_dim=16)
    shapes = shapes_of(family, body, size=2 * PATCH, num_classes=10, stages=1)
    state = {key: torch.from_numpy(fill(key, shape, 0)) for key, shape in shapes.items()}
    args = argparse.Namespace(base_rate=0.7, num_heads=2, **({"skip_lam": 2.0} if family == LVVIT.name else {}))
    return {"model": state, "args": args}


class Uncaptured:
    """A stand-in for a captured forward on a CPU, for the suite's dry run."""

    buffer_bytes = 0

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner

    def __call__(self, images: torch.Tensor, return_choices: bool) -> State:
        return self._runner.run(images)


def engine_under(choices: Choices, source: Mapping[str, Any], device: torch.device, **options: Any) -> dvit.Engine:
    """Return an engine that runs by these choices; on a CPU, which has none, PyTorch's with the same interface."""
    options = options if device.type != "cpu" else {"backend": "torch", **options}
    with chosen(choices):
        engine = dvit.convert(source, device=device, **options)
    if device.type == "cpu":
        runner = engine.runner
        engine.runner = CapturedRunner(runner, lambda batch, dtype: Uncaptured(runner))
    return engine


def chosen(choices: Choices) -> contextlib.AbstractContextManager[None]:
    """Apply these choices on a GPU inside the block. A dry run ignores them: they would select Triton's interpreter."""
    return using(choices) if torch.cuda.is_available() else contextlib.nullcontext()


def under(choices: Choices, call: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap a call in these choices: a captured forward keeps them, others read them at every call."""

    def run() -> Any:
        with chosen(choices):
            return call()

    return run


def programmatic(choices: Choices) -> contextlib.AbstractContextManager[None]:
    """Use programmatic launches inside the block if the choices ask for them and the GPU supports them."""
    if not (choices.programmatic and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)):
        return contextlib.nullcontext()
    from dvit_kernels.launch import programmatic_launches

    return programmatic_launches(True)


@dataclass(frozen=True)
class Expected:
    """The expected outputs for some images: the float32 reference's, and plain PyTorch's error in the dtype.

    Attributes:
        images: the engine's input.
        logits, kept: outputs of the reference.
        error, given_error: plain PyTorch's errors (`typical_error`), by its own choice of tokens and with `kept` given.
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
        """Describe how logits, by the engine's own choice and with `kept` given, disagree with this model, or None."""
        checks = [(logits, min(MOST_RMS, max(SAME_RMS, RMS_FACTOR * self.error)), "its own choice of tokens")]
        if given is not None:
            checks.append((given, max(FLOAT32_RMS, RMS_FACTOR * self.given_error), "the reference's kept sets"))
        for found, limit, by in checks:
            error = typical_error(found, self.logits)
            if not error <= limit:  # also catches NaN
                return f"rms error {error:.1e} of the logits' rms by {by}, at most {limit:.1e} is expected"
        return None


def typical_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median over images of the rms error, relative to the rms of the expected logits."""
    errors = (logits.float() - expected).square().mean(dim=1).sqrt()
    return (errors.median() / expected.square().mean().sqrt()).item()


@dataclass(frozen=True)
class Forward:
    """A model in one variant: the `runtime` and `variant` of its row, and its calls.

    Attributes:
        call: () -> logits, on the images of an `Expected`.
        given: the same with the reference's kept sets given; None: not supported.
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
        """Return another call of the same engine as a variant."""
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
        model = {"model": config.arch, "keep_rate": config.reduction.keep_rate}
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
    """Return the engine's forward under these choices on the expected images; dense if that is the runtime."""
    device, dtype = expected.logits.device, expected.images.dtype
    dense = {"method": "none"} if runtime == "dense" else {}
    engine = engine_under(choices, source, device, dtype=dtype, **dense)
    images, kept = expected.images, None if dense else expected.kept

    def given() -> torch.Tensor:  # never captured, so programmatic launches are asked for here
        with programmatic(choices):
            return engine(images, kept=kept)

    call = (lambda: engine(images)) if captured else (lambda: engine.runner.runner.run(images).x)
    return Forward(runtime, variant, choices, engine, under(choices, call), under(choices, given))


PLAIN = Choices()


def with_programmatic(choices: Choices) -> Choices:
    return replace(choices, programmatic=True)


def with_two_branches(choices: Choices) -> Choices:
    return replace(choices, two_branches_from=2)
