"""Run dvit-tune on DynamicViT-DeiT-S with random weights and 1,000 synthetic image files; print time and peak memory.

    PYTHONPATH=.:kernels python bench/tune_deit.py FOLDER [options of dvit-tune]

Model, images and results go to FOLDER. With the default budget it has to end within 15 minutes on two cores; exit
status 1 if it took longer.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from dvit_infer.images.synthetic import sample_uint8_images
from dvit_infer.models.example import example_checkpoint

IMAGES, ARCH, MOST_S = 1_000, "dynamicvit-deit-s", 900.0


def main(folder: Path, options: list[str]) -> int:
    images, model = folder / "images", folder / f"{ARCH}.pth"
    images.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        for i, image in enumerate(sample_uint8_images(IMAGES, (224, 224))):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{i:04}.jpg")
        torch.save(example_checkpoint(ARCH), model)
    outs = ["-o", f"{folder}/tuned.safetensors", "--json", f"{folder}/tune.json", "--report", f"{folder}/tune.html"]
    start = time.monotonic()
    command = [sys.executable, "-m", "dvit_infer.cli.tune", str(model), str(images), *outs, *options]
    status = subprocess.run(command, check=False).returncode
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(f"dvit-tune: exit status {status}, {seconds:.0f} s, peak memory {peak:,.0f} MiB")
    return int(seconds > MOST_S or status not in (0, 1))  # 1: random weights need not keep the target


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
