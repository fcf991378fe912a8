"""Classify a folder of images on a Ray cluster: python examples/ray_classify.py MODEL FOLDER

RAY_ADDRESS names the cluster; without it Ray starts here. Printed is a line of JSON for each image, as by dvit-predict.
"""

import json
import os
import sys

import ray

import dvit_infer as dvit


def classified(model: str, folder: str) -> ray.data.Dataset:
    """Return a dataset of the model's predictions; nothing runs before rows are asked for."""
    cpus = int(ray.cluster_resources()["CPU"])
    weights = dvit.ray.put(model)  # into the object store, once: nodes need not see the file
    files = ray.data.read_binary_files(os.path.abspath(folder), include_paths=True)
    images = files.map_batches(dvit.ray.Decode(model), batch_size=64)  # tasks of their own, wherever a CPU is free
    return images.map_batches(
        dvit.ray.Classify,
        fn_constructor_args=(weights,),
        batch_size=64,
        num_cpus=1 if cpus < 3 else 2,  # or num_gpus=1
        concurrency=max(1, cpus // 3),  # engines; the rest is for decoding
    )


def main(model: str, folder: str) -> None:
    for row in classified(model, folder).iter_rows():
        print(json.dumps({name: value for name, value in row.items() if value is not None}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
