"""Reductions: which tokens stay, or take the MLPs. One file per method; `METHODS` and `ROUTING` list them.

A method decides; moving tokens is apart from it, in `choices.py` for reference models and in nodes of the graph. A
method is a module with the names of `Method`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from dvit_infer.config import Body, Setting, Stage
from dvit_infer.graph.nodes import Signal
from dvit_infer.graph.reductions import Reduce
from dvit_infer.reduction import evit, predictor, random, route, tome
from dvit_infer.reduction.choices import Assign, Keep, StageInput
from dvit_infer.reduction.settings import Known, Trunk


class Method(Protocol):
    """A method of choosing tokens.

    Attributes:
        SETTINGS: what it can be told, by name.
        KEY: the prefix of its modules' keys in official files; None: it has no weights.
        MERGES: whether it merges tokens; else it drops some.
        EVERY_BLOCK: whether it may act in every block, by its settings; else the caller names the blocks.
    """

    SETTINGS: Mapping[str, Known]
    KEY: str | None
    MERGES: bool
    EVERY_BLOCK: bool

    def why_not(self, settings: Mapping[str, Setting], trunk: Trunk) -> str | None:
        """Return why a model cannot be reduced so, and what would do; None: it can."""

    def stages(self, settings: Mapping[str, Setting], blocks: Sequence[int], num_patches: int) -> tuple[Stage, ...]:
        """Return the stages at these blocks, with the number of patch tokens that each keeps.

        Raises:
            InputError: settings do not fit the blocks.
        """

    def signal(self, settings: Mapping[str, Setting]) -> Signal:
        """Return what the attention before a choice leaves for it."""

    def modules(self, dim: int, settings: Mapping[str, Setting], count: int) -> nn.ModuleList:
        """Return the modules of `count` stages for tokens of `dim` channels, with uninitialised weights."""

    def choose(self, given: StageInput) -> Keep | Assign:
        """Choose tokens in the reference model; this defines the method."""

    def node(
        self,
        stage: int,
        modules: Sequence[nn.Module],
        settings: Mapping[str, Setting],
        num_patches: int,
        **facts: Any,
    ) -> Reduce:
        """Return the node that does the same in a graph; `facts` are the fields of every `Reduce`."""


METHODS: dict[str, Method] = {"predictor": predictor, "evit": evit, "tome": tome, "random": random}
SETTINGS = frozenset(name for method in METHODS.values() for name in method.SETTINGS)
# Of models in which all tokens stay.
ROUTING: dict[str, Method] = {"predictor": route}


def methods_of(model: Body | Trunk) -> dict[str, Method]:
    """Return the methods, by name, that there are for a kind of model."""
    return ROUTING if model.routes else METHODS
