"""Weighted k nearest neighbours by cosine, exact and in blocks (Wu et al. 2018; DINO, Caron et al. 2021)."""

import torch
from torch.nn import functional as F

from dvit_infer.errors import InputError
from dvit_infer.utils.text import plural

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's eval_knn.py
_QUERIES, _OTHERS = 1024, 16384  # rows that are compared at once: 64 MiB of similarities


def check_neighbours(k: int, others: int) -> None:
    """Raise InputError unless k neighbours can be found among so many images."""
    if not 1 <= k <= others:
        remedy = f"at most {others} can be" if others > 0 else "give more images"
        raise InputError(f"knn: {k} neighbours cannot be found among {plural(max(others, 0), 'image')}; {remedy}")


def nearest(features: torch.Tensor, queries: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines of each query's k nearest rows and their places, both (M, k), nearest first.

    Memory beyond arguments and result does not grow with M or N, but for a normalised copy of the arguments.

    Args:
        features: (N, D), the rows among which neighbours are found.
        queries: (M, D); None: every row of `features`, with the others as its neighbours (leave one out).
        k: the number of neighbours.

    Raises:
        InputError: there are fewer rows than neighbours.
    """
    check_neighbours(k, len(features) - (queries is None))
    known = F.normalize(features.float(), dim=1)
    asked = known if queries is None else F.normalize(queries.float(), dim=1)
    found = []
    for first in range(0, len(asked), _QUERIES):
        block = asked[first : first + _QUERIES]
        best, places = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64)
        for start in range(0, len(known), _OTHERS):
            near = block @ known[start : start + _OTHERS].T
            if queries is None:
                near.diagonal(first - start).fill_(-torch.inf)  # empty where the two blocks have no row in common
            values, at = near.topk(min(k, near.shape[1]), dim=1)
            best, places = torch.cat([best, values], dim=1), torch.cat([places, at + start], dim=1)
            best, at = best.topk(min(k, best.shape[1]), dim=1)
            places = places.gather(1, at)
        found.append((best, places))
    cosines, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return cosines, places


def vote(
    features: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor | None = None, k: int = NEIGHBOURS
) -> torch.Tensor:
    """Return the votes of each query's k nearest rows for the classes, (M, K) float32: exp(cosine / 0.07) of each.

    Args:
        labels: (N,) int64, the classes of `features`.
        features, queries, k: as for `nearest`.

    Raises:
        InputError: there are fewer rows than neighbours.
    """
    cosines, places = nearest(features, queries, k)
    votes = torch.zeros(len(places), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[places], (cosines / TEMPERATURE).exp())
