"""Run one model by several candidates on the same images, time them, and check that all compute the same function."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from dvit_infer.benchmark import candidates, peers
from dvit_infer.benchmark.candidates import Call, Candidate, Subject
from dvit_infer.benchmark.outcome import Outcome, PruningSpeedup
from dvit_infer.benchmark.roofline import Limits, NodeTime, time_nodes
from dvit_infer.benchmark.timing import Row, Timing, interleave, noise
from dvit_infer.classifier import Source
from dvit_infer.config import Config
from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.registry import build_reference
from dvit_infer.models.vit.reference import VisionTransformer
from dvit_infer.parity.agreement import Expected, check_approximate, check_exact, unchecked
from dvit_infer.parity.verification import evaluate
from dvit_infer.utils.devices import free_memory
from dvit_infer.utils.memory import is_allocation_failure

CANDIDATES: dict[str, Callable[[Subject], Candidate]] = {
    "reference": candidates.reference_candidate,
    "dense": candidates.dense_candidate,
    "compile": candidates.compiled_candidate,
    "sdpa": candidates.sdpa_candidate,
    "onnxruntime": peers.onnxruntime_candidate,
    "onnx": peers.onnx_candidate,
    "onnx-int8": peers.onnx_int8_candidate,
    "openvino": peers.openvino_candidate,
    "timm": peers.timm_candidate,
}
USUAL = ("reference", "dense")
DISTINCT_IMAGES = 64
OURS = ("reference", "dense", "sdpa")  # candidates that nothing but this project can make fail


class Comparison:
    """The candidates that run one model, each loaded once.

    Args:
        model: a saved file, a checkpoint or a state dict; None: DynamicViT-DeiT-S/0.7 with random weights.
        names: keys of `CANDIDATES` to run beside the engine; the first is the baseline of every speed-up. 'compile'
            is the reference under torch.compile, with mode max-autotune on CUDA and default on a CPU.
        keep_rates: run the engine at each of these rates, and dense. Empty: at the model's own rate.

    Raises:
        InputError: The model, a name or a rate is invalid, or a package is not installed.
    """

    def __init__(
        self,
        model: Source | None,
        names: Sequence[str] = USUAL,
        device: str | None = None,
        dtype: str | None = None,
        keep_rates: Sequence[float] = (),
    ) -> None:
        if unknown := [name for name in names if name not in CANDIDATES]:
            raise InputError(f"compare: {unknown[0]!r} is not one of {', '.join(CANDIDATES)}")
        self.subject = subject = Subject(model, device, dtype)
        self.config, self.device = subject.config, subject.device
        is_dense = self.config.method == "none"
        wanted = dict.fromkeys([*names, *(["dense"] if is_dense or keep_rates else [])])
        self._candidates: dict[str, Candidate] = {}
        for name in CANDIDATES:
            if name in wanted:
                with _blaming(name):
                    self._candidates[name] = CANDIDATES[name](subject)
        configs = [subject.config_at(rate) for rate in keep_rates] or ([] if is_dense else [self.config])
        for config in configs:
            name = f"engine at {config.keep_rate}" if keep_rates else "engine"
            self._candidates[name] = candidates.engine_candidate(subject, config)
        self.baseline = next(iter(names), next(iter(self._candidates)))
        # One reference model for each function; functions differ in the tokens they keep.
        functions = {candidate.config.num_keep: candidate.config for candidate in self._candidates.values()}
        self._references = {key: build_reference(c, subject.checkpoint).to(self.device) for key, c in functions.items()}
        self._plain = self._references
        if subject.dtype != torch.float32:
            self._plain = {
                key: build_reference(config, subject.checkpoint).to(self.device, subject.dtype)
                for key, config in functions.items()
            }

    @property
    def title(self) -> str:
        """The model, and the dtype of its candidates."""
        config = self.config
        stages = ",".join(map(str, config.num_keep)) or "all"
        return f"{config.arch}, keeping {stages} of {config.num_patches} patches; {self.subject.dtype_name}"

    @property
    def runs(self) -> str:
        """The backend of the engine, as one line."""
        return f"engine: {self.engine.graph.runtime}"

    @property
    def engine(self) -> Engine:
        """The engine at the model's own keep rate, else the last of the sweep; dense if the model is dense."""
        engines = [candidate.engine for candidate in self._candidates.values() if candidate.engine is not None]
        return next((engine for engine in engines if engine.config == self.config), engines[-1])

    def images(self, batch: int) -> torch.Tensor:
        """Return the images on which a batch of that size is measured, (B, 3, H, W) float32."""
        return _images(batch, self.config.image_size)

    def measure(self, batch: int, seconds: float, progress: Callable[[float], None] = lambda share: None) -> Outcome:
        """Time every candidate on the same images, interleaved.

        Raises:
            InputError: the batch does not fit in memory.
        """
        self.check_memory(batch)
        try:
            images = self.images(batch)
            expected = {key: self._expected(key, images) for key in self._references}
            images = images.to(self.device, self.subject.dtype)
            with torch.no_grad():
                calls = {
                    name: _bound(candidate.call, candidate.prepare(images))
                    for name, candidate in self._candidates.items()
                }
                logits = {name: self._first_call(name, call) for name, call in calls.items()}
                given = {
                    name: None
                    if candidate.given is None or not candidate.config.num_keep
                    else candidate.given(images, expected[candidate.config.num_keep].reference.kept).float()
                    for name, candidate in self._candidates.items()
                }
                timings = interleave(calls, self.device, seconds, progress)
        except (MemoryError, RuntimeError) as error:
            if not is_allocation_failure(error):
                raise
            raise InputError(f"batch: {batch} images do not fit in memory; use a smaller batch") from None
        rows, mismatches, unsure = [], [], []
        for name, candidate in self._candidates.items():
            right = expected[candidate.config.num_keep]
            rows.append(self._row(name, batch, timings, logits[name], right.reference.logits))
            if candidate.approximate:
                found = check_approximate(logits[name], right.reference.logits)
            else:
                found = check_exact(logits[name], given[name], right, self.subject.dtype)
            if found:
                mismatches.append(f"{name}: {found}")
            elif given[name] is None and not candidate.approximate and unchecked(right, self.subject.dtype):
                unsure.append(name)
        return Outcome(rows, self._pruning_speedups(timings, batch), mismatches, unsure, noise(timings.values()))

    def _expected(self, key: tuple[int, ...], images: torch.Tensor) -> Expected:
        right = evaluate(self._references[key], images)
        if not torch.isfinite(right.logits).all():
            name = self.subject.checkpoint.name
            raise InputError(f"{name}: the reference model itself gives NaN or Inf; its weights are too large")
        if self.subject.dtype == torch.float32:
            return Expected(right, right.logits, right.logits)
        plain, given = (evaluate(self._plain[key], images, kept).logits for kept in ((), right.kept))
        return Expected(right, plain, given)

    def _first_call(self, name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a call once, which compiles if needed, and return a copy: a captured graph overwrites its last output."""
        with _blaming(name):
            return call().to(self.device, torch.float32, copy=True)

    def check_memory(self, batch: int) -> None:
        """Raise InputError if the reference's part of a batch would not fit in main memory.

        Linux would grant it, and end some process once it is used; a GPU says so itself.
        """
        free, needed = free_memory(self.device), batch * _bytes_per_image(self.config)
        if self.device.type == "cpu" and free is not None and needed > free:
            raise InputError(
                f"batch: {batch} images do not fit in memory: about {needed / 2**30:.1f} GiB for the reference, "
                f"{free / 2**30:.1f} GiB are free; use a smaller batch"
            )

    @property
    def reference(self) -> VisionTransformer:
        """The reference of `engine`, in float32."""
        return self._references[self.engine.config.num_keep]

    def time_nodes(
        self, batch: int, limits: Limits, seconds: float, progress: Callable[[float], None] = lambda share: None
    ) -> list[NodeTime]:
        """Time every node of `engine` (roofline.py)."""
        return time_nodes(self.engine, self.reference, self.images(batch), limits, seconds, progress)

    def _pruning_speedups(self, timings: Mapping[str, Timing], batch: int) -> list[PruningSpeedup]:
        dense = self._candidates.get("dense")
        if dense is None:
            return []
        return [
            PruningSpeedup(
                keep_rate=candidate.keep_rate,
                num_keep=candidate.config.num_keep,
                gmacs=candidate.gmacs,
                images_per_s=timings[name].rates(batch)["images_per_s"],
                speedup=timings[name].speedup_over(timings["dense"]),
                ceiling=dense.gmacs / candidate.gmacs,
            )
            for name, candidate in self._candidates.items()
            if candidate.runtime == "engine"
        ]

    def _row(
        self, name: str, batch: int, timings: Mapping[str, Timing], logits: torch.Tensor, expected: torch.Tensor
    ) -> Row:
        candidate, timing = self._candidates[name], timings[name]
        held = candidate.held_mib()
        return Row(
            model=self.config.arch,
            keep_rate=candidate.keep_rate,
            runtime=candidate.runtime,
            variant=candidate.variant,
            device=self.device.type,
            dtype=self.subject.dtype_name,
            batch=batch,
            **timing.rates(batch),
            gmacs=candidate.gmacs,
            params=self.subject.params(candidate.is_dense),
            peak_mib=None if timing.peak_mib is None or held is None else timing.peak_mib + held,
            max_logit_error=(logits - expected).abs().max().item(),
            top1_agreement=(logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item(),
            baseline=self.baseline,
            speedup=timing.speedup_over(timings[self.baseline]),
        )


def _bytes_per_image(config: Config) -> int:
    """Estimate the memory that one image needs in the reference: its copies, and a block's largest tensors."""
    tokens = config.num_prefix + config.num_patches
    attention = 2 * config.num_heads * tokens + 5 * config.embed_dim
    mlp = 2 * (config.mlp_dim + config.embed_dim)
    return 4 * (4 * 3 * math.prod(config.image_size) + tokens * max(attention, mlp))


def _blaming(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name in OURS or name.startswith("engine") else candidates.blaming(name)


def fvcore_gmacs(model: torch.nn.Module, images: torch.Tensor) -> float | None:
    """Return GMACs per image as fvcore counts them in the reference, or None if fvcore is not installed."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch functions that fvcore uses
        counted = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return float(counted.total()) / len(images) / 1e9


def _bound(call: Call, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: call(images)


def _images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Return synthetic images; beyond `DISTINCT_IMAGES` they repeat, with different noise added."""
    distinct = sample_images(min(batch, DISTINCT_IMAGES), size, seed=2)
    if batch <= DISTINCT_IMAGES:
        return distinct
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    return distinct.repeat(-(-batch // DISTINCT_IMAGES), 1, 1, 1)[:batch] + 0.3 * noise
