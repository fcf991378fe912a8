"""The classes of a model: of one logit, class 1 has the probability sigmoid(logit), class 0 the rest."""

import torch

from dvit_infer.config import Config
from dvit_infer.errors import InputError


def class_count(config: Config) -> int:
    """Return the number of classes that a model tells apart: two, if it has one logit."""
    return max(2, config.num_classes)


def check_classes(config: Config, name: str) -> None:
    """Raise InputError if a model has no classifier: its output is an embedding."""
    if not config.num_classes:
        raise InputError(
            f"{name}: {config.arch} has no classifier, so that there are no classes to predict; engine.features "
            "and dvit-embed give its embedding"
        )


def as_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return logits of all classes, (B, K); for one logit z, (B, 1), those of classes 0 and 1: 0 and z.

    Their softmax is 1 - sigmoid(z) and sigmoid(z), and class 1 is first where sigmoid(z) is over 0.5.
    """
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)
