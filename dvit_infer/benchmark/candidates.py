"""Candidates that need only this project and PyTorch; `peers.py` has those of other projects."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dvit_infer.backends.openvino import OpenVinoRunner
from dvit_infer.config import Config
from dvit_infer.engine import Engine, calibrated, placed
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.models.checkpoint import Checkpoint, Source, read_checkpoint
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.reading import Note
from dvit_infer.models.reference import Reference
from dvit_infer.models.registry import build_graph, build_reference, recognise, unused_keys
from dvit_infer.models.source import WeightSource
from dvit_infer.reduction import METHODS
from dvit_infer.utils.memory import is_allocation_failure

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        runtime, variant: its names in result files.
        config: the config of the model it runs; without stages for the dense counterpart.
        call: takes images (B, 3, H, W) on the device, in the dtype; returns logits (B, K).
        gmacs: GMACs of the graph it runs.
        held_mib: returns the size of weights and buffers held between calls, or None if the runtime does not report it.
        given: like call, with the kept set of each stage given; None: kept sets cannot be given.
        prepare: converts the images once to the form that call takes.
        engine: the engine, if this candidate is one.
        approximate: its outputs match the reference only approximately (int8).
        dtype: the name of its dtype; None: that of all candidates.
    """

    runtime: str
    variant: str | None
    config: Config
    call: Call
    gmacs: float
    held_mib: Callable[[], float | None]
    given: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] | None = None
    prepare: Call = lambda images: images
    engine: Engine | None = None
    approximate: bool = False
    dtype: str | None = None

    @property
    def is_dense(self) -> bool:
        return not self.config.reduction.stages

    @property
    def keep_rate(self) -> float:
        return self.config.reduction.keep_rate

    @property
    def function(self) -> str:
        """A key that is equal for candidates that compute the same function."""
        return str(self.config.reduction)


class Subject:
    """A model that several candidates run, read once.

    Args:
        model: a saved file, a checkpoint or a state dict; None: DynamicViT-DeiT-S/0.7 with random weights.
        dtype: of all candidates; int8 is only our engine's, beside the others in float32.
        calibrate, backend: for our engine, as for `convert`.
        facts: keywords of `convert` that say what the model is, such as method, keep_rate and assume.

    Raises:
        InputError: The model cannot be read, a fact is impossible, or the device or dtype does not exist.
    """

    def __init__(
        self,
        model: Source | None,
        device: str | None,
        dtype: str | None,
        calibrate: str | None = None,
        backend: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.device, self.dtype, self.int8 = placed(device, dtype)
        self.backend, self._calibrate = backend, calibrate
        if calibrate is not None and not self.int8:
            raise InputError("calibrate: is for dtype int8")
        source = example_checkpoint("dynamicvit-deit-s") if model is None else model
        stated = {name: fact for name, fact in (facts or {}).items() if fact is not None}
        self._arch = stated.pop("arch", None)
        self._options = {name: stated.pop(name, None) for name in ("method", "image_size")}
        self._given = {**stated.pop("assume", {}), **stated}
        self.checkpoint: Checkpoint = read_checkpoint(source, self._given.get("weights"))
        self.source = WeightSource(source, self.checkpoint)
        self.compiled_for = 0  # the batch size for which torch.compile's candidates are compiled
        self.exports: dict[torch.dtype, bytes] = {}  # by torch.onnx, while the candidates that run them are made
        self.config, self.notes = recognise(self.checkpoint, self._arch, self._given, self._options)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @functools.cached_property
    def dense_config(self) -> Config:
        reducing = {"prune_at", *(name for method in METHODS.values() for name in method.SETTINGS)}
        given = {name: fact for name, fact in self._given.items() if name not in reducing}
        return recognise(self.checkpoint, self._arch, given, {**self._options, "method": "none"})[0]

    def config_at(self, keep_rate: float) -> Config:
        """Return the config at a keep rate of a sweep.

        Raises:
            InputError: The model's method has no keep rate, or the rate leaves no token.
        """
        given = {**self._given, "keep_rate": keep_rate}
        try:
            return recognise(self.checkpoint, self._arch, given, self._options)[0]
        except InputError as error:
            raise InputError(re.sub("^keep_rate:", "sweep:", str(error))) from None

    @functools.cached_property
    def plain(self) -> Reference:
        """The reference model, on the device and in the dtype."""
        return build_reference(self.config, self.checkpoint).to(self.device, self.dtype)

    @functools.cached_property
    def plain_graph(self) -> Graph:
        return build_graph(self.plain, self.config)

    @property
    def plain_gmacs(self) -> float:
        return self.plain_graph.gmacs

    def with_ranges(self, config: Config) -> Config:
        """Return the config with ranges of the linears' inputs, if calibration images were given."""
        return config if self._calibrate is None else calibrated(config, self.checkpoint, self._calibrate)

    def params(self, config: Config) -> int:
        return self.checkpoint.params(unused_keys(config))


def engine_candidate(subject: Subject, config: Config, runtime: str = "engine") -> Candidate:
    """The engine, converted by the given config."""
    notes: Sequence[Note] = subject.notes
    config = subject.with_ranges(config)
    placed_in = subject.device, subject.dtype, subject.source, subject.backend, subject.int8
    engine = Engine(config, subject.checkpoint.shared(), notes, *placed_in)
    held = lambda: (engine.weight_bytes + engine.runner.buffer_bytes) / 2**20  # noqa: E731
    given = lambda images, kept: engine(images, kept=kept)  # noqa: E731
    # Nothing else in a row records the backend, or whether the native library pruned (DVIT_PRUNE).
    variant = "native" if "by native" in engine.runner.runtime else None
    variant = "openvino" if isinstance(engine.runner, OpenVinoRunner) else variant
    return Candidate(
        runtime,
        variant,
        config,
        engine,
        engine.outline.gmacs,
        held,
        given,
        engine=engine,
        approximate=subject.int8,
        dtype=engine.precision,
    )


def dense_candidate(subject: Subject) -> Candidate:
    return engine_candidate(subject, subject.dense_config, "dense")


def reference_candidate(subject: Subject) -> Candidate:
    return _of_plain(subject, "reference", subject.plain)


def sdpa_candidate(subject: Subject) -> Candidate:
    fused = build_reference(subject.config, subject.checkpoint).to(subject.device, subject.dtype)
    fused.fuse_attention()
    return _of_plain(subject, "sdpa", fused)


def _of_plain(subject: Subject, runtime: str, model: Reference) -> Candidate:
    weights = mib(model.parameters())

    def given(images: torch.Tensor, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return model.evaluate(images, kept).logits

    call = lambda images: model.evaluate(images).logits  # noqa: E731
    return Candidate(runtime, None, subject.config, call, subject.plain_gmacs, lambda: weights, given)


def compiled_candidate(subject: Subject) -> Candidate:
    weights = mib(subject.plain.parameters())
    call = compiled(subject, subject.plain)
    return Candidate("compile", compile_mode(subject), subject.config, call, subject.plain_gmacs, lambda: weights)


def compile_mode(subject: Subject) -> str:
    return "max-autotune" if subject.device.type == "cuda" else "default"


def compiled(subject: Subject, model: nn.Module) -> Call:
    """Return a model under torch.compile, which is compiled for every batch size anew."""
    run = torch.compile(model, mode=compile_mode(subject), dynamic=False)

    def call(images: torch.Tensor) -> torch.Tensor:
        if len(images) != subject.compiled_for:
            torch.compiler.reset()  # after eight sizes it would silently run eagerly
            subject.compiled_for = len(images)
        out: torch.Tensor = run(images)
        return out

    return call


@contextlib.contextmanager
def blaming(name: str) -> Iterator[None]:
    """Turn any error that a compiler or another project raises in the block into one line that names the candidate.

    Raises:
        InputError: The block failed. Out-of-memory errors pass unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_allocation_failure(error):
            raise
        raise InputError(f"compare: {name} cannot run the reference here: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def mib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20
