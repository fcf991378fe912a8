"""ONNX Runtime runs a model: sessions, and a runner for the files that the ONNX backend writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.images import normalise
from dvit_infer.packages import need

EXTRA = "dvit-infer[onnx]"
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
_DTYPES = {"float": torch.float32, "float16": torch.float16, "uint8": torch.uint8, "int64": torch.int64}


def open_session(model: Path | bytes, device: torch.device, name: str, level: str = LEVELS[-1]) -> Any:
    """An `onnxruntime.InferenceSession` with as many threads as PyTorch has.

    Args:
        model: the file, or what would be in it.
        device: a CPU, or a CUDA device, for which the CUDA provider is asked for.
        name: for messages.
        level: of graph optimisation, one of `LEVELS`.

    Raises:
        InputError: naming it: ONNX Runtime is not installed, has no CUDA provider, or cannot run this.
    """
    need(name, "onnxruntime", extra=EXTRA)
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise InputError(
                f"device: this onnxruntime has no CUDA provider; '{EXTRA[:-1]}-gpu]' would, or --device cpu"
            )
        # TF32 is not float32: it would keep other tokens.
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}))
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # of many kinds, which have no common base
        if found := re.search(r'External data path does not exist: "?([^"]+)', str(error)):
            raise InputError(f"{name}: its weights are in {Path(found[1]).name}, which is not beside it") from None
        reason = _reason(error).removeprefix(f"Load model from {name} failed:")
        raise InputError(f"{name}: ONNX Runtime cannot load it: {reason}") from None


def input_dtype(session: Any) -> torch.dtype | None:
    """Of the first input; None for one that no pictures come in."""
    return _dtype(session.get_inputs()[0])


def run_session(session: Any, given: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> list[torch.Tensor]:
    """Run a session: inputs by name, outputs in the order asked for, all on the inputs' device.

    On CUDA inputs are bound where they are, and outputs stay there (IO binding).

    Raises:
        InputError: an input is of a wrong shape or dtype, say.
        MemoryError: there is too little of it.
    """
    device = next(iter(given.values())).device
    try:
        if device.type == "cpu":
            found = session.run(list(wanted), {name: tensor.numpy() for name, tensor in given.items()})
            return [torch.from_numpy(np.asarray(array)) for array in found]
        torch.cuda.synchronize(device)  # ONNX Runtime has a stream of its own
        return run_bound(session, given, wanted)
    except Exception as error:  # of many kinds, which have no common base
        if "allocate" in str(error):
            raise MemoryError(_reason(error)) from None
        raise InputError(f"images: ONNX Runtime: {_reason(error)}") from None


def run_bound(session: Any, given: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> list[torch.Tensor]:
    """`run_session` by IO binding: tensors are read and written where they are, on whatever device."""
    device = next(iter(given.values())).device
    binding = session.io_binding()
    where = device.type, device.index or 0
    for name, tensor in given.items():
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        binding.bind_input(name, *where, kind, tuple(tensor.shape), tensor.data_ptr())
    batch = next(iter(given.values())).shape[0]
    outputs = {}
    for value in session.get_outputs():
        if value.name in wanted:
            shape = [size if isinstance(size, int) else batch for size in value.shape]
            outputs[value.name] = torch.empty(shape, dtype=_dtype(value), device=device)
            kind = np.dtype(str(outputs[value.name].dtype).removeprefix("torch."))
            binding.bind_output(value.name, *where, kind, tuple(shape), outputs[value.name].data_ptr())
    session.run_with_iobinding(binding)
    return [outputs[name] for name in wanted]


def _dtype(value: Any) -> torch.dtype | None:
    return _DTYPES.get(value.type.removeprefix("tensor(").removesuffix(")"))


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, in one line, without its prefixes `[ONNXRuntimeError] : 1 : FAIL : `."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix("[ONNXRuntimeError] : ").split(" : ", 2)[-1]


class OnnxRunner:
    """Runs a file that the ONNX backend wrote; its values are named after the graph's nodes.

    Kept sets that are given, or asked for where the file has no output for them, and values of nodes come from a probe:
    the same model with other inputs and outputs, made the first time it is needed (for which `onnx` is needed).

    Attributes:
        how: what runs it, in words.
        session: that of the file.
    """

    def __init__(self, session: Any, path: Path, config: Config, device: torch.device) -> None:
        self.session, self._path, self._config, self._device = session, path, config, device
        self.how = f"ONNX Runtime, {session.get_providers()[0].removesuffix('ExecutionProvider')} provider"
        self._dtype = input_dtype(self.session)
        self._kept = [f"kept_{stage}" for stage in range(len(config.num_keep))]
        self._has_kept = {value.name for value in self.session.get_outputs()} >= set(self._kept)
        self._probes: dict[tuple[bool, tuple[str, ...]], Any] = {}

    @property
    def own_bytes(self) -> int:
        """Unknown: ONNX Runtime does not tell."""
        return 0

    def release(self) -> None:
        """Give back memory that calls have left to the next; it is ONNX Runtime's."""

    def __call__(
        self,
        images: torch.Tensor,
        kept: Sequence[torch.Tensor] | None = None,
        watch: Any = None,
        return_kept: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, K) float32 and kept original positions, a stage each; arguments as every runner's.

        Raises:
            ValueError: `watch` is given (`node_values` shows what is inside), or float pictures to a file of uint8.
        """
        if watch is not None:
            raise ValueError("watch: ONNX Runtime calls nobody on its way; node_values does it")
        given = {"images": self.prepare(images)}
        if kept is None and (self._has_kept or not return_kept or not self._kept):
            wanted = self._kept if return_kept else []
            logits, *chosen = run_session(self.session, given, ["logits", *wanted])
            return logits, chosen
        if kept is not None:
            return self.node_values(images, kept, ())["logits"], list(kept)
        names = [f"prune.{stage}/index" for stage in range(len(self._kept))]
        logits, *chosen = run_session(self._probe(False, tuple(names)), given, ["logits", *names])
        for stage in range(1, len(chosen)):
            chosen[stage] = chosen[stage - 1].gather(1, chosen[stage])
        return logits, chosen

    def node_values(
        self, images: torch.Tensor, kept: Sequence[torch.Tensor], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The logits and the named values, with the kept sets given: original positions, a stage each."""
        given = {"images": self.prepare(images)}
        before: torch.Tensor | None = None
        for stage, positions in enumerate(kept):
            index = positions if before is None else torch.searchsorted(before, positions)
            given[f"prune.{stage}/index"], before = index.to(self._device), positions
        wanted = ["logits", *(name for name in names if name != "logits")]
        found = run_session(self._probe(bool(kept), tuple(wanted[1:])), given, wanted)
        return dict(zip(wanted, found, strict=True))

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures as the file wants them: normalised in its dtype, or uint8 with the channels last."""
        if self._dtype != torch.uint8:
            assert self._dtype is not None
            images = images.to(self._device)
            if images.dtype == torch.uint8:
                images = normalise(images, self._config.mean, self._config.std)
            return images.to(self._dtype).contiguous()
        if images.dtype != torch.uint8:
            raise ValueError(f"images: {str(images.dtype)[6:]}; {self._path.name} takes uint8 pictures only")
        return images.to(self._device).permute(0, 2, 3, 1).contiguous()

    def _probe(self, given: bool, outputs: tuple[str, ...]) -> Any:
        if (given, outputs) not in self._probes:
            from dvit_infer.onnx_file import probed

            with probed(self._path, given, outputs) as model:
                self._probes[given, outputs] = open_session(model, self._device, str(self._path))
        return self._probes[given, outputs]
