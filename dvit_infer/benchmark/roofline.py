"""Time every node of a graph and compare it with its floor, by a roofline model with measured limits."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dvit_infer.backends.cpu import time_linears
from dvit_infer.benchmark.timing import rounds
from dvit_infer.classifier import Runner
from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.graph.heads import nodes_for
from dvit_infer.graph.nodes import Node
from dvit_infer.graph.saving import saved_time
from dvit_infer.models.reference import Reference
from dvit_infer.parity.verification import evaluate, node_outputs
from dvit_infer.utils.devices import timed

# (rows, in, out) of a CPU's best matrix products: with weights that stay in its caches, and with larger ones.
LINEAR_SHAPES, LINEAR_ROUNDS = ((1536, 1536, 384), (2048, 1024, 4096)), 15
GPU_SIZE = 8192  # side of the square matrices that a GPU multiplies
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far beyond any cache


@dataclass(frozen=True)
class Limits:
    """The measured limits of this machine.

    Attributes:
        flops_per_s: FLOP/s of the best matrix product, 2 per MAC.
        bytes_per_s: bytes read plus written per second by a copy of `copied` bytes.
        product, shape: the implementation of that matrix product; its rows, inner size and columns.
    """

    flops_per_s: float
    bytes_per_s: float
    product: str
    shape: tuple[int, int, int]
    copied: int

    def __str__(self) -> str:
        return (
            f"measured limits: {self.flops_per_s / 1e9:,.0f} GFLOP/s ({self.product}), "
            f"{self.bytes_per_s / 1e9:,.1f} GB/s (copy)"
        )


@dataclass(frozen=True)
class NodeTime:
    """A node's median time for a batch, and its floor: its MACs or its bytes at the measured limits.

    Bytes are counted as if caches held nothing, so a memory-bound node may run below its floor. `saves_s` is for a node
    that removes tokens: how much longer the later ones would take with these, if the time of each were proportional to
    its tokens; None for others.
    """

    node: Node
    seconds: float
    p20_s: float
    p80_s: float
    gmacs: float
    bytes_moved: int
    floor_s: float
    bound: str  # 'compute' or 'memory'
    max_error: float | None  # of its output from the reference's, with kept sets given; None: no counterpart
    saves_s: float | None = None


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the best matrix product and copy of this machine, each the fastest of several calls.

    Raises:
        InputError: Nodes cannot be timed on such a device.
    """
    if device.type not in COPY_BYTES:
        raise InputError(f"nodes: are timed on {' and '.join(COPY_BYTES)}, not on {device.type}; leave it out")
    if device.type == "cpu":
        found = {
            (shape, candidate): seconds
            for shape in LINEAR_SHAPES
            for candidate, seconds in time_linears(dtype, shape, LINEAR_ROUNDS, gelu=False).items()
        }
        shape, best = max(found, key=lambda key: math.prod(key[0]) / found[key])
        taken, product = found[shape, best], str(best)
    else:
        shape = (GPU_SIZE, GPU_SIZE, GPU_SIZE)
        x, y = (torch.randn(GPU_SIZE, GPU_SIZE, device=device, dtype=dtype) for _ in range(2))
        taken, product = _best(lambda: torch.mm(x, y), device), "torch.mm"
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = source.numel()
    bytes_per_s = 2 * copied / _best(lambda: target.copy_(source), device)
    return Limits(2 * math.prod(shape) / taken, bytes_per_s, product, shape, copied)


def time_nodes(
    engine: Engine,
    reference: Reference,
    images: torch.Tensor,
    limits: Limits,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> list[NodeTime]:
    """Return the median time of every node for the batch, over calls for about `seconds`.

    Nodes that run only for those who ask which tokens stay are left out. PyTorch runs the nodes of an engine whose
    backend runs them all in one. On a GPU the nodes are launched one by one, not in the CUDA graph that the engine
    replays, so at small batches the times are dominated by launching.

    Args:
        images: (B, 3, H, W) float32; split as the engine splits a batch.
        reference: the reference of the engine's config, in float32 on its device.
    """
    parts, runner = torch.split(images.to(engine.device, engine.dtype), engine.micro_batch), engine.runner.plain()
    for part in parts:
        _node_seconds(runner, part, engine.device)
    times = [
        np.sum([_node_seconds(runner, part, engine.device) for part in parts], axis=0)
        for _ in rounds(seconds, progress)
    ]
    percentiles = np.percentile(times, [50, 20, 80], axis=0).T
    errors = _errors(engine, reference, images[: engine.micro_batch])
    nodes, medians = nodes_for(engine.outline.nodes, "logits", choices=False)[0], percentiles[:, 0].tolist()
    found = [
        _node_time(node, taken, [len(part) for part in parts], engine.dtype, limits, errors.get(node.name))
        for node, taken in zip(nodes, percentiles.tolist(), strict=True)
    ]
    return [replace(time, saves_s=saved_time(nodes, medians, i)) for i, time in enumerate(found)]


def _node_time(
    node: Node, taken: Sequence[float], parts: Sequence[int], dtype: torch.dtype, limits: Limits, error: float | None
) -> NodeTime:
    macs = node.macs * sum(parts)
    moved = sum(node.bytes_moved(count, dtype.itemsize) for count in parts)
    compute, memory = 2 * macs / limits.flops_per_s, moved / limits.bytes_per_s
    bound = "compute" if compute >= memory else "memory"
    median, p20, p80 = taken
    return NodeTime(node, median, p20, p80, macs / 1e9, moved, max(compute, memory), bound, error)


def _node_seconds(runner: Runner, images: torch.Tensor, device: torch.device) -> list[float]:
    """Return the seconds of every node in one call."""
    marks: list[Any] = []
    if device.type == "cpu":
        start = time.perf_counter()
        runner.run(images, None, lambda node, out: marks.append(time.perf_counter()), return_choices=False)
        return [float(taken) for taken in np.diff([start, *marks])]

    def mark() -> None:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        marks.append(event)

    with torch.cuda.device(device):
        mark()
        runner.run(images, None, lambda node, out: mark(), return_choices=False)
        torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


def _errors(engine: Engine, reference: Reference, images: torch.Tensor) -> dict[str, float]:
    kept = evaluate(reference, images).kept
    found = node_outputs(engine, reference, images, kept)
    return {node.name: (out.float() - want).abs().max().item() for node, out, want in found}


def _best(call: Callable[[], object], device: torch.device) -> float:
    return min(timed(call, device)[1] for _ in range(7))


def rows(times: Sequence[NodeTime], engine: Engine, batch: int) -> list[dict[str, Any]]:
    """Return the rows of a result file, in microseconds and MiB per batch."""
    total = sum(t.seconds for t in times)
    config = engine.config
    return [
        {
            "op": t.node.name,
            "kind": t.node.kind,
            "runtime": "engine",
            "model": config.arch,
            "keep_rate": config.reduction.keep_rate,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "batch": batch,
            "shape": [list(t.node.in_shape), list(t.node.out_shape)],
            "us": t.seconds * 1e6,
            "p20_us": t.p20_s * 1e6,
            "p80_us": t.p80_s * 1e6,
            "max_error": t.max_error,
            "gmacs": t.gmacs,
            "mib": t.bytes_moved / 2**20,
            "floor_us": t.floor_s * 1e6,
            "bound": t.bound,
            "share": t.seconds / total,
            "saves_us": None if t.saves_s is None else t.saves_s * 1e6,
        }
        for t in times
    ]


def limit_rows(limits: Limits, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the measured limits as rows of a result file."""
    kind = {"runtime": f"measured limit: {limits.product}", "dtype": str(dtype).removeprefix("torch."), "batch": None}
    product_us = 2e6 * math.prod(limits.shape) / limits.flops_per_s
    product = {"op": "matrix product", **kind, "shape": list(limits.shape), "us": product_us, "max_error": None}
    copy_us = 2e6 * limits.copied / limits.bytes_per_s
    copy = {"op": "copy", **kind, "runtime": "measured limit: copy", "dtype": "uint8", "shape": [limits.copied]}
    return [
        product | {"tflops": limits.flops_per_s / 1e12},
        copy | {"us": copy_us, "max_error": 0.0, "gb_per_s": limits.bytes_per_s / 1e9},
    ]
