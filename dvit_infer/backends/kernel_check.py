"""The first forward of an engine on a GPU finds out whether the kernels answer right there, and remembers that they do.

Two made-up images fill a batch, and every op holds its kernel's result against plain PyTorch's (ops/fallback.py). What
passed is remembered in the user's cache folder, one small file for each GPU, driver, torch, Triton, version of the
project and set of kernels: the size of a batch is part of that, as tiles depend on it.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton

import dvit_infer
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.ops.choices import choices_for
from dvit_infer.ops.fallback import checking, replaced
from dvit_infer.utils.files import atomic_write_json, cache_folder


def check_kernels(
    graph: Graph, batch: int, uint8: bool, programmatic: bool, forward: Callable[[torch.Tensor], object]
) -> None:
    """Run `forward` on made-up images with every op checked, unless that is known to pass.

    Args:
        graph: what it runs.
        batch: images of a batch, at least 1.
        uint8: whether they are bytes.
        programmatic: whether launches are programmatic dependent ones.
        forward: takes (batch, 3, H, W) on the graph's device, as an engine would be given them.
    """
    marker = _folder() / f"{_name(graph, batch, uint8, programmatic)}.json"
    if marker.exists():
        return
    with checking():
        forward(_made_up(graph, batch, uint8))
    if not replaced(graph.device):
        _remember(marker, graph.device)


def _made_up(graph: Graph, batch: int, uint8: bool) -> torch.Tensor:
    """Two images of noise in turn, on the graph's device in its dtype or in bytes."""
    noise = torch.randn(2, 3, *graph.config.image_size, generator=torch.Generator().manual_seed(0))
    pair = (noise * 60 + 120).clamp(0, 255).to(torch.uint8) if uint8 else noise.to(graph.dtype)
    return pair.to(graph.device).repeat((batch + 1) // 2, 1, 1, 1)[:batch]


def _folder() -> Path:
    return cache_folder() / "kernels"


def _name(graph: Graph, batch: int, uint8: bool, programmatic: bool) -> str:
    """A name for all that decides which kernels run, and what runs them."""
    facts = [
        *_system(graph.device).values(),
        *(str(graph.dtype), batch, uint8, programmatic),
        [(node.kind, node.in_shape, node.out_shape) for node in graph.nodes],
        graph.config.num_heads,
        [dict(row) for row in choices_for(graph.device).rows],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@cache
def _system(device: torch.device) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dvit_infer": f"{dvit_infer.__version__} {_kernels()}",
    }


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):  # no such file outside Linux; PyTorch knows the version of the driver's interface
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "")())


def _kernels() -> str:
    """A digest of the kernels' source: in a checkout it changes and the version does not."""
    import dvit_kernels

    digest = hashlib.sha256()
    for path in sorted(Path(dvit_kernels.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _remember(marker: Path, device: torch.device) -> None:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(marker, _system(device))
    except (OSError, InputError):  # a home that cannot be written: the next process checks again
        return
