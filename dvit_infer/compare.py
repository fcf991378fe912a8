"""One model run in several ways, side by side: the reference, our engine dense, our engine pruned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dvit_infer.checkpoint import read_checkpoint
from dvit_infer.engine import Engine, resolve_device, resolve_dtype
from dvit_infer.errors import InputError
from dvit_infer.families import recognise
from dvit_infer.families.example import example_checkpoint
from dvit_infer.graph import build_graph
from dvit_infer.images import sample_images
from dvit_infer.parity import evaluate, reference_for
from dvit_infer.timing import Row, Timing, interleave

WAYS = ("reference", "dense")  # what the engine can be compared with
DISTINCT_IMAGES = 64


@dataclass(frozen=True)
class _Way:
    """One way to run the model. `dense` says which reference it has to agree with."""

    call: Callable[[torch.Tensor], torch.Tensor]
    gflops: float
    params: int
    keep_rate: float
    dense: bool


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
        model: a saved file or a checkpoint; None: DynamicViT-DeiT-S/0.7 with random weights.
        names: which of `WAYS` to run beside the engine; the first is the baseline of every speed-up.
    """

    def __init__(
        self, model: str | None, names: Sequence[str] = WAYS, device: str | None = None, dtype: str | None = None
    ) -> None:
        if unknown := [name for name in names if name not in WAYS]:
            raise InputError(f"compare: {unknown[0]!r} is not one of {', '.join(WAYS)}")
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        checkpoint = read_checkpoint(example_checkpoint("dynamicvit-deit-s") if model is None else model)
        config, notes = recognise(checkpoint, None, {}, {})
        engine = Engine(config, checkpoint, notes, self.device, self.dtype)
        self.config = config
        weights = {key: value.numel() for key, value in checkpoint.state.items() if not _is_buffer(key)}
        params = sum(weights.values())
        trunk = sum(count for key, count in weights.items() if not key.startswith("score_predictor."))
        self._right = reference_for(engine, checkpoint, torch.float32)
        plain = self._right if self.dtype == torch.float32 else reference_for(engine, checkpoint, self.dtype)
        is_dense = config.method == "none"
        self._ways: dict[str, _Way] = {}
        if "reference" in names:
            gflops = build_graph(plain, config).gflops
            self._ways["reference"] = _Way(
                lambda images: plain.evaluate(images).logits, gflops, params, config.keep_rate, is_dense
            )
        if is_dense:
            self._ways["dense"] = _Way(engine, engine.graph.gflops, trunk, 1.0, True)
            self._dense_right = self._right
        else:
            twin_config, _ = recognise(checkpoint, None, {}, {"method": "none"})
            twin = Engine(twin_config, checkpoint, notes, self.device, self.dtype)
            if "dense" in names:
                self._ways["dense"] = _Way(twin, twin.graph.gflops, trunk, 1.0, True)
            self._dense_right = reference_for(twin, checkpoint, torch.float32)
            self._ways["engine"] = _Way(engine, engine.graph.gflops, params, config.keep_rate, False)
        self.baseline = next(iter(self._ways))

    def measure(self, batch: int, seconds: float, progress: Callable[[float], None] = lambda share: None) -> Outcome:
        """Time every way on the same pictures, interleaved.

        Raises:
            InputError: the batch does not fit in memory.
        """
        try:
            images = _images(batch, self.config.image_size)
            right = {False: evaluate(self._right, images).logits, True: evaluate(self._dense_right, images).logits}
            images = images.to(self.device, self.dtype)
            with torch.no_grad():
                calls = {name: _bound(way.call, images) for name, way in self._ways.items()}
                timings = interleave(calls, self.device, seconds, progress)
                rows = [self._row(name, batch, timings, call().float(), right) for name, call in calls.items()]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
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
            keep_rate=way.keep_rate,
            how=name,
            mode=None,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            batch=batch,
            **timing.rates(batch),
            gflops=way.gflops,
            params=way.params,
            peak_mib=timing.peak_mib,
            max_logit_error=(logits - expected).abs().max().item(),
            top1_agreement=(logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item(),
            baseline=self.baseline,
            speedup=timing.speedup_over(timings[self.baseline]),
        )


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
