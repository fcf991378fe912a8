"""One model run in several ways, side by side: the reference, our engine dense, our engine pruned."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from dvit_infer.checkpoint import Checkpoint, read_checkpoint
from dvit_infer.config import Config
from dvit_infer.devices import resolve_device, resolve_dtype
from dvit_infer.engine import Engine, Source
from dvit_infer.errors import InputError
from dvit_infer.families import build_reference, recognise
from dvit_infer.families.example import example_checkpoint
from dvit_infer.families.reading import Note
from dvit_infer.graph import build_graph
from dvit_infer.images import sample_images
from dvit_infer.parity import evaluate
from dvit_infer.timing import Row, Timing, interleave

WAYS = ("reference", "dense", "compile")  # what the engine can be compared with
USUAL = WAYS[:2]
DISTINCT_IMAGES = 64


@dataclass(frozen=True)
class _Way:
    """One way to run the model, with its config and what its weights take."""

    call: Callable[[torch.Tensor], torch.Tensor]
    config: Config
    gflops: float
    held_mib: Callable[[], float]  # between calls: weights, and buffers once it has run
    mode: str | None = None

    @property
    def dense(self) -> bool:
        return self.config.method == "none"


@dataclass(frozen=True)
class Outcome:
    """Rows of one batch size, and the engine's part of the speed-up that its multiply-adds allow (None: no pair)."""

    rows: list[Row]
    ceiling: float | None
    speedup_over_dense: float | None

    def __str__(self) -> str:
        if self.ceiling is None or self.speedup_over_dense is None:
            return ""
        share = self.speedup_over_dense / self.ceiling
        return (
            f"pruned over dense engine: {self.speedup_over_dense:.3f} x of the {self.ceiling:.3f} x that the "
            f"multiply-adds of the two graphs as run allow: {share:.1%} realised"
        )


class Comparison:
    """The ways to run one model, loaded once.

    Args:
        model: a saved file, a checkpoint or a state dict; None: DynamicViT-DeiT-S/0.7 with random weights.
        names: which of `WAYS` to run beside the engine; the first is the baseline of every speed-up. 'compile' is the
            reference under torch.compile, by mode max-autotune on CUDA and default on a CPU.
    """

    def __init__(
        self, model: Source | None, names: Sequence[str] = USUAL, device: str | None = None, dtype: str | None = None
    ) -> None:
        if unknown := [name for name in names if name not in WAYS]:
            raise InputError(f"compare: {unknown[0]!r} is not one of {', '.join(WAYS)}")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        checkpoint = read_checkpoint(example_checkpoint("dynamicvit-deit-s") if model is None else model)
        config, notes = recognise(checkpoint, None, {}, {})
        self.config, self._name = config, checkpoint.name
        dense_config, _ = recognise(checkpoint, None, {}, {"method": "none"})
        is_dense = config.method == "none"
        self._ways: dict[str, _Way] = {}
        if "reference" in names or "compile" in names:
            plain = build_reference(config, checkpoint)
            gflops = build_graph(plain, config).gflops
            plain = plain.to(self.device, self.dtype)
        if "reference" in names:
            self._ways["reference"] = _Way(
                lambda images: plain.evaluate(images).logits, config, gflops, lambda: _mib(plain.parameters())
            )
        if "compile" in names:
            mode = "max-autotune" if self.device.type == "cuda" else "default"
            compiled = torch.compile(plain, mode=mode, dynamic=False)
            self._ways["compile"] = _Way(compiled, config, gflops, lambda: _mib(plain.parameters()), mode)
        if "dense" in names or is_dense:
            self._ways["dense"] = self._engine(dense_config, checkpoint, notes)
        if not is_dense:
            self._ways["engine"] = self._engine(config, checkpoint, notes)
        self.baseline = next((name for name in names if name in self._ways), next(iter(self._ways)))
        needed = {way.dense: way.config for way in self._ways.values()}
        self._right = {dense: build_reference(c, checkpoint).to(self.device) for dense, c in needed.items()}
        weights = {key: value.numel() for key, value in checkpoint.state.items() if not _is_buffer(key)}
        self._params = {  # of what runs, by whether it is dense
            False: sum(weights.values()),
            True: sum(count for key, count in weights.items() if not key.startswith("score_predictor.")),
        }

    def _engine(self, config: Config, checkpoint: Checkpoint, notes: Sequence[Note]) -> _Way:
        engine = Engine(config, checkpoint, notes, self.device, self.dtype)
        weights = _mib(w for node in engine.graph.nodes for w in node.weights.values())
        return _Way(engine, config, engine.graph.gflops, lambda: weights + engine.runner.own_bytes / 2**20)

    def measure(self, batch: int, seconds: float, progress: Callable[[float], None] = lambda share: None) -> Outcome:
        """Time every way on the same pictures, interleaved.

        Raises:
            InputError: the batch does not fit in memory.
        """
        try:
            images = _images(batch, self.config.image_size)
            right = {dense: evaluate(model, images).logits for dense, model in self._right.items()}
            if not all(torch.isfinite(logits).all() for logits in right.values()):
                raise InputError(
                    f"{self._name}: the reference model itself gives NaN or Inf; its weights are too large"
                )
            images = images.to(self.device, self.dtype)
            with torch.no_grad():
                calls = {name: _bound(way.call, images) for name, way in self._ways.items()}
                if "compile" in calls:
                    _compiles(calls["compile"])
                timings = interleave(calls, self.device, seconds, progress)
                rows = [self._row(name, batch, timings, call().float(), right) for name, call in calls.items()]
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise
            raise InputError(f"batch: {batch} pictures do not fit in memory; a smaller batch would") from None
        if "dense" not in timings or "engine" not in timings:
            return Outcome(rows, None, None)
        ceiling = self._ways["dense"].gflops / self._ways["engine"].gflops
        return Outcome(rows, ceiling, timings["engine"].speedup_over(timings["dense"]))

    def _row(
        self, name: str, batch: int, timings: dict[str, Timing], logits: torch.Tensor, right: dict[bool, torch.Tensor]
    ) -> Row:
        way, timing = self._ways[name], timings[name]
        expected = right[way.dense]
        return Row(
            model=self.config.arch,
            keep_rate=1.0 if way.dense else way.config.keep_rate,
            how=name,
            mode=way.mode,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            batch=batch,
            **timing.rates(batch),
            gflops=way.gflops,
            params=self._params[way.dense],
            peak_mib=None if timing.peak_mib is None else timing.peak_mib + way.held_mib(),
            max_logit_error=(logits - expected).abs().max().item(),
            top1_agreement=(logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item(),
            baseline=self.baseline,
            speedup=timing.speedup_over(timings[self.baseline]),
        )


def _compiles(call: Callable[[], torch.Tensor]) -> None:
    """The first call, which compiles. Raises InputError where torch.compile cannot."""
    try:
        call()
    except Exception as error:  # of whatever kind its compilers raise
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"compare: torch.compile cannot run the reference here: {why[0]}") from None


def _mib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _is_buffer(key: str) -> bool:
    return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _bound(call: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: call(images)


def _images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Made-up pictures; beyond `DISTINCT_IMAGES` the same again with noise of their own."""
    distinct = sample_images(min(batch, DISTINCT_IMAGES), size, seed=2)
    if batch <= DISTINCT_IMAGES:
        return distinct
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    return distinct.repeat(-(-batch // DISTINCT_IMAGES), 1, 1, 1)[:batch] + 0.3 * noise
