"""The graph: its nodes in execution order, their totals, their table."""

from dataclasses import dataclass, replace

import torch

from dvit_infer.config import Config
from dvit_infer.graph.nodes import Node
from dvit_infer.graph.saving import saved_macs
from dvit_infer.utils.tables import table


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order. `print()` shows them as a table."""

    config: Config
    nodes: tuple[Node, ...]
    runtime: str = ""  # a description of what runs the graph, for the table

    @property
    def macs(self) -> int:
        """The number of MACs for one image."""
        return sum(node.macs for node in self.nodes)

    @property
    def gmacs(self) -> float:
        """MACs for one image in 10^9, which papers call GFLOPs."""
        return self.macs / 1e9

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(iter(self.nodes[0].weights.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights; packed predictors keep some in float32."""
        return next(iter(self.nodes[0].weights.values())).dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "Graph":
        """Return a copy with its own weights on `device`, in `dtype`; those of a reduction keep their dtypes."""
        moved: dict[int, torch.Tensor] = {}
        nodes = []
        for node in self.nodes:
            here = node.to(device, dtype)
            common = {n: moved.setdefault(id(w), here.weights[n]) for n, w in node.weights.items() if n in node.shared}
            nodes.append(replace(here, weights={**here.weights, **common}) if common else here)
        return replace(self, nodes=tuple(nodes))

    @property
    def weight_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for node in self.nodes for w in node.weights.values())

    @property
    def is_forgotten(self) -> bool:
        """Whether some of its weights have shapes only."""
        return any(w.is_meta for node in self.nodes for w in node.weights.values())

    def forget(self) -> None:
        """Replace its weights by their shapes (device meta), in place: whoever reads it has a copy of them."""
        for node in self.nodes:
            node.weights.update({name: w.to("meta") for name, w in node.weights.items()})

    def __str__(self) -> str:
        c = self.config
        rows, total_bytes = [], 0
        for i, node in enumerate(self.nodes):
            moved, saves = node.bytes_moved(1, self.dtype.itemsize), saved_macs(self.nodes, i)
            total_bytes += moved
            shapes = ("x".join(map(str, shape)) for shape in (node.in_shape, node.out_shape))
            saved = "" if saves is None else f"{saves / 1e6:.1f}"
            numbers = f"{node.macs / 1e6:.1f}", saved, f"{moved / 1024:.0f}"
            rows.append((node.name, node.kind, *shapes, *numbers, ", ".join(node.folded)))
        total = ("total", "", "", "", f"{self.macs / 1e6:.1f}", "", f"{total_bytes / 1024:.0f}", "for one image")
        title = f"{c.arch}, {c.image_size[0]}x{c.image_size[1]}, {c.reduction}"
        columns = ("node", "kind", "in", "out", ">10^6 MACs", ">saves", ">KiB moved", "folded")
        shown = table(columns, rows, title=title, total=total)
        return f"{shown}\nrun by {self.runtime}" if self.runtime else shown
