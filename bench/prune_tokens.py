"""dvit::prune_tokens against the same formulas in eager PyTorch, the three stages of DynamicViT-DeiT-S/0.7 together.

    PYTHONPATH=.:kernels python bench/prune_tokens.py [--out rows.json]

On CUDA both are also replayed from a captured graph, which is how the engine will run them. Inputs are random and
rotate among buffers that together exceed the L2 cache at large batches; at batch 1, where 64 of them do not, they are
as warm as what a block before has just written.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.benchmark.timing import interleave
from dvit_infer.models.example import example_checkpoint
from dvit_infer.ops.prune_tokens import how, prune_tokens_ref, score_tokens_ref
from dvit_infer.utils.tables import table

STAGES = ((196, 137), (137, 96), (96, 67))  # patch tokens in, kept
DIM, CACHE_BYTES = 384, 120e6  # twice an H200's L2
Call = Callable[[], object]


def captured(call: Call) -> Call:
    """The call as a replay of a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rotating(calls: list[Call], times: int) -> Call:
    """`times` calls, each with the next inputs: one would not last long enough to be timed."""
    turns = itertools.cycle(calls)

    def run() -> None:
        for _ in range(times):
            next(turns)()

    return run


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, batch: int, seconds: float) -> list[dict[str, object]]:
    model = dvit.load_reference(example_checkpoint("dynamicvit-deit-s"))
    packed = [[t.to(device) for t in dvit.pack_predictor(p, dtype)] for p in model.score_predictor]
    stage_bytes = batch * sum(n + 1 for n, _ in STAGES) * DIM * dtype.itemsize
    times = 20 if device.type == "cuda" else 1
    copies = max(2, min(64, round(CACHE_BYTES / stage_bytes))) if device.type == "cuda" else 1
    inputs = [[torch.randn(batch, n + 1, DIM, device=device, dtype=dtype) for n, _ in STAGES] for _ in range(copies)]

    def stages(op: Callable[..., object], xs: list[torch.Tensor]) -> Call:
        return lambda: [op(x, w, k, 1, 1e-5) for x, w, (_, k) in zip(xs, packed, STAGES, strict=True)]

    ways = {"eager": prune_tokens_ref, "op": torch.ops.dvit.prune_tokens}
    calls = {name: rotating([stages(op, xs) for xs in inputs], times) for name, op in ways.items()}
    if device.type == "cuda":
        for name, op in ways.items():
            calls[f"{name}, graph"] = rotating([captured(stages(op, xs)) for xs in inputs], times)
    timings = interleave(calls, device, seconds)

    # Arithmetic: what the op keeps, scored in float32, against the best that could be kept.
    x, (n, k) = inputs[0][0], STAGES[0]
    right = score_tokens_ref(x[:, 1:].float(), dvit.pack_predictor(model.score_predictor[0].to(device)), 1e-5)
    rows = []
    for name, timing in timings.items():
        index = ways[name.split(",")[0]](x, packed[0], k, 1, 1e-5)[1]
        lost = right.topk(k).values.sum(dim=1) - right.gather(1, index).sum(dim=1)
        rows.append(
            {
                "op": "prune_tokens, three stages",
                "how": f"{name} ({how(device, n, DIM)})" if name.startswith("op") else name,
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch,
                "shape": [[n + 1, DIM, k] for n, k in STAGES],
                "us": timing.rates(1)["p50_ms"] * 1e3 / times,
                "max_error": lost.max().item(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,256", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16,float16,float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3, help="for each dtype and batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    rows = []
    for dtype in given.dtype.split(","):
        for batch in map(int, given.batch.split(",")):
            rows += measure(torch.device(given.device), getattr(torch, dtype), batch, given.seconds)
    cells = [
        (row["dtype"], str(row["batch"]), row["how"], f"{row['us']:.1f}", f"{row['max_error']:.1e}") for row in rows
    ]
    print(table(("dtype", ">batch", "how", ">microseconds", ">score lost"), cells))
    if given.out:
        write_json(given.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
