"""The first half minute on a GPU: check and time DeiT-S/0.7 in every variant of a forward.

    PYTHONPATH=.:kernels python bench/smoke.py --out smoke.json [--dry]

In bfloat16 at batch 256 and 1: launched one by one, in a CUDA graph, with programmatic launches, as two branches. Each
may fail by itself. Logits are compared with the reference's, with its kept sets given and by the engine's own choice.
Rows also hold the difference from the first variant: only two branches may use other tiles, and differ. A failing
kernel is an error here; the other parts replace it, as for users (DVIT_KERNELS).
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from forwards import PLAIN, Expected, checkpoint, forward_of, with_programmatic, with_two_branches
from rows import Part, Row, Rows, arguments, device_for

from dvit_infer.benchmark.timing import interleave

VARIANTS = {
    "not captured": PLAIN,
    "captured": PLAIN,
    "programmatic": with_programmatic(PLAIN),
    "two branches": with_two_branches(PLAIN),
}
SECONDS, WARM_UP_S = 1.0, 0.2


def one(
    source: dict[str, Any], variant: str, expected: Expected, seconds: float, seen: list[torch.Tensor]
) -> Iterator[Row]:
    """Yield the row of one variant; a wrong output is not timed. `seen` holds the logits of earlier variants."""
    batch, device = len(expected.images), expected.logits.device
    forward = forward_of(source, VARIANTS[variant], expected, variant=variant, captured=variant != "not captured")
    print(f"  {forward.engine.runner.runtime}", flush=True)
    logits = forward.call()
    if why := expected.disagreement(logits, forward.given()):
        yield {**forward.identity(batch), "failed": why}
        return
    seen.append(logits)
    timing = interleave({variant: forward.call}, device, seconds, warm_up=WARM_UP_S if seconds else 0.0)[variant]
    difference = (logits - seen[0]).abs().max().item()
    yield {**forward.row(batch, timing, logits, expected), "max_difference": difference}


def main() -> int:
    given = arguments(__doc__, 30).parse_args()
    device = device_for(given.dry)
    os.environ.setdefault("DVIT_KERNELS", "require")  # falling back to PyTorch's operators would hide a faulty kernel
    dtype = torch.float32 if given.dry else torch.bfloat16
    source = checkpoint("dynamicvit-deit-s", given.dry)
    part, status = Part(Rows(given.out, given.add), device, given.budget), 0
    for batch in (2, 1) if given.dry else (256, 1):
        expected, seen = Expected.of(source, batch, device, dtype), []
        variants = [v for v in VARIANTS if batch > 1 or v != "two branches"]
        jobs = [
            (f"{v}, batch {batch}", lambda v=v, e=expected, s=seen: one(source, v, e, 0.0 if given.dry else SECONDS, s))
            for v in variants
        ]
        status |= part.run(jobs)
    return status


if __name__ == "__main__":
    sys.exit(main())
