"""Run an exported ONNX model in ONNX Runtime."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.backends.state import Hook, State, follow
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph.heads import Wanted
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.tokens import Tokens
from dvit_infer.images.tensors import normalise
from dvit_infer.models.registry import outline
from dvit_infer.onnx.session import input_dtype, open_session, run_session


class OnnxRunner:
    """Runs an exported file, whose values are named after the graph's nodes.

    A probe, the same model with other inputs and outputs, serves calls with given kept sets, kept sets that are no
    output of the file, and values of nodes. It is made when first needed, and requires the package `onnx`.

    Attributes:
        runtime: a description of what runs the model.
        session: the session of the file.
    """

    def __init__(self, session: Any, path: Path, config: Config, device: torch.device) -> None:
        self.session, self._path, self._config, self._device = session, path, config, device
        self.runtime = f"ONNX Runtime, {session.get_providers()[0].removesuffix('ExecutionProvider')} provider"
        self._dtype = input_dtype(self.session)
        self._kept = [f"kept_{stage}" for stage in range(len(config.reduction.stages))]
        self._has_kept = {value.name for value in self.session.get_outputs()} >= set(self._kept)
        self._probes: dict[tuple[bool, tuple[str, ...]], Any] = {}

    @property
    def buffer_bytes(self) -> int:
        """0: ONNX Runtime does not report it."""
        return 0

    def release(self) -> None:
        """Do nothing: ONNX Runtime manages its own memory."""

    def plain(self) -> "OnnxRunner":
        """Return itself; `run` takes no hook."""
        return self

    def run(
        self,
        images: torch.Tensor,
        given: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_choices: bool = True,
        output: Wanted = "logits",
    ) -> State:
        """Run the model; arguments and result are as for every runner.

        Raises:
            ValueError: `hook` is given (`node_values` shows what is inside), or float images to a file of uint8.
            InputError: features, tokens or a feature map are wanted.
        """
        embeds = output == "features" and not self._config.num_classes  # then they are what the file returns
        if output != "logits" and not embeds:
            raise InputError(f"{output}: {self._path.name} gives logits only; convert the checkpoint to have {output}")
        if hook is not None:
            raise ValueError("hook: ONNX Runtime does not report node outputs; use node_values")
        if given is not None:
            return State(self.node_values(images, given, ())["logits"], choices=list(given))
        inputs = {"images": self.prepare(images)}
        wanted = self._kept if return_choices and self._has_kept else []
        logits, *chosen = run_session(self.session, inputs, ["logits", *wanted], str(self._path))
        if wanted or not return_choices:
            return State(logits, choices=chosen)
        # Logits come from the file itself; only the choices come from the probe.
        names = list(self._choices)
        chosen = run_session(self._probe(False, tuple(names)), inputs, names, str(self._path)) if names else []
        return follow(logits, zip(self._choices.values(), chosen, strict=True))

    @functools.cached_property
    def _choices(self) -> dict[str, Reduce]:
        """The values in the file that state each stage's choice, with its node."""
        nodes = [node for node in outline(self._config).nodes if isinstance(node, Reduce)] if self._kept else []
        return {f"{node.name}/{node.choice_name}": node for node in nodes}

    def node_values(
        self, images: torch.Tensor, kept: Sequence[torch.Tensor], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Return the logits and the named values, with what each stage did given, as the engine returns it."""
        given = {"images": self.prepare(images)}
        tokens = Tokens(images)
        for (name, node), stage in zip(self._choices.items(), kept, strict=False):
            choice = node.choice_of(tokens, stage)
            given[name] = choice.to(self._device)
            node.note(tokens, choice)
        wanted = ["logits", *(name for name in names if name != "logits")]
        found = run_session(self._probe(bool(kept), tuple(wanted[1:])), given, wanted, str(self._path))
        return dict(zip(wanted, found, strict=True))

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return images in the file's input format: normalised in its dtype, or uint8 with channels last."""
        if self._dtype != torch.uint8:
            assert self._dtype is not None
            images = images.to(self._device)
            if images.dtype == torch.uint8:
                images = normalise(images, self._config.mean, self._config.std)
            return images.to(self._dtype).contiguous()
        if images.dtype != torch.uint8:
            raise ValueError(f"images: {str(images.dtype)[6:]}; {self._path.name} takes uint8 images only")
        return images.to(self._device).permute(0, 2, 3, 1).contiguous()

    def _probe(self, given: bool, outputs: tuple[str, ...]) -> Any:
        if (given, outputs) not in self._probes:
            from dvit_infer.onnx.probe import probed

            with probed(self._path, given, outputs) as model:
                self._probes[given, outputs] = open_session(model, self._device, str(self._path))
        return self._probes[given, outputs]
