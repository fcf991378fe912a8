"""Predictions for a stream of images: the top five classes and the kept patches."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from dvit_infer.classifier import Classifier
from dvit_infer.evaluate.one_logit import as_classes, check_classes
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.images.stream import Decoded, Entry, batch_size, batches, decode, pixels, running
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.preprocessing import preprocess_for

TOP = 5
VERSION = 2  # of predictions; increased when the same model may give a different output for the same image
# Config fields that do not affect outputs, given the preprocessing.
_IN_NAME_ONLY = ("arch", "weights", "crop_pct", "crop_mode", "interpolation", "assumed")
_FIRST = ("num_prefix", "stem_dim", "skip_lam")  # optional facts of a body that ids have always held


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image.

    Attributes:
        image: the path, as found.
        top: class and probability of the `TOP` most likely classes (or all, if fewer), most likely first.
        kept: for each stage, original patch positions, ascending; of a stage that merges, for every patch the lowest
            one of the group that holds it; None: not requested.
        error: the reason if there is no prediction, else None.
    """

    image: str
    top: tuple[tuple[int, float], ...] = ()
    kept: tuple[tuple[int, ...], ...] | None = None
    error: str | None = None

    def line(self, model: str, labels: Mapping[int, str] | None = None) -> str:
        """Return the `record` as one line of JSON, in ASCII.

        A non-UTF-8 name becomes lone surrogates (`os.fsencode` undoes it).
        """
        return json.dumps(self.record(model, labels))

    def record(self, model: str, labels: Mapping[int, str] | None = None) -> dict[str, Any]:
        """Return what the line of an image holds.

        Args:
            model: the `model_id`.
            labels: class names; if given, every class gets a label, None if it has no name.
        """
        start = {"image": self.image, "model": model}
        if self.error is not None:
            return {**start, "error": self.error}
        top = [
            {"class": index, **({} if labels is None else {"label": labels.get(index)}), "probability": probability}
            for index, probability in self.top
        ]
        return {**start, "top5": top, **({} if self.kept is None else {"kept": self.kept})}


def model_id(engine: Classifier, source: Source | None, preprocess: Preprocess) -> str:
    """Return `<arch>@<8 hexadecimal digits>`, a digest of everything that affects predictions.

    That is weights, config, dtype, preprocessing and `VERSION`. A checkpoint and the file saved from it have the same
    id. The device is excluded, as it changes only rounding. Without a source, the engine reads its own again.
    """
    facts = {name: fact for name, fact in asdict(engine.config).items() if name not in _IN_NAME_ONLY}
    # What a model does not have is left out, so that ids stay as they were before a family could have it.
    later = {f.name: f.default for f in fields(engine.config.body) if f.name not in _FIRST}
    if not engine.config.ranges:
        del facts["ranges"]
    for reduction in ("reduction", "learned"):
        del facts[reduction]["merges"]  # its method says so
    facts["body"] = {name: fact for name, fact in facts["body"].items() if name not in later or fact != later[name]}
    content = [VERSION, facts, f"torch.{engine.precision}", _prepared(preprocess)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for part in engine.digest(source):
        digest.update(part)
    return f"{engine.config.arch}@{digest.hexdigest()[:8]}"


def _prepared(preprocess: Preprocess) -> dict[str, Any]:
    """Return the facts of preprocessing, such that ids stay as they were before it had a crop mode and a filter."""
    whole = preprocess.warp and preprocess.crop_pct == 1
    facts = {**asdict(preprocess), "warp": preprocess.warp, "crop_pct": 0.875 if whole else preprocess.crop_pct}
    usual = {"crop_mode": "squash" if whole else "center", "interpolation": "bicubic"}
    return {what: value for what, value in facts.items() if value != usual.get(what)}


def predict(
    engine: Classifier,
    images: Iterable[str | Entry],
    *,
    kept: bool = False,
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
) -> Iterator[list[Prediction]]:
    """Classify images in order; yield one list per batch. Memory does not grow with their number.

    Args:
        images: paths, or images in files and archives (`find_entries`); may be endless.
        kept: also return the kept patches.
        batch: images at a time; None: 256 on CUDA, 16 on a CPU.
        preprocess: None: `preprocess_for`, as the model's family was evaluated.
        workers: processes that decode; 0: none; None: one less than processors, at most 8.

    Raises:
        InputError: `batch` or `workers` is out of range, or a batch does not fit in memory.
    """
    check_classes(engine.config, "engine")
    batch = batch_size(batch, engine.device)
    entries = (Entry(image) if isinstance(image, str) else image for image in images)
    stream = decode(entries, preprocess or preprocess_for(engine.config), workers, batch)
    groups = batches(stream, batch)
    while True:
        with running(batch):  # not around the yield: errors of the caller must pass unchanged
            group = next(groups, None)
            predictions = None if group is None else classify(engine, group, kept)
        if predictions is None:
            return
        yield predictions


def classify(engine: Classifier, group: Sequence[Decoded], kept: bool = False) -> list[Prediction]:
    """Return the predictions for a batch of images, in their order; `kept`: with the kept patches."""
    images = pixels(group)
    readable = [image.path for image in group if not image.error]
    classified = iter(()) if images is None else _classified(engine, readable, images, kept)
    return [Prediction(p.path, error=p.error) if p.error else next(classified) for p in group]


def _classified(engine: Classifier, paths: Sequence[str], images: torch.Tensor, kept: bool) -> Iterator[Prediction]:
    logits, chosen = engine(images, return_kept=True) if kept else (engine(images), None)
    return predictions_of(logits, paths, engine.precision, chosen)


def predictions_of(
    logits: torch.Tensor, paths: Sequence[str], precision: str, kept: Sequence[torch.Tensor] | None = None
) -> Iterator[Prediction]:
    """Yield the prediction for each image from a model's output.

    Args:
        logits: (B, K) on any device.
        paths: the names of the B images.
        precision: the engine's, named if an output is NaN or Inf.
        kept: as the engine returns them, one tensor a stage; None: not requested.
    """
    finite = torch.isfinite(logits).all(dim=1).tolist()
    logits = as_classes(logits.cpu())
    best = logits.softmax(dim=1).topk(min(TOP, logits.shape[1]))
    stages = None if kept is None else [stage.tolist() for stage in kept]
    predictions = zip(paths, finite, best.indices.tolist(), best.values.tolist(), strict=True)
    for row, (path, is_finite, classes, probabilities) in enumerate(predictions):
        if not is_finite:
            yield Prediction(path, error=f"the model's output in {precision} is NaN or Inf")
            continue
        top = tuple((index, round(share, 6)) for index, share in zip(classes, probabilities, strict=True))
        yield Prediction(path, top, None if stages is None else tuple(tuple(stage[row]) for stage in stages))
