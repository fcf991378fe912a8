"""Embed a collection of images: their features in a folder that an interrupted run resumes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dvit_infer.classifier import Classifier
from dvit_infer.errors import InputError
from dvit_infer.evaluate.embedding_folder import Index, embedding_folder, read_index
from dvit_infer.evaluate.features import Embedder, Rates, Rows
from dvit_infer.evaluate.predictions import model_id
from dvit_infer.images.archives import find_entries
from dvit_infer.images.entry import Entry
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import running
from dvit_infer.utils.files import check_output_folder

STORES = ("float32", "float16")


@dataclass(frozen=True)
class Embedding:
    """The outcome of `embed`.

    Attributes:
        path: the folder.
        index: the facts on which the rows depend.
        images: the number of images, and of rows.
        resumed: rows that were there before.
        failed: images without features, with their reasons; their rows are NaN.
        rates: of this run; of no image if nothing was left to do.
    """

    path: Path
    index: Index
    images: int
    resumed: int
    failed: tuple[tuple[str, str], ...]
    rates: Rates


def embed(
    engine: Classifier,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    pool: str = "own",
    normalize: bool = False,
    store: str = "float32",
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Embedding:
    """Write the features of images to the folder `out`; a folder that is there is completed.

    `features.npy` is (images, D), row i of the image in line i of `images.jsonl`, in the order of `find_entries`;
    `index.json` says of what they are. An image that cannot be read has a row of NaN and an `error` in its line. A run
    that was killed and started again writes the same bytes as one that was not. Images that are named behind all others
    are added to a folder that is complete.

    Args:
        engine: the model.
        images: files, folders, archives or patterns.
        out: the folder.
        pool: "own": `engine.features`; "cls", "mean", "cls_mean" or "map", as `features.POOLS` describes.
        normalize: whether every row has length 1.
        store: dtype of the file, "float32" or "float16".
        batch: images at a time; None: as in the folder, else 256 on CUDA, 16 on a CPU.
        preprocess: None: `preprocess_for`, as the model was evaluated.
        workers: processes that decode; 0: none; None: one less than processors, at most 8.
        progress: called with the number of images done since the last call, at first those that were there.

    Raises:
        InputError: There is no image; the folder is of another model, other settings or other images, or holds
            something else; the disk has no room; or an argument is out of range.
    """
    names = [str(images)] if isinstance(images, str | Path) else [str(one) for one in images]
    find_entries(names)
    chosen = batch_for(out, batch, store)
    embedder = Embedder(engine, chosen, pool, normalize, preprocess, workers)
    return write_rows(embedder, index_of(embedder, store), names, out, progress)


def batch_for(out: str | Path, batch: int | None, store: str) -> int | None:
    """Return the batch size for a folder: as given, else as in the folder; None if that has none yet.

    Raises:
        InputError: The folder holds something else or cannot be written, or `store` is not one of `STORES`.
    """
    if store not in STORES:
        raise InputError(f"store: {store!r} is not one of {', '.join(STORES)}")
    there = read_index(check_output_folder(out, "out"))
    return there.batch if batch is None and there is not None else batch


class RowStream(Protocol):
    """Gives the features of images: an `Embedder`, or several of them on a cluster."""

    @property
    def rates(self) -> Rates:
        """Of all streams so far."""

    def __call__(self, entries: Iterable[Entry], /) -> Iterator[Rows]:
        """Yield the features of images in order, batch by batch."""


def write_rows(
    stream: RowStream, index: Index, names: Sequence[str], out: str | Path, progress: Callable[[int], None]
) -> Embedding:
    """Write what a stream gives for images to a folder, as `embed` describes.

    Args:
        stream: gives rows in batches of `index.batch`.
        index: the facts on which the rows depend.
        names: files, folders, archives or patterns.
        out: the folder.
        progress: as for `embed`.

    Raises:
        InputError: As for `embed`.
    """
    count = sum(1 for _ in find_entries(names))
    with embedding_folder(out, index, count, find_entries(names)) as (folder, left):
        resumed = folder.done
        progress(resumed)
        with running(index.batch):  # here too: a worker that is killed is an error wherever this process is
            for rows in stream(left) if resumed < count else ():
                if folder.done + len(rows.images) > count:
                    raise InputError(f"{names[0]}: images were added while they were read; run it again")
                folder.append(*_stored(rows, index.dtype))
                progress(len(rows.images))
        if folder.done < count:
            raise InputError(f"{names[0]}: images were removed while they were read; run it again")
    return Embedding(folder.path, index, count, resumed, tuple(folder.failed), stream.rates)


def index_of(embedder: Embedder, store: str) -> Index:
    """Return the facts on which the rows of an embedder depend, stored in a dtype of `STORES`."""
    config = embedder.engine.config
    return Index(
        model=model_id(embedder.engine, None, embedder.preprocess),
        arch=config.arch,
        reduction=str(config.reduction),
        precision=embedder.engine.precision,
        preprocess=str(embedder.preprocess),
        mean=tuple(config.mean),
        std=tuple(config.std),
        pool=embedder.pool,
        normalize=embedder.normalize,
        dtype=store,
        dim=embedder.dim,
        batch=embedder.batch,
    )


def _stored(rows: Rows, store: str) -> tuple[np.ndarray, list[tuple[str, str | None]]]:
    """Return the rows in the dtype of the file, and each image with its error; what float16 cannot hold is one."""
    with np.errstate(over="ignore"):
        features = rows.features.astype(store)
    errors = list(rows.errors)
    for at in np.flatnonzero(~np.isfinite(features).all(axis=1)):
        features[at] = np.nan
        errors[at] = errors[at] or f"a feature is over {store}'s range; float32 holds it"
    return features, [(image.path, why) for image, why in zip(rows.images, errors, strict=True)]
