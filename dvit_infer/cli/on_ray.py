"""Shared by the commands that can run on a Ray cluster: the option, and the engines there."""

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dvit_infer.cli.common import Parser, check_interrupt, progress
from dvit_infer.cli.images import engine_options, warn

if TYPE_CHECKING:
    from dvit_infer.serve.ray_stream import EngineStream

_LONG_S = 30.0


def add_ray_option(parser: Parser) -> None:
    """Add --ray, with or without an address."""
    text = "on a Ray cluster: HOST:PORT of its head, or auto; without ADDRESS (then give it last) one is started here"
    parser.add_argument("--ray", metavar="ADDRESS", nargs="?", const="local", help=text)


@contextlib.contextmanager
def on_ray(options: argparse.Namespace, kind: str, batch: int | None, **more: Any) -> "Iterator[EngineStream[Any]]":
    """Connect to a cluster or start one, and load engines there; yield their stream. In the end nothing of it runs.

    Args:
        options: of the command line.
        kind: a name in `dvit.ray`.
        batch: images that run together; None: by the device.
        more: further arguments of that.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or the engine cannot be made.
    """
    from dvit_infer.utils.packages import need

    need("--ray", "ray", extra="dvit-infer[ray]")
    import ray

    from dvit_infer.models.hub import is_hub_name
    from dvit_infer.serve import ray_data
    from dvit_infer.serve.ray_cluster import LOCAL, cluster, decoders_for, engines_for, on_gpus
    from dvit_infer.serve.ray_model import model_files
    from dvit_infer.serve.ray_stream import EngineStream

    here = options.ray == LOCAL
    if here and not is_hub_name(options.model):
        os.stat(options.model)  # before anything is started
    model = options.model if here else model_files(options.model)
    with contextlib.ExitStack() as stack:
        with progress("starting"):
            stack.enter_context(cluster(options.ray))
            nodes = ray.nodes()
            needs = engines_for(nodes, options.device)
            decoders = decoders_for(nodes, needs, options.workers)
            source = model if here else ray.put(model)
            arguments = {"batch": batch, "crop_pct": options.crop_pct, **more, **_on_nodes(options)}
            make = functools.partial(getattr(ray_data, kind), source, **arguments)
            stream: EngineStream[Any] = EngineStream(make, needs, decoders, int(on_gpus(needs)))
            stream.start(_Patience())
        yield stream


def _on_nodes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `convert`, in which paths hold in any folder."""
    chosen = engine_options(options)
    if chosen["calibrate"] is not None:
        chosen["calibrate"] = os.path.abspath(chosen["calibrate"])
    if isinstance((chosen["assume"] or {}).get("head"), str):
        chosen["assume"] = {**chosen["assume"], "head": os.path.abspath(chosen["assume"]["head"])}
    return chosen


class _Patience:
    """Says once that a start takes long; called now and then."""

    def __init__(self) -> None:
        self._since: float | None = time.monotonic()

    def __call__(self) -> None:
        check_interrupt()
        if self._since is not None and time.monotonic() - self._since > _LONG_S:
            warn([f"ray: no engine has started for {_LONG_S:.0f} s: the cluster is busy, or lacks what one needs"])
            self._since = None
