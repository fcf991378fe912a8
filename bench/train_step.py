"""Time a training step of DynamicViT-DeiT-S/0.7 against one of dense DeiT-S with the same teacher.

    python bench/train_step.py                     # batch 8 on a CPU, 128 on a GPU
    python bench/train_step.py --dtype bfloat16 --out step.json

A step is forward, losses, backward and AdamW; the teacher's forward is in both. Dense models use PyTorch's
scaled_dot_product_attention (in bfloat16 on a CPU plain products, which are faster there), the student uses
masked_attention (fused) and plain products. All run interleaved.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import dvit_infer as dvit
from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.benchmark.timing import interleave
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.vit.reference import VisionTransformer
from dvit_infer.training.losses import Objective, losses
from dvit_infer.utils.tables import table

DENSE, FUSED, PLAIN = "dense", "student, fused", "student, plain"
AIM = 1.6  # target, relative to the time of a dense step


def model(arch: str, fused: bool, device: torch.device) -> VisionTransformer:
    built = dvit.load_reference(example_checkpoint(arch)).to(device).train()
    for module in built.modules():
        if hasattr(module, "fused"):
            module.fused = fused
    return built


def steps(batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    images = sample_images(batch, (224, 224), seed=2).to(device)
    labels = torch.arange(batch, device=device) % 1000
    teacher = model("deit-s", True, device).requires_grad_(False)
    objective = Objective((0.7, 0.7**2, 0.7**3))

    def step_of(trained: VisionTransformer) -> Callable[[], None]:
        # A learning rate of 0 keeps the weights, while AdamW does its usual work.
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.0)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                with torch.no_grad():
                    right = teacher(images)
                out = trained(images)
            if out.decisions:
                loss = losses(objective, out, right, labels).total
            else:
                loss = F.cross_entropy(out.pred.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {
        DENSE: step_of(model("deit-s", True, device)),
        FUSED: step_of(model("dynamicvit-deit-s", True, device)),
        PLAIN: step_of(model("dynamicvit-deit-s", False, device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="(default: 8 on a CPU, 128 on a GPU)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=120, help="at least 7 rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    batch = given.batch or (128 if device.type == "cuda" else 8)
    timings = interleave(steps(batch, getattr(torch, given.dtype), device), device, given.seconds)
    rows = []
    for name, timing in timings.items():
        rates = timing.rates(batch)
        rows.append(
            {
                "step": name,
                "device": device.type,
                "dtype": given.dtype,
                "batch": batch,
                "rounds": len(timing.seconds),
                **rates,
                "peak_mib": timing.peak_mib,
                "baseline": DENSE,
                "time_of_baseline": 1 / timing.speedup_over(timings[DENSE]),
            }
        )
    columns = ("step", ">images/s", ">p20", ">p80", ">peak MiB", ">of dense step")
    cells = [
        (
            row["step"],
            *(f"{row[key]:.1f}" for key in ("images_per_s", "p20_images_per_s", "p80_images_per_s")),
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['time_of_baseline']:.3f} x",
        )
        for row in rows
    ]
    print(f"{device.type}, {given.dtype}, batch {batch}, {rows[0]['rounds']} rounds; at most {AIM} x is the aim")
    print(table(columns, cells))
    if given.out:
        write_json(given.out, {"environment": environment(), "rows": rows})
        print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
