"""ONNX Runtime runs a model: sessions, and a runner for the files that the ONNX backend writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.images.tensors import normalise
from dvit_infer.utils.packages import need

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

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: all else becomes an error here
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
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # of many kinds, which have no common base
        if found := re.search(r'External data path does not exist: "?([^"]+)', str(error)):
            raise InputError(f"{name}: its weights are in {Path(found[1]).name}, which is not beside it") from None
        reason = _reason(error).removeprefix(f"Load model from {name} failed:")
        raise InputError(f"{name}: ONNX Runtime cannot load it: {reason}") from None
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise InputError("device: ONNX Runtime's CUDA provider cannot start here; --device cpu would")
    return session


def input_dtype(session: Any) -> torch.dtype | None:
    """Of the first input; None for one that no pictures come in."""
    return _dtype(session.get_inputs()[0])


def run_session(
    session: Any, given: Mapping[str, torch.Tensor], wanted: Sequence[str], name: str = "images"
) -> list[torch.Tensor]:
    """Run a session: inputs by name, outputs in the order asked for, all on the inputs' device.

    On CUDA inputs are bound where they are, and outputs stay there (IO binding).

    Raises:
        InputError: naming `name`: an input is of a wrong shape or dtype, an output no tensor of numbers.
        MemoryError: there is too little of it; on a GPU torch.OutOfMemoryError.
    """
    given = {key: tensor.resolve_neg() for key, tensor in given.items()}
    device = next(iter(given.values())).device
    try:
        if device.type == "cpu":
            found = session.run(list(wanted), {key: tensor.numpy() for key, tensor in given.items()})
            return [torch.from_numpy(np.asarray(array)) for array in found]
        torch.cuda.synchronize(device)  # ONNX Runtime has a stream of its own
        return run_bound(session, given, wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds, which have no common base
        if "allocate" in str(error):
            raise (MemoryError if device.type == "cpu" else torch.OutOfMemoryError)(_reason(error)) from None
        raise InputError(f"{name}: ONNX Runtime: {_reason(error)}") from None


def run_bound(session: Any, given: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> list[torch.Tensor]:
    """`run_session` by IO binding: tensors are read and written where they are, on whatever device.

    An output whose shape or dtype only running tells is copied by way of the CPU.
    """
    first = next(iter(given.values()))
    binding = session.io_binding()
    where = first.device.type, first.device.index or 0
    for name, tensor in given.items():
        binding.bind_input(name, *where, _numpy(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())
    values = {value.name: value for value in session.get_outputs()}
    outputs: dict[str, torch.Tensor] = {}
    for name in wanted:
        dtype, shape = _dtype(values[name]), list(values[name].shape or [])
        if dtype is None or not shape or not all(isinstance(size, int) for size in shape[1:]):
            binding.bind_output(name, "cpu")
            continue
        shape[0] = shape[0] if isinstance(shape[0], int) else len(first)
        outputs[name] = torch.empty(shape, dtype=dtype, device=first.device)
        binding.bind_output(name, *where, _numpy(dtype), tuple(shape), outputs[name].data_ptr())
    session.run_with_iobinding(binding)
    for name, value in zip(wanted, binding.get_outputs(), strict=True):
        if name not in outputs:
            outputs[name] = torch.from_numpy(np.asarray(value.numpy())).to(first.device)
    return [outputs[name] for name in wanted]


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))


def _dtype(value: Any) -> torch.dtype | None:
    return _DTYPES.get(value.type.removeprefix("tensor(").removesuffix(")"))


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, in one short line without prefixes (`[ONNXRuntimeError] : 1 : FAIL : `) and sources."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("[ONNXRuntimeError] : ").split(" : ", 2)[-1]
    text = re.split(r" ?/onnxruntime_src/| Please fix", text)[0] or text
    return text if len(text) < 250 else f"{text[:250]} ..."


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
        if kept is not None:
            return self.node_values(images, kept, ())["logits"], list(kept)
        wanted = self._kept if return_kept and self._has_kept else []
        logits, *chosen = run_session(self.session, given, ["logits", *wanted], str(self._path))
        if wanted or not return_kept:
            return logits, chosen
        # The answer is the file's own, whatever the probe is asked.
        names = [f"prune.{stage}/index" for stage in range(len(self._kept))]
        chosen = run_session(self._probe(False, tuple(names)), given, names, str(self._path)) if names else []
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
        found = run_session(self._probe(bool(kept), tuple(wanted[1:])), given, wanted, str(self._path))
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
            from dvit_infer.onnx.export import probed

            with probed(self._path, given, outputs) as model:
                self._probes[given, outputs] = open_session(model, self._device, str(self._path))
        return self._probes[given, outputs]
