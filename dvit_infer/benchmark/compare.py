"""Run one model by several candidates on the same images, time them, and check that all compute the same function."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dvit_infer.benchmark import candidates, peers
from dvit_infer.benchmark.base import BaseComparison, Calls, Check
from dvit_infer.benchmark.candidates import Candidate, Subject
from dvit_infer.benchmark.outcome import PruningSpeedup
from dvit_infer.benchmark.owners import owner_candidate
from dvit_infer.benchmark.roofline import Limits, NodeTime, time_nodes
from dvit_infer.benchmark.timing import Row, Timing
from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Attention, Mlp
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.reference import Reference
from dvit_infer.models.registry import build_reference
from dvit_infer.parity.agreement import Expected, check_approximate, check_exact, unchecked
from dvit_infer.parity.verification import evaluate
from dvit_infer.utils.memory import check_batch_fits

CANDIDATES: dict[str, Callable[[Subject], Candidate]] = {
    "reference": candidates.reference_candidate,
    "dense": candidates.dense_candidate,
    "compile": candidates.compiled_candidate,
    "sdpa": candidates.sdpa_candidate,
    "onnxruntime": peers.onnxruntime_candidate,
    "onnx": peers.onnx_candidate,
    "onnx-int8": peers.onnx_int8_candidate,
    "openvino": peers.openvino_candidate,
    "timm": functools.partial(owner_candidate, package="timm"),
    "timm-compile": functools.partial(owner_candidate, package="timm", compiles=True),
    "transformers": functools.partial(owner_candidate, package="transformers"),
    "transformers-compile": functools.partial(owner_candidate, package="transformers", compiles=True),
}
USUAL = ("reference", "dense")
DISTINCT_IMAGES = 64
OURS = ("reference", "dense", "sdpa")  # candidates that nothing but this project can make fail


class Comparison(BaseComparison):
    """The candidates that run one model, each loaded once.

    Args:
        model: a saved file, a checkpoint or a state dict; None: DynamicViT-DeiT-S/0.7 with random weights.
        names: keys of `CANDIDATES` to run beside the engine; the first is the baseline of every speed-up. 'compile'
            is the reference under torch.compile, with mode max-autotune on CUDA and default on a CPU.
        keep_rates: run the engine at each of these rates, and dense. Empty: at the model's own rate.
        calibrate, backend: for our engine, as for `convert`.
        facts: keywords of `convert` that say what the model is, such as method, keep_rate and assume.

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
        calibrate: str | None = None,
        backend: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if unknown := [name for name in names if name not in CANDIDATES]:
            raise InputError(f"compare: {unknown[0]!r} is not one of {', '.join(CANDIDATES)}")
        self.subject = subject = Subject(model, device, dtype, calibrate, backend, facts)
        self.config, self.device, self.dtype_name = subject.config, subject.device, subject.dtype_name
        named = "int8 engine, the rest in float32" if subject.int8 else self.dtype_name
        self.title = f"{self.config.arch}, {self.config.reduction}; {named}"
        is_dense = not self.config.reduction.stages
        wanted = dict.fromkeys([*names, *(["dense"] if is_dense or keep_rates else [])])
        self._candidates: dict[str, Candidate] = {}
        for name in CANDIDATES:
            if name in wanted:
                with _blaming(name):
                    self._candidates[name] = CANDIDATES[name](subject)
        subject.exports.clear()  # each as large as the model
        configs = [subject.config_at(rate) for rate in keep_rates] or ([] if is_dense else [self.config])
        for config in configs:
            name = f"engine at {config.reduction.keep_rate}" if keep_rates else "engine"
            self._candidates[name] = candidates.engine_candidate(subject, config)
        self.baseline = next(iter(names), next(iter(self._candidates)))
        # One reference model for each function; functions differ in their reduction.
        functions = {candidate.function: candidate.config for candidate in self._candidates.values()}
        self._references = {key: build_reference(c, subject.checkpoint).to(self.device) for key, c in functions.items()}
        self._plain = self._references
        if subject.dtype != torch.float32:
            self._plain = {
                key: build_reference(config, subject.checkpoint).to(self.device, subject.dtype)
                for key, config in functions.items()
            }

    @property
    def runs(self) -> str:
        return f"engine: {self.engine.outline.runtime}"

    @property
    def engine(self) -> Engine:
        """The engine at the model's own keep rate, else the last of the sweep; dense if the model is dense."""
        engines = [candidate.engine for candidate in self._candidates.values() if candidate.engine is not None]
        return next((engine for engine in engines if engine.config.reduction == self.config.reduction), engines[-1])

    def images(self, batch: int) -> torch.Tensor:
        """Return synthetic images; beyond `DISTINCT_IMAGES` they repeat, with different noise added."""
        size = self.config.image_size
        distinct = sample_images(min(batch, DISTINCT_IMAGES), size, seed=2)
        if batch <= DISTINCT_IMAGES:
            return distinct
        noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
        return distinct.repeat(-(-batch // DISTINCT_IMAGES), 1, 1, 1)[:batch] + 0.3 * noise

    def _prepare(self, images: torch.Tensor) -> tuple[Calls, dict[str, Check]]:
        expected = {key: self._expected(key, images) for key in self._references}
        images = images.to(self.device, self.subject.dtype)
        calls: Calls = {}
        checks = {}
        for name, candidate in self._candidates.items():
            calls[name] = functools.partial(candidate.call, candidate.prepare(images))
            with _blaming(name):  # the first call compiles
                logits = calls[name]().to(self.device, torch.float32, copy=True)  # the next one may overwrite it
            checks[name] = self._check(candidate, images, logits, expected[candidate.function])
        return calls, checks

    def _check(self, candidate: Candidate, images: torch.Tensor, logits: torch.Tensor, expected: Expected) -> Check:
        target, dtype, given = expected.reference.logits, self.subject.dtype, None
        if candidate.given is not None and not candidate.is_dense:
            given = candidate.given(images, expected.reference.kept).float()
        if candidate.approximate:
            mismatch, unclear = check_approximate(logits, target), False
        else:
            mismatch = check_exact(logits, given, expected, dtype)
            unclear = mismatch is None and given is None and unchecked(expected, dtype)
        error = (logits - target).abs().max().item()
        agreement = (logits.argmax(dim=1) == target.argmax(dim=1)).float().mean().item()
        return Check(mismatch, unclear, error, agreement)

    def _expected(self, key: str, images: torch.Tensor) -> Expected:
        reference = evaluate(self._references[key], images)
        if not torch.isfinite(reference.logits).all():
            name = self.subject.checkpoint.name
            raise InputError(f"{name}: the reference model itself gives NaN or Inf; its weights are too large")
        if self.subject.dtype == torch.float32:
            return Expected(reference, reference.logits, reference.logits)
        plain, given = (evaluate(self._plain[key], images, kept).logits for kept in ((), reference.kept))
        return Expected(reference, plain, given)

    def check_memory(self, batch: int) -> None:
        if self.device.type == "cpu":
            check_batch_fits(batch, batch * _bytes_per_image(self.subject.plain_graph))

    @property
    def reference(self) -> Reference:
        """The reference of `engine`, in float32."""
        return self._references[str(self.engine.config.reduction)]

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
                merges=candidate.config.reduction.merges,
                gmacs=candidate.gmacs,
                images_per_s=timings[name].rates(batch)["images_per_s"],
                speedup=timings[name].speedup_over(timings["dense"]),
                ceiling=dense.gmacs / candidate.gmacs,
            )
            for name, candidate in self._candidates.items()
            if candidate.runtime == "engine"
        ]

    def _row_fields(self, name: str, timing: Timing) -> dict[str, Any]:
        candidate = self._candidates[name]
        held = candidate.held_mib()
        return {
            "model": self.config.arch,
            "keep_rate": candidate.keep_rate,
            "runtime": candidate.runtime,
            "variant": candidate.variant,
            "dtype": candidate.dtype or self.dtype_name,
            "gmacs": candidate.gmacs,
            "params": self.subject.params(candidate.config),
            "peak_mib": None if timing.peak_mib is None or held is None else timing.peak_mib + held,
        }

    def _verdict(self, rows: list[Row], mismatches: list[str], unchecked: list[str]) -> str:
        if mismatches:
            return f"NOT the same function as the reference: {'; '.join(mismatches)}"
        if unchecked:
            names = ", ".join(unchecked)
            return f"not checked whether {names} computes the same function: in no image is the choice of tokens clear"
        exact = [row for row in rows if "int8" not in (row.variant, row.dtype)]
        largest = max(row.max_logit_error for row in exact if row.max_logit_error is not None)
        reduced = "" if self.dtype_name == "float32" else f", near ties in {self.dtype_name} included"
        but = "" if len(exact) == len(rows) else " but int8, which is approximate,"
        return f"all candidates{but} compute the same function: largest error of a logit {largest:.1e}{reduced}"


def _bytes_per_image(graph: Graph) -> int:
    """Estimate the memory that one image needs in the reference: its copies, and a block's largest tensors."""
    values = [0]
    for node in graph.nodes:
        if isinstance(node, Attention):
            values.append(node.tokens * (2 * node.num_heads * node.tokens + 5 * node.dim))
        elif isinstance(node, Mlp):
            values.append(node.tokens * 2 * (node.weights["fc1.weight"].shape[0] + node.dim))
    return 4 * (4 * 3 * math.prod(graph.config.image_size) + max(values))


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
