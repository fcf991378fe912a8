"""ONNX Runtime sessions: open and run them, with errors in one line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvit_infer.errors import InputError
from dvit_infer.utils.memory import is_allocation_failure
from dvit_infer.utils.packages import need
from dvit_infer.utils.threads import limit_threads

EXTRA = "dvit-infer[onnx]"
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
_DTYPES = {"float": torch.float32, "float16": torch.float16, "uint8": torch.uint8, "int64": torch.int64}


def open_session(model: Path | bytes, device: torch.device, name: str, level: str = LEVELS[-1]) -> Any:
    """Open an `onnxruntime.InferenceSession` with the number of threads of `limit_threads`.

    Args:
        model: the file, or its content.
        device: a CPU, or a CUDA device, which requires the CUDA provider.
        name: name for messages.
        level: graph optimisation level, one of `LEVELS`.

    Raises:
        InputError: ONNX Runtime is not installed, has no CUDA provider, or cannot load the model.
    """
    need(name, "onnxruntime", extra=EXTRA)
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; other errors are raised here
    options.intra_op_num_threads = limit_threads()  # PyTorch too: it normalises the images
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise InputError(
                f"device: this onnxruntime has no CUDA provider; install '{EXTRA[:-1]}-gpu]', or use --device cpu"
            )
        # No TF32: it could keep other tokens than float32.
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # exceptions without a common base
        if found := re.search(r'External data path does not exist: "?([^"]+)', str(error)):
            raise InputError(f"{name}: its weights are in {Path(found[1]).name}, which is missing beside it") from None
        reason = _reason(error).removeprefix(f"Load model from {name} failed:")
        raise InputError(f"{name}: ONNX Runtime cannot load it: {reason}") from None
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise InputError("device: ONNX Runtime's CUDA provider cannot start here; use --device cpu")
    return session


def input_dtype(session: Any) -> torch.dtype | None:
    """Return the dtype of the first input; None if images cannot have it."""
    return _dtype(session.get_inputs()[0])


def run_session(
    session: Any, given: Mapping[str, torch.Tensor], wanted: Sequence[str], name: str = "images"
) -> list[torch.Tensor]:
    """Run a session with inputs by name; return the wanted outputs in order, on the inputs' device.

    On CUDA, inputs and outputs stay on the device (IO binding).

    Raises:
        InputError: An input has the wrong shape or dtype, or an output is no numeric tensor.
        MemoryError: Out of memory; on a GPU torch.OutOfMemoryError.
    """
    given = {key: tensor.resolve_neg() for key, tensor in given.items()}
    device = next(iter(given.values())).device
    try:
        if device.type == "cpu":
            found = session.run(list(wanted), {key: tensor.numpy() for key, tensor in given.items()})
            return [torch.from_numpy(np.asarray(array)) for array in found]
        torch.cuda.synchronize(device)  # ONNX Runtime uses its own stream
        return run_bound(session, given, wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # exceptions without a common base
        if is_allocation_failure(error):
            raise (MemoryError if device.type == "cpu" else torch.OutOfMemoryError)(_reason(error)) from None
        raise InputError(f"{name}: ONNX Runtime: {_reason(error)}") from None


def run_bound(session: Any, given: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> list[torch.Tensor]:
    """Run a session by IO binding: tensors are read and written on their own device.

    An output whose shape or dtype is known only at run time is copied through the CPU.
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
    """Shorten an ONNX Runtime error to one line, without prefix (`[ONNXRuntimeError] : 1 : FAIL : `) and sources."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("[ONNXRuntimeError] : ").split(" : ", 2)[-1]
    text = re.split(r" ?/onnxruntime_src/| Please fix", text)[0] or text
    return text if len(text) < 250 else f"{text[:250]} ..."
