"""One model run in several ways, side by side, on the same pictures; that all compute the same function is checked."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dvit_infer import peers, ways
from dvit_infer.agreement import Expected, stray, unchecked, unlike
from dvit_infer.classifier import Source
from dvit_infer.config import Config
from dvit_infer.devices import free_memory
from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.families import build_reference
from dvit_infer.images import sample_images
from dvit_infer.node_times import Limits, NodeTime, time_nodes
from dvit_infer.parity import evaluate
from dvit_infer.reference.vit import VisionTransformer
from dvit_infer.timing import Row, Timing, interleave, noise
from dvit_infer.ways import Call, Subject, Way

WAYS: dict[str, Callable[[Subject], Way]] = {  # what the engine can be compared with
    "reference": ways.reference_way,
    "dense": ways.dense_way,
    "compile": ways.compiled_way,
    "sdpa": ways.sdpa_way,
    "onnxruntime": peers.onnxruntime_way,
    "onnx": peers.onnx_way,
    "onnx-int8": peers.onnx_int8_way,
    "openvino": peers.openvino_way,
    "timm": peers.timm_way,
}
USUAL = ("reference", "dense")
DISTINCT_IMAGES = 64
OURS = ("reference", "dense", "sdpa")  # ways that nothing but this project can make fail


@dataclass(frozen=True)
class Gain:
    """What pruning made of what it could: at one keep rate, over the dense engine in the same run."""

    keep_rate: float
    num_keep: tuple[int, ...]
    gmacs: float
    images_per_s: float
    speedup: float
    ceiling: float  # the ratio of the MACs of the two graphs as run

    def __str__(self) -> str:
        return (
            f"pruned over dense engine: {self.speedup:.3f} x of the {self.ceiling:.3f} x that the MACs of the two "
            f"graphs as run allow: {self.speedup / self.ceiling:.1%} realised"
        )


@dataclass(frozen=True)
class Outcome:
    """What was measured at one batch size.

    Attributes:
        rows: one a way.
        gains: one for every keep rate of the engine, if the dense engine ran too.
        strays: the ways that compute another function, each with its error; a check that failed.
        unchecked: ways of which these pictures do not say whether they compute the same one.
        noise: a line that says so if the machine was noisy.
    """

    rows: list[Row]
    gains: list[Gain]
    strays: list[str]
    unchecked: list[str]
    noise: str | None

    @property
    def verdict(self) -> str:
        if self.strays:
            return f"NOT the same function as the reference: {'; '.join(self.strays)}"
        if self.unchecked:
            names = ", ".join(self.unchecked)
            return (
                f"not checked whether {names} computes the same function: in no picture is the choice of tokens clear"
            )
        exact = [row for row in self.rows if row.variant != "int8"]
        largest = max(row.max_logit_error for row in exact if row.max_logit_error is not None)
        reduced = "" if self.rows[0].dtype == "float32" else f", near ties in {self.rows[0].dtype} included"
        but = "" if len(exact) == len(self.rows) else " but int8, which only comes near it,"
        return f"all ways{but} compute the same function: largest error of a logit {largest:.1e}{reduced}"


class Comparison:
    """The ways to run one model, loaded once.

    Args:
        model: a saved file, a checkpoint or a state dict; None: DynamicViT-DeiT-S/0.7 with random weights.
        names: which of `WAYS` to run beside the engine; the first is the baseline of every speed-up. 'compile' is the
            reference under torch.compile, by mode max-autotune on CUDA and default on a CPU.
        keep_rates: run the engine at each of these, and dense; empty: at the model's own.

    Raises:
        InputError: the model, a name, a rate, or a package that is not installed.
    """

    def __init__(
        self,
        model: Source | None,
        names: Sequence[str] = USUAL,
        device: str | None = None,
        dtype: str | None = None,
        keep_rates: Sequence[float] = (),
    ) -> None:
        if unknown := [name for name in names if name not in WAYS]:
            raise InputError(f"compare: {unknown[0]!r} is not one of {', '.join(WAYS)}")
        self.subject = subject = Subject(model, device, dtype)
        self.config, self.device = subject.config, subject.device
        is_dense = self.config.method == "none"
        wanted = dict.fromkeys([*names, *(["dense"] if is_dense or keep_rates else [])])
        self._ways: dict[str, Way] = {}
        for name in WAYS:
            if name in wanted:
                with _blaming(name):
                    self._ways[name] = WAYS[name](subject)
        configs = [subject.config_at(rate) for rate in keep_rates] or ([] if is_dense else [self.config])
        for config in configs:
            name = f"engine at {config.keep_rate}" if keep_rates else "engine"
            self._ways[name] = ways.engine_way(subject, config)
        self.baseline = next(iter(names), next(iter(self._ways)))
        # One model for every function, told apart by the tokens it keeps.
        functions = {way.config.num_keep: way.config for way in self._ways.values()}
        self._right = {key: build_reference(c, subject.checkpoint).to(self.device) for key, c in functions.items()}
        self._plain = self._right
        if subject.dtype != torch.float32:
            self._plain = {
                key: build_reference(config, subject.checkpoint).to(self.device, subject.dtype)
                for key, config in functions.items()
            }

    @property
    def title(self) -> str:
        """The model, and the dtype of its ways."""
        config = self.config
        stages = ",".join(map(str, config.num_keep)) or "all"
        return f"{config.arch}, keeping {stages} of {config.num_patches} patches; {self.subject.dtype_name}"

    @property
    def runs(self) -> str:
        """What runs the engine."""
        return f"engine: {self.engine.graph.how}"

    @property
    def engine(self) -> Engine:
        """The one at the model's own keep rate, else the last of the sweep; dense if the model is."""
        engines = [way.engine for way in self._ways.values() if way.engine is not None]
        return next((engine for engine in engines if engine.config == self.config), engines[-1])

    def images(self, batch: int) -> torch.Tensor:
        """What a batch of that size is measured on, (B, 3, H, W) float32."""
        return _images(batch, self.config.image_size)

    def measure(self, batch: int, seconds: float, progress: Callable[[float], None] = lambda share: None) -> Outcome:
        """Time every way on the same pictures, interleaved.

        Raises:
            InputError: the batch does not fit in memory.
        """
        self.check_memory(batch)
        try:
            images = self.images(batch)
            expected = {key: self._expected(key, images) for key in self._right}
            images = images.to(self.device, self.subject.dtype)
            with torch.no_grad():
                calls = {name: _bound(way.call, way.prepare(images)) for name, way in self._ways.items()}
                logits = {name: self._first_call(name, call) for name, call in calls.items()}
                given = {
                    name: None
                    if way.given is None or not way.config.num_keep
                    else way.given(images, expected[way.config.num_keep].right.kept).float()
                    for name, way in self._ways.items()
                }
                timings = interleave(calls, self.device, seconds, progress)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise
            raise InputError(f"batch: {batch} pictures do not fit in memory; a smaller batch would") from None
        rows, strays, unsure = [], [], []
        for name, way in self._ways.items():
            right = expected[way.config.num_keep]
            rows.append(self._row(name, batch, timings, logits[name], right.right.logits))
            if way.approximate:
                found = unlike(logits[name], right.right.logits)
            else:
                found = stray(logits[name], given[name], right, self.subject.dtype)
            if found:
                strays.append(f"{name}: {found}")
            elif given[name] is None and not way.approximate and unchecked(right, self.subject.dtype):
                unsure.append(name)
        return Outcome(rows, self._gains(timings, batch), strays, unsure, noise(timings.values()))

    def _expected(self, key: tuple[int, ...], images: torch.Tensor) -> Expected:
        right = evaluate(self._right[key], images)
        if not torch.isfinite(right.logits).all():
            name = self.subject.checkpoint.name
            raise InputError(f"{name}: the reference model itself gives NaN or Inf; its weights are too large")
        if self.subject.dtype == torch.float32:
            return Expected(right, right.logits, right.logits)
        plain, given = (evaluate(self._plain[key], images, kept).logits for kept in ((), right.kept))
        return Expected(right, plain, given)

    def _first_call(self, name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compiles what compiles. A copy: a captured graph writes its answers over those before."""
        with _blaming(name):
            return call().to(self.device, torch.float32, copy=True)

    def check_memory(self, batch: int) -> None:
        """Raise InputError if the reference's part of a batch would not fit in main memory.

        Linux would grant it, and end some process once it is used; a GPU says so itself.
        """
        free, needed = free_memory(self.device), batch * _bytes_a_picture(self.config)
        if self.device.type == "cpu" and free is not None and needed > free:
            raise InputError(
                f"batch: {batch} pictures do not fit in memory: about {needed / 2**30:.1f} GiB for the reference, "
                f"{free / 2**30:.1f} GiB are free; a smaller batch would"
            )

    @property
    def reference(self) -> VisionTransformer:
        """That of `engine`, in float32."""
        return self._right[self.engine.config.num_keep]

    def time_nodes(
        self, batch: int, limits: Limits, seconds: float, progress: Callable[[float], None] = lambda share: None
    ) -> list[NodeTime]:
        """Where the time of `engine` goes (node_times.py)."""
        return time_nodes(self.engine, self.reference, self.images(batch), limits, seconds, progress)

    def _gains(self, timings: Mapping[str, Timing], batch: int) -> list[Gain]:
        dense = self._ways.get("dense")
        if dense is None:
            return []
        return [
            Gain(
                keep_rate=way.keep_rate,
                num_keep=way.config.num_keep,
                gmacs=way.gmacs,
                images_per_s=timings[name].rates(batch)["images_per_s"],
                speedup=timings[name].speedup_over(timings["dense"]),
                ceiling=dense.gmacs / way.gmacs,
            )
            for name, way in self._ways.items()
            if way.runtime == "engine"
        ]

    def _row(
        self, name: str, batch: int, timings: Mapping[str, Timing], logits: torch.Tensor, right: torch.Tensor
    ) -> Row:
        way, timing = self._ways[name], timings[name]
        held = way.held_mib()
        return Row(
            model=self.config.arch,
            keep_rate=way.keep_rate,
            runtime=way.runtime,
            variant=way.variant,
            device=self.device.type,
            dtype=self.subject.dtype_name,
            batch=batch,
            **timing.rates(batch),
            gmacs=way.gmacs,
            params=self.subject.params(way.is_dense),
            peak_mib=None if timing.peak_mib is None or held is None else timing.peak_mib + held,
            max_logit_error=(logits - right).abs().max().item(),
            top1_agreement=(logits.argmax(dim=1) == right.argmax(dim=1)).float().mean().item(),
            baseline=self.baseline,
            speedup=timing.speedup_over(timings[self.baseline]),
        )


def _bytes_a_picture(config: Config) -> int:
    """Roughly what one picture needs of memory in the reference: itself, copied, and a block's largest tensors."""
    tokens = config.num_prefix + config.num_patches
    attention = 2 * config.num_heads * tokens + 5 * config.embed_dim
    mlp = 2 * (config.mlp_dim + config.embed_dim)
    return 4 * (4 * 3 * math.prod(config.image_size) + tokens * max(attention, mlp))


def _blaming(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name in OURS or name.startswith("engine") else ways.blaming(name)


def fvcore_gmacs(model: torch.nn.Module, images: torch.Tensor) -> float | None:
    """GMACs an image as fvcore counts them in the reference; None where it is not installed."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it uses of torch
        counted = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return float(counted.total()) / len(images) / 1e9


def _bound(call: Call, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: call(images)


def _images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Made-up pictures; beyond `DISTINCT_IMAGES` the same again with noise of their own."""
    distinct = sample_images(min(batch, DISTINCT_IMAGES), size, seed=2)
    if batch <= DISTINCT_IMAGES:
        return distinct
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    return distinct.repeat(-(-batch // DISTINCT_IMAGES), 1, 1, 1)[:batch] + 0.3 * noise
