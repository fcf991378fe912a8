"""Find the five images of a folder most like another: python examples/search.py MODEL FOLDER EMBEDDING IMAGE

The features of FOLDER are written to the folder EMBEDDING, and read from it by later searches, which begin at once.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import dvit_infer as dvit
from dvit_infer.images.decode import open_image
from dvit_infer.models.preprocessing import preprocess_for


def main(model: str, folder: str, embedding: str, image: str, count: int = 5) -> None:
    engine = dvit.convert(model)
    dvit.embed(engine, folder, embedding, normalize=True)  # completes what is there, if anything is left to do
    features = np.load(Path(embedding) / "features.npy", mmap_mode="r")  # (images, D), rows of length 1
    paths = [json.loads(line)["image"] for line in (Path(embedding) / "images.jsonl").read_text().splitlines()]

    pixels = torch.from_numpy(preprocess_for(engine.config)(open_image(image)))  # (3, H, W) uint8
    query = engine.features(pixels[None])[0].cpu().numpy()
    cosines = np.nan_to_num(features @ (query / np.linalg.norm(query)), nan=-1)  # NaN: could not be read
    for at in np.argsort(-cosines)[:count]:
        print(f"{cosines[at]:.3f} {paths[at]}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
