"""A result file as dvit-bench --json writes it, made up: what the tests of the report draw."""

from typing import Any

CANDIDATES = ("engine", "dense", "reference", "compile")
BATCHES = (1, 8, 32)
RATES = (0.5, 0.6, 0.7, 0.8, 0.9)
DENSE_GMACS = 4.287


def model_row(runtime: str, batch: int, keep_rate: float = 0.7, **other: Any) -> dict[str, Any]:
    pruned = 2.868 + (keep_rate - 0.7) * 3.4 + (0.12 if runtime != "engine" else 0.0)
    gmacs = DENSE_GMACS if runtime == "dense" else pruned
    base = {"engine": 105.0, "dense": 108.0, "reference": 74.0, "compile": 91.0}.get(runtime, 60.0)
    speed = base / gmacs * {1: 0.63, 8: 1.0}.get(batch, 0.97)
    return {
        "model": "dynamicvit-deit-s", "keep_rate": 1.0 if runtime == "dense" else keep_rate, "runtime": runtime,
        "variant": "default" if runtime == "compile" else None, "device": "cpu", "dtype": "float32", "batch": batch,
        "images_per_s": speed, "p20_images_per_s": speed * 0.94, "p80_images_per_s": speed * 1.03,
        "p50_ms": batch / speed * 1e3, "p99_ms": batch / speed * 1.3e3, "gmacs": gmacs, "params": 22774414,
        "peak_mib": None if runtime == "compile" else 120.0 + 3.5 * batch, "max_logit_error": 4.5e-6,
        "top1_agreement": 1.0, "baseline": "reference", "speedup": speed / (74.0 / 2.988), **other,
    }  # fmt: skip


def node_rows() -> list[dict[str, Any]]:
    names = [("embed", "embed", 0.116)]
    for block in range(12):
        if block in (3, 6, 9):
            names.append((f"prune.{block // 3 - 1}", "prune", 0.02))
        names.append((f"blocks.{block}.attn", "attention", 0.115 * 0.7 ** (block // 3)))
        names.append((f"blocks.{block}.mlp", "mlp", 0.232 * 0.7 ** (block // 3)))
    names = [*names[:27], ("head", "head", 0.0004)]
    rows = []
    for place, (op, kind, gmacs) in enumerate(names):
        floor = max(gmacs * 8 / 215e-6, 40.0)
        us = floor * (1.25 if kind == "mlp" else 1.9 if kind == "attention" else 4.0) + place
        rows.append({
            "op": op, "kind": kind, "runtime": "engine", "model": "dynamicvit-deit-s", "keep_rate": 0.7,
            "dtype": "float32", "batch": 8, "shape": [[8, 197, 384], [8, 197, 384]], "us": us, "max_error": 1.2e-6,
            "gmacs": gmacs * 8, "mib": 8.4, "floor_us": floor, "share": 0.0,
            "bound": "memory" if kind in ("prune", "head") else "compute",
        })  # fmt: skip
    total = sum(row["us"] for row in rows)
    return [row | {"share": row["us"] / total} for row in rows]


def limit_rows() -> list[dict[str, Any]]:
    usual = {"batch": None, "dtype": "float32"}
    product = {"op": "matrix product", "runtime": "measured limit: torch.mm", "shape": [2048, 1024, 4096], **usual}
    copy = {"op": "copy", "runtime": "measured limit: copy", "shape": [268435456], **usual}
    return [
        product | {"us": 39952.0, "max_error": None, "tflops": 0.43},
        copy | {"us": 29800.0, "dtype": "uint8", "max_error": 0.0, "gb_per_s": 18.0},
    ]


def content(*rows: dict[str, Any], **environment: Any) -> dict[str, Any]:
    where = {
        "machine": "intel-xeon-processor-2-threads", "gpu": None, "driver": None, "torch": "2.13.0", "triton": "3.7.0",
        "commit": "0123456789ab", "date": "2026-11-24T10:00:00",
    }  # fmt: skip
    return {"version": 2, "environment": where | environment, "rows": list(rows)}


def full() -> dict[str, Any]:
    """3 batches x 4 candidates, a sweep of 5 rates at one batch, 28 nodes, two limits."""
    candidates = [model_row(runtime, batch) for batch in BATCHES for runtime in CANDIDATES]
    sweep = [model_row("engine", 8, rate) for rate in RATES if rate != 0.7]
    return content(*candidates, *sweep, *node_rows(), *limit_rows())
