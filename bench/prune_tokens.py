"""dvit::prune_tokens against the same formulas in eager PyTorch, the three stages of DynamicViT-DeiT-S/0.7 together.

    PYTHONPATH=.:kernels python bench/prune_tokens.py --out prune_tokens.json [--dry]

On CUDA both are also replayed from a captured graph, as the engine runs them. Inputs are random and rotate among
buffers that together exceed the L2 cache at large batches. At batch 1, 64 of them fit in it, as does the output of a
preceding block.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from forwards import checkpoint
from rows import Part, Row, Rows, arguments, device_for

import dvit_infer as dvit
from dvit_infer.benchmark.timing import interleave
from dvit_infer.ops.prune_tokens import backend_of, prune_tokens_ref, score_tokens_ref

STAGES = ((196, 137), (137, 96), (96, 67))  # patch tokens in, kept
DIM, CACHE_BYTES = 384, 120e6  # twice an H200's L2
DRY = (64, ((4, 2),))
Call = Callable[[], object]


def captured(call: Call) -> Call:
    """Return the replay of a CUDA graph of the call."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rotating(calls: list[Call], times: int) -> Call:
    """Return a function of `times` calls, each with the next inputs; a single one is too short to be timed."""
    turns = itertools.cycle(calls)

    def run() -> None:
        for _ in range(times):
            next(turns)()

    return run


def measure(device: torch.device, dtype: torch.dtype, batch: int, seconds: float) -> Iterator[Row]:
    on_gpu = device.type == "cuda"
    dim, patches = (DIM, STAGES) if on_gpu else DRY
    model = dvit.load_reference(checkpoint("dynamicvit-deit-s", dry=not on_gpu))
    packed = [[t.to(device) for t in dvit.pack_predictor(p, dtype)] for p in model.score_predictor]
    stage_bytes = batch * sum(n + 1 for n, _ in patches) * dim * dtype.itemsize
    times = 20 if on_gpu else 1
    copies = max(2, min(64, round(CACHE_BYTES / stage_bytes))) if on_gpu else 1
    inputs = [[torch.randn(batch, n + 1, dim, device=device, dtype=dtype) for n, _ in patches] for _ in range(copies)]

    def stages(op: Callable[..., object], xs: list[torch.Tensor]) -> Call:
        return lambda: [op(x, w, k, 1, 1e-5) for x, w, (_, k) in zip(xs, packed, patches, strict=True)]

    ops = {"eager": prune_tokens_ref, "op": torch.ops.dvit.prune_tokens}
    calls = {name: rotating([stages(op, xs) for xs in inputs], times) for name, op in ops.items()}
    if on_gpu:
        for name, op in ops.items():
            calls[f"{name}, graph"] = rotating([captured(stages(op, xs)) for xs in inputs], times)
    timings = interleave(calls, device, seconds, warm_up=0.5 if on_gpu else 0.0)

    # Accuracy: the float32 scores of the tokens kept by the op, against the best possible.
    x, (n, k) = inputs[0][0], patches[0]
    best = score_tokens_ref(x[:, 1:].float(), dvit.pack_predictor(model.score_predictor[0].to(device)), 1e-5)
    for name, timing in timings.items():
        runtime, _, graph = name.partition(", ")
        index = ops[runtime](x, packed[0], k, 1, 1e-5)[1]
        lost = best.topk(k).values.sum(dim=1) - best.gather(1, index).sum(dim=1)
        by = [backend_of(device, n, dim)] if runtime == "op" else []
        yield {
            "op": f"prune_tokens, {len(patches)} stages",
            "runtime": runtime,
            "variant": ", ".join([*by, *filter(None, [graph])]) or None,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "shape": [[n + 1, dim, k] for n, k in patches],
            "us": timing.rates(1)["p50_ms"] * 1e3 / times,
            "max_error": lost.max().item(),
        }


def main() -> int:
    parser = arguments(__doc__, 25)
    parser.add_argument("--batch", default="1,256", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16,float16,float32", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="for each dtype and batch (default: %(default)s)")
    given = parser.parse_args()
    device, seconds = device_for(given.dry), 0.0 if given.dry else given.seconds
    if given.dry:
        given.batch, given.dtype = "1,2", "float32"
    jobs = [
        (f"{dtype}, batch {batch}", lambda d=dtype, b=batch: measure(device, getattr(torch, d), int(b), seconds))
        for dtype in given.dtype.split(",")
        for batch in given.batch.split(",")
    ]
    with torch.no_grad():
        return Part(Rows(given.out, given.add), device, given.budget).run(jobs)


if __name__ == "__main__":
    sys.exit(main())
