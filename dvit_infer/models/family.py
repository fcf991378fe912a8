"""What the rest of the project needs to know about a family of models: one record, in the family's own folder."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dvit_infer.config import Body, Config
from dvit_infer.graph.nodes import Node
from dvit_infer.models.reading import Reading
from dvit_infer.models.reference import Reference

State = dict[str, torch.Tensor]


class Family(NamedTuple):
    """A family.

    Attributes:
        name: the name in `Config.family`.
        body: the class of `Config.body`.
        archs: the named sizes.
        matches: return whether keys, shapes and stated facts are those of such a checkpoint.
        read: return the config; takes a reading, the requested architecture and the options of `recognise`.
        reference: return the reference model of a config, with uninitialised weights.
        resized: return the weights of a file for the config's image size.
        graph: yield the nodes of a reference model in evaluation, with unchanged weights; nothing is folded yet.
        crop_pct: return the share of an image's shorter side that evaluation keeps; None: images are warped.
        of_reduction: a pattern for the keys of weights that only a reduction has.
        body_of: return the body of a named size.
        in_timm: return timm's dense counterpart, which loads the reference's weights; None: timm has none.
    """

    name: str
    body: type[Body]
    archs: Mapping[str, Any]
    matches: Callable[[Reading], bool]
    read: Callable[[Reading, str | None, Mapping[str, Any]], Config]
    reference: Callable[[Config], Reference]
    resized: Callable[[State, Config], State]
    graph: Callable[[Any, Config], Iterator[Node]]
    crop_pct: Callable[[Config], float | None]
    of_reduction: str = r"score_predictor\."
    body_of: Callable[[str], Body] | None = None
    in_timm: Callable[[Config], nn.Module] | None = None
