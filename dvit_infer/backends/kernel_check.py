"""Check the kernels at the first forward of an engine on a GPU, and record that they passed.

Two random images are repeated to fill a batch, and every op compares its kernel's result with plain PyTorch's
(ops/fallback.py). A pass is recorded in the user's cache folder, in one small file per GPU, driver, torch, Triton,
version of the project and set of kernels. The batch size is part of that, as tiles depend on it.
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

# Fields of nodes that decide which kernels run.
_DECIDE = ("num_heads", "num_prefix", "num_keep", "act", "gated", "has_inner_norm")


def check_kernels(
    graph: Graph, batch: int, uint8: bool, programmatic: bool, forward: Callable[[torch.Tensor], object]
) -> None:
    """Run `forward` on random images with every op checked, unless a pass is on record.

    Args:
        graph: the graph that it runs.
        batch: the number of images, at least 1.
        uint8: whether the images are uint8.
        programmatic: whether launches are programmatic dependent ones.
        forward: takes (batch, 3, H, W) on the graph's device.
    """
    marker = _folder() / f"{_name(graph, batch, uint8, programmatic)}.json"
    if marker.exists():
        return
    with checking():
        forward(_made_up(graph, batch, uint8))
    if not replaced(graph.device):
        _remember(marker, graph.device)


def _made_up(graph: Graph, batch: int, uint8: bool) -> torch.Tensor:
    """Return two images of noise, repeated, on the graph's device in its dtype or in uint8."""
    noise = torch.randn(2, 3, *graph.config.image_size, generator=torch.Generator().manual_seed(0))
    pair = (noise * 60 + 120).clamp(0, 255).to(torch.uint8) if uint8 else noise.to(graph.dtype)
    return pair.to(graph.device).repeat((batch + 1) // 2, 1, 1, 1)[:batch]


def _folder() -> Path:
    return cache_folder() / "kernels"


def _name(graph: Graph, batch: int, uint8: bool, programmatic: bool) -> str:
    """Return a digest of all facts that decide which kernels run, and of the system."""
    facts = [
        *_system(graph.device).values(),
        *(str(graph.dtype), batch, uint8, programmatic),
        [(type(node).__qualname__, node.in_shape, node.out_shape, sorted(node.weights)) for node in graph.nodes],
        [[getattr(node, fact, None) for fact in _DECIDE] for node in graph.nodes],
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
    except (OSError, IndexError):  # no such file outside Linux; PyTorch knows the version of the driver API
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "")())


def _kernels() -> str:
    """Return a digest of the kernels' source, which in a checkout changes without the version."""
    import dvit_kernels

    digest = hashlib.sha256()
    for path in sorted(Path(dvit_kernels.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _remember(marker: Path, device: torch.device) -> None:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(marker, _system(device))
    except (OSError, InputError):  # the home folder is not writable: the next process checks again
        return
