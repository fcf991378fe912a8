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
# Builds the model of a config that reduces nothing in its owner's code. Takes the config, the reference's weights, the
# JSON files beside the file, and a function that returns the weights by their names in the file.
Owner = Callable[[Config, State, Mapping[str, Any], Callable[[], State]], nn.Module]


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
        owners: by the name of a package, what builds the model in its code.
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
    owners: Mapping[str, Owner] = {}
