"""ONNX Runtime runs a model: sessions, and a runner for the files that the ONNX backend writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvit_infer.errors import InputError
from dvit_infer.utils.memory import is_allocation_failure
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
    """Of the first input; None for one that no images come in."""
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
        if is_allocation_failure(error):
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
