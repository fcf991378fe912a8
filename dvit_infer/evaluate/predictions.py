"""Predictions: the five likeliest classes of every image of a stream, and the patches that were kept."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from dvit_infer.classifier import Classifier, Source
from dvit_infer.images.preprocess import Preprocess, preprocess_for
from dvit_infer.images.stream import Decoded, Entry, batch_size, batches, decode, pixels, running

TOP = 5
VERSION = 1  # of answers: another one where the same model may say something else of the same image
_IN_NAME_ONLY = ("arch", "weights", "crop_pct")  # facts of a config that no answer depends on, given the preprocessing


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        image: its path, as it was found.
        top: class and probability of the likeliest `TOP` (or all, of fewer) classes, the likeliest first.
        kept: a stage each, original patch positions, ascending; None: they were not asked for.
        error: why there is no answer; None if there is one.
    """

    image: str
    top: tuple[tuple[int, float], ...] = ()
    kept: tuple[tuple[int, ...], ...] | None = None
    error: str | None = None

    def line(self, model: str, labels: Mapping[int, str] | None = None) -> str:
        """One line of JSON, in ASCII: a name that is not UTF-8 survives as lone surrogates (`os.fsencode` undoes it).

        Args:
            model: what gave the answer (`model_id`).
            labels: names of classes; if given, every class has a label, null where it has no name.
        """
        start = {"image": self.image, "model": model}
        if self.error is not None:
            return json.dumps({**start, "error": self.error})
        top = [
            {"class": index, **({} if labels is None else {"label": labels.get(index)}), "probability": probability}
            for index, probability in self.top
        ]
        return json.dumps({**start, "top5": top, **({} if self.kept is None else {"kept": self.kept})})


def model_id(engine: Classifier, source: Source, preprocess: Preprocess) -> str:
    """`<arch>@<8 hexadecimal digits>`, a digest of all that answers depend on: weights, config, dtype, preprocessing,
    and this project's `VERSION`.


    A checkpoint and the file that was saved from it have the same. The device is not in it: it changes only rounding.
    """
    facts = {name: fact for name, fact in asdict(engine.config).items() if name not in _IN_NAME_ONLY}
    said = [VERSION, facts, str(engine.dtype), asdict(preprocess)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for part in engine.digest(source):
        digest.update(part)
    return f"{engine.config.arch}@{digest.hexdigest()[:8]}"


def predict(
    engine: Classifier,
    paths: Iterable[str],
    *,
    kept: bool = False,
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
) -> Iterator[list[Prediction]]:
    """Classify images: one list a batch, in their order. Nothing grows with their number.

    Args:
        paths: of images (`find_images`); may be endless.
        kept: return the kept patches too.
        batch: images at a time; None: 256 on CUDA, 16 on a CPU.
        preprocess: None: as the model's family was evaluated (`preprocess_for`).
        workers: processes that decode; 0: none; None: one a processor but one, at most 8.

    Raises:
        InputError: batch or workers are out of range; a batch does not fit in memory.
    """
    batch = batch_size(batch, engine.device)
    stream = decode(map(Entry, paths), preprocess or preprocess_for(engine.config), workers)
    groups = batches(stream, batch)
    while True:
        with running(batch):  # not around the yield: what the caller does is none of its business
            group = next(groups, None)
            answers = None if group is None else _answers(engine, group, kept)
        if answers is None:
            return
        yield answers


def _answers(engine: Classifier, group: Sequence[Decoded], kept: bool) -> list[Prediction]:
    images = pixels(group)
    answered = iter(()) if images is None else _classified(engine, [p.path for p in group if not p.error], images, kept)
    return [Prediction(p.path, error=p.error) if p.error else next(answered) for p in group]


def _classified(engine: Classifier, paths: Sequence[str], images: torch.Tensor, kept: bool) -> Iterator[Prediction]:
    logits, chosen = engine(images, return_kept=True) if kept else (engine(images), [])
    finite = torch.isfinite(logits).all(dim=1).tolist()
    best = logits.cpu().softmax(dim=1).topk(min(TOP, logits.shape[1]))
    stages = [stage.tolist() for stage in chosen]
    answers = zip(paths, finite, best.indices.tolist(), best.values.tolist(), strict=True)
    for row, (path, is_finite, classes, probabilities) in enumerate(answers):
        if not is_finite:
            yield Prediction(path, error=f"the model's answer in {str(engine.dtype)[6:]} is NaN or Inf")
            continue
        top = tuple((index, round(share, 6)) for index, share in zip(classes, probabilities, strict=True))
        yield Prediction(path, top, tuple(tuple(stage[row]) for stage in stages) if kept else None)
