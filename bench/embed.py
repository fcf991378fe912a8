"""Time dvit-embed against its two halves: how much of the slower one is left when both run side by side.

    python bench/embed.py                          # DeiT-S, random weights, 500 made-up JPEG files
    python bench/embed.py --images 2000 --rounds 5 --model vit.safetensors

Every round decodes all images (as dvit-embed does, no model), embeds their pixels from main memory (no decoding), and
does both by `dvit.embed`; the ratio is taken within a round. Where decoding and model share the same cores, the halves
cannot overlap by more than the cores allow, so that `pipeline` is given too: the rate over that of the slower half
while both ran.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dvit_infer as dvit
from dvit_infer.benchmark.results import machine_name
from dvit_infer.evaluate.features import pooled
from dvit_infer.images.entry import Entry
from dvit_infer.images.find import find_images
from dvit_infer.images.stream import batch_size, decode, worker_count
from dvit_infer.models.example import example_checkpoint
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.utils.devices import timed
from dvit_infer.utils.tables import table

SIZE = 500, 375  # of most photos in ImageNet


def write_images(folder: Path, count: int) -> None:
    """Write JPEG files with as much detail as a photo: about 65 KB each."""
    folder.mkdir()
    for seed in range(count):
        random = np.random.default_rng(seed)
        smooth = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(SIZE)
        noisy = np.asarray(smooth, np.int16) + random.integers(-12, 13, (SIZE[1], SIZE[0], 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{seed:05}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: DeiT-S with random weights")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--dtype")
    options = parser.parse_args()
    engine = dvit.convert(options.model or example_checkpoint("deit-s"), dtype=options.dtype)
    batch, workers = batch_size(options.batch, engine.device), worker_count(options.workers)
    preprocess = preprocess_for(engine.config)
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        write_images(folder := Path(temporary, "images"), options.images)
        entries = [Entry(path) for path in find_images([str(folder)])]
        pixels = torch.stack([torch.from_numpy(one.pixels) for one in decode(entries[:batch], preprocess, workers)])
        pooled(engine, pixels, "own", False)
        for number in range(options.rounds):
            start = time.perf_counter()
            decoded = sum(image.error is None for image in decode(entries, preprocess, workers, batch))
            decode_rate = decoded / (time.perf_counter() - start)
            times = [timed(lambda: pooled(engine, pixels, "own", False).cpu(), engine.device)[1]
                     for _ in range(max(1, options.images // batch))]  # fmt: skip
            model_rate = len(pixels) * len(times) / sum(times)
            found = dvit.embed(engine, str(folder), Path(temporary, f"{number}"), batch=batch, workers=workers)
            both, beside = found.rates, min(found.rates.decode_images_per_s, found.rates.model_images_per_s)
            alone = min(decode_rate, model_rate)
            rounds.append(
                (decode_rate, model_rate, both.images_per_s, both.images_per_s / alone, both.images_per_s / beside)
            )
    print(f"{engine.config.arch}, {engine.precision} on {machine_name(None)}, {engine.runner.runtime}; batch {batch}, "
          f"{workers} workers, {options.images} images of {SIZE[0]}x{SIZE[1]}; images/s")  # fmt: skip
    columns = ("round", ">decoding alone", ">model alone", ">dvit-embed", ">of the slower", ">pipeline")
    lines = [(f"{n}", *(f"{x:.1f}" for x in r[:3]), *(f"{x:.1%}" for x in r[3:])) for n, r in enumerate(rounds)]
    middle = [statistics.median(column) for column in zip(*rounds, strict=True)]
    print(table(columns, lines, total=("median", *(f"{x:.1f}" for x in middle[:3]), *(f"{x:.1%}" for x in middle[3:]))))


if __name__ == "__main__":
    main()
