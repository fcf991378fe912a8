"""Classify the images of a folder: python examples/classify_folder.py MODEL FOLDER

MODEL is a checkpoint or a saved file. A file that cannot be read is named, and the others are classified.
"""

import sys
from collections import Counter

import dvit_infer as dvit
from dvit_infer.evaluate.predictions import predict
from dvit_infer.images.archives import find_entries


def main(model: str, folder: str) -> None:
    engine = dvit.convert(model)
    names = engine.labels or {}  # those in the file, if there are any
    counts: Counter[str] = Counter()
    for batch in predict(engine, find_entries([folder])):  # decoded by other processes, a batch ahead
        for image in batch:
            if image.error is not None:
                print(f"{image.image}: {image.error}")
                continue
            best, probability = image.top[0]  # of five
            name = names.get(best, f"class {best}")
            counts[name] += 1
            print(f"{image.image}: {name}, {probability:.1%}")
    print(", ".join(f"{count} x {name}" for name, count in counts.most_common()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
