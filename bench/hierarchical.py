"""Compare DynamicSwin and DynamicConvNeXt with their references and their own dense forms, on a CPU.

Weights are random. What the dense form's own times allow follows from OpenVINO's profile of it: the time of each MLP,
but for the share of positions that pass it by. Candidates run in turn; ratios are medians over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dvit_infer as dvit
from dvit_infer.backends.openvino_model import compile_model, openvino_model
from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.graph.routes import Route, RoutedMlp
from dvit_infer.models.example import example_checkpoint

ARCHS = ("dynamicswin-t", "dynamicconvnext-s")


@torch.no_grad()
def times(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of each call in every round, after two that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = clock()
            call()
            if number > 1:
                found[name].append(clock() - start)
    return found


def allowed(dense: dvit.Engine, reduced: dvit.Engine, images: torch.Tensor) -> tuple[float, float]:
    """Return the speed-up that the dense model's own times allow.

    The first is of passing MLPs by at no cost; the second counts the other branch and the predictors, at the rate of
    the MLPs.
    """
    model = openvino_model(dense.graph)
    model.reshape(list(images.shape))
    request = compile_model(model, {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    for _ in range(4):
        request.infer([images.numpy()])
    seconds: dict[str, float] = {}
    for operator in request.profiling_info:
        node = operator.node_name.split("/")[0]
        seconds[node] = seconds.get(node, 0.0) + operator.real_time.total_seconds()
    routed = [node for node in reduced.graph.nodes if isinstance(node, RoutedMlp)]
    predictors = sum(node.macs for node in reduced.graph.nodes if isinstance(node, Route))
    total = sum(seconds.values())
    free = sum(seconds[node.name] * (1 - node.num_keep / node.tokens) for node in routed)
    per_mac = sum(seconds[node.name] for node in routed) / sum(node.mlp_macs for node in routed)
    counted = per_mac * (sum(node.mlp_macs - node.macs for node in routed) - predictors)
    return total / (total - free), total / (total - counted)


def measure(arch: str, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    checkpoint = example_checkpoint(arch)
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    reduced, dense = (dvit.convert(checkpoint, device="cpu", method=method) for method in (None, "none"))
    references = [dvit.load_reference(checkpoint, method=method) for method in (None, "none")]
    names = ("engine", "dense engine", "reference", "dense reference")
    calls = {
        name: lambda model=model: model(images)
        for name, model in zip(names, (reduced, dense, *references), strict=True)
    }
    seconds = times(calls, rounds, clock)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    may, may_with_costs = allowed(dense, reduced, images)
    over_dense = ratio("dense engine", "engine")
    return {
        "model": arch,
        "batch": batch,
        "runtime": reduced.runner.runtime,
        "ms": {name: round(1000 * statistics.median(found), 1) for name, found in seconds.items()},
        "engine over reference": ratio("reference", "engine"),
        "dense engine over dense reference": ratio("dense reference", "dense engine"),
        "engine over dense engine": over_dense,
        "allowed by the dense engine's times": may,
        "reached of it": over_dense / may,
        "allowed, with the other branch and predictors": may_with_costs,
        "reached of that": over_dense / may_with_costs,
        "reference over dense reference": ratio("dense reference", "reference"),
        "the same, reached of it": ratio("dense reference", "reference") / may,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", nargs="+", default=ARCHS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for a machine that others use")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    clock = time.process_time if given.cpu_time else time.perf_counter
    rows = [measure(arch, given.batch, given.rounds, clock) for arch in given.archs]
    for row in rows:
        for name, value in row.items():
            print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if given.json:
        write_json(given.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
