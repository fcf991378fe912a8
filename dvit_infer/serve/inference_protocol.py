"""The Open Inference Protocol, version 2, over HTTP: tensors in JSON or, by Triton's extension, in binary.

See github.com/kserve/open-inference-protocol, and docs/protocol/extension_binary_data.md of triton-inference-server.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvit_infer.serve.model import Model

VERSION = "1"  # of every model
LENGTH_HEADER = "inference-header-content-length"
INPUT = "images"
MAX_JSON = 1 << 24  # bytes; parsing them takes the event loop a fraction of a second
_DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}


class ProtocolError(Exception):
    """A request is not what the protocol or the model expects; the message is one line that says what is."""


@dataclass(frozen=True)
class InferRequest:
    """A request for inference.

    Attributes:
        images: (B, 3, H, W) uint8, or float32 and normalised.
        id: the client's, to be returned.
        timeout_s: None: not given.
        binary: whether the output is to be binary.
    """

    images: np.ndarray
    id: str | None
    timeout_s: float | None
    binary: bool


def metadata(model: Model) -> dict[str, Any]:
    """Return the answer to GET /v2/models/NAME."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "dvit_infer",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, 3, *model.engine.config.image_size]}],
        "outputs": [{"name": model.output, "datatype": "FP32", "shape": [-1, model.width]}],
    }


def parse(body: bytes, json_length: str | None, model: Model) -> InferRequest:
    """Parse the body of POST /v2/models/NAME/infer.

    Args:
        body: JSON, then the binary tensor, if there is one.
        json_length: the header `Inference-Header-Content-Length`; None: all of it is JSON.

    Raises:
        ProtocolError: It is not as expected.
    """
    length = len(body)
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdigit() and int(json_length) <= length):
            raise ProtocolError(f"Inference-Header-Content-Length: {json_length!a} is no length within {length} bytes")
        length = int(json_length)
    request = _json(body[:length])
    parameters = _object(request.get("parameters", {}), "parameters")
    found = request.get("inputs")
    expected = _expected(model)
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise ProtocolError(f"inputs: a list of one tensor is expected: {expected}")
    tensor: dict[str, Any] = found[0]
    if tensor.get("name") != INPUT:
        raise ProtocolError(f"inputs: {_shown(tensor.get('name'))} is no input of {model.name}; expected: {expected}")
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise ProtocolError(f"id: {_shown(identity)}; a string is expected")
    return InferRequest(
        _images(tensor, body[length:], model, expected),
        identity,
        timeout_s(parameters.get("timeout")),
        _binary(request.get("outputs"), parameters, model),
    )


def timeout_s(microseconds: object) -> float | None:
    """Return a timeout in seconds, given in microseconds as a number or its digits; None and 0: not given.

    Raises:
        ProtocolError: It is none.
    """
    text = "0" if microseconds is None else str(microseconds)
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ProtocolError(f"timeout: {_shown(microseconds)}; a whole number of microseconds is expected")
    return int(text) / 1e6 or None


def response(request: InferRequest, logits: np.ndarray, model: Model) -> tuple[bytes, int | None]:
    """Return the body of the answer with logits (B, K), and the length of its JSON if a binary tensor follows."""
    content = logits.astype("<f4").tobytes() if request.binary else b""
    data = {"parameters": {"binary_data_size": len(content)}} if request.binary else {"data": logits.ravel().tolist()}
    answer = {
        "model_name": model.name,
        "model_version": VERSION,
        **({} if request.id is None else {"id": request.id}),
        "outputs": [{"name": model.output, "datatype": "FP32", "shape": list(logits.shape), **data}],
    }
    text = json.dumps(answer, allow_nan=False).encode()
    return text + content, len(text) if request.binary else None


def _expected(model: Model) -> str:
    height, width = model.engine.config.image_size
    kinds = "UINT8" if model.engine.only_uint8 else "UINT8, or FP32 if normalised"
    return f"{INPUT}, {kinds}, shape [B, 3, {height}, {width}], B from 1 to {model.batcher.max_batch}"


def _json(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_JSON:
        raise ProtocolError(f"JSON of {len(text):,} bytes; at most {MAX_JSON:,} are read: send tensors in binary")
    try:
        return _object(json.loads(text), "body")
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"body: no JSON ({error}); a request of the Open Inference Protocol is expected") from None


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(f"{what}: {_shown(value)}; a JSON object is expected")
    return value


def _images(tensor: Mapping[str, Any], rest: bytes, model: Model, expected: str) -> np.ndarray:
    kind, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(kind, str) or kind not in _DTYPES or (kind != "UINT8" and model.engine.only_uint8):
        raise ProtocolError(f"{INPUT}: datatype {_shown(kind)}; expected: {expected}")
    size = [3, *model.engine.config.image_size]
    if (
        not isinstance(shape, list)
        or not all(type(n) is int for n in shape)
        or shape[1:] != size
        or not 1 <= shape[0] <= model.batcher.max_batch
    ):
        raise ProtocolError(f"{INPUT}: shape {_shown(shape)}; expected: {expected}")
    parameters = _object(tensor.get("parameters", {}), f"{INPUT}: parameters")
    if "shared_memory_region" in parameters:
        raise ProtocolError(f"{INPUT}: shared memory is not supported; send the tensor in JSON or in binary")
    if ("binary_data_size" in parameters) == ("data" in tensor):
        raise ProtocolError(f"{INPUT}: either data or the parameter binary_data_size is expected")
    dtype, count = _DTYPES[kind], math.prod(shape)
    if "data" in tensor:
        if rest:
            raise ProtocolError(f"{INPUT}: {len(rest)} bytes follow the JSON, but its data are in it")
        images = _numbers(tensor["data"], kind, shape)
    else:
        stated, needed = parameters["binary_data_size"], count * dtype.itemsize
        if type(stated) is not int or stated != needed or len(rest) != needed:
            raise ProtocolError(
                f"{INPUT}: binary_data_size {_shown(stated)}, and {len(rest)} bytes follow the JSON; {kind} of shape "
                f"{shape} has {needed}"
            )
        images = np.frombuffer(rest, dtype)
    if kind == "FP32" and not np.isfinite(images).all():
        raise ProtocolError(f"{INPUT}: has NaN or Inf; finite values are expected")
    return images.reshape(shape)


def _numbers(data: object, kind: str, shape: list[int]) -> np.ndarray:
    """Return a tensor's data, flat or nested as its shape, as an array."""
    whole = kind == "UINT8"
    wanted = f"{INPUT}: data: {'whole numbers from 0 to 255' if whole else 'numbers'} in shape {shape} or flat"
    try:
        found = np.asarray(data)
    except (ValueError, OverflowError):  # lists of unequal lengths
        raise ProtocolError(f"{wanted} are expected") from None
    if found.dtype.kind not in ("iu" if whole else "iuf") or found.shape not in ((math.prod(shape),), tuple(shape)):
        raise ProtocolError(f"{wanted} are expected, not {found.dtype} in shape {list(found.shape)}")
    if whole and (found.min() < 0 or found.max() > 255):
        raise ProtocolError(f"{wanted} are expected, not {found.min()} to {found.max()}")
    with np.errstate(over="ignore"):  # becomes Inf, which is refused
        return found.astype(_DTYPES[kind])


def _binary(outputs: object, parameters: Mapping[str, Any], model: Model) -> bool:
    """Return whether the output is to be binary."""
    usual = bool(parameters.get("binary_data_output", False))
    if outputs is None or outputs == []:
        return usual
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        raise ProtocolError(f"outputs: a list of one output is expected: {model.output}")
    if outputs[0].get("name") != model.output:
        raise ProtocolError(f"outputs: {_shown(outputs[0].get('name'))} is no output; expected: {model.output}")
    asked = _object(outputs[0].get("parameters", {}), f"{model.output}: parameters")
    if odd := [name for name in asked if name != "binary_data"]:
        raise ProtocolError(f"{model.output}: parameter {_shown(odd[0])} is not supported; binary_data is")
    return bool(asked.get("binary_data", usual))


def _shown(value: object) -> str:
    """Return a value of a request for a message: short, and ASCII in one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
