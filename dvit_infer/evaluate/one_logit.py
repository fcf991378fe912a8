"""Models with one logit: class 1 has the probability sigmoid(logit), class 0 the rest."""

import torch

from dvit_infer.config import Config


def class_count(config: Config) -> int:
    """Return the number of classes that a model tells apart: two, if it has one logit."""
    return max(2, config.num_classes)


def as_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return logits of all classes, (B, K); for one logit z, (B, 1), those of classes 0 and 1: 0 and z.

    Their softmax is 1 - sigmoid(z) and sigmoid(z), and class 1 is first where sigmoid(z) is over 0.5.
    """
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)
