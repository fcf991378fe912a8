"""The Open Inference Protocol over HTTP: answers are the engine's, and what is not expected is told what is."""

import json

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from served import HOST, ask, infer, tensor
from tritonclient.utils import InferenceServerException

EXPECTED = "images, UINT8, or FP32 if normalised, shape [B, 3, 64, 64], B from 1 to 4"
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
ONE = IMAGES[:1]


@pytest.fixture(scope="module")
def logits(engine):
    return engine(torch.from_numpy(IMAGES)).numpy()


@pytest.fixture
def client(port):
    with triton.InferenceServerClient(f"{HOST}:{port}") as client:
        yield client


def test_tritonclient_finds_server_and_model(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("tiny") == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "dvit_infer",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 3, 64, 64]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False, None])
@pytest.mark.parametrize("kind", ["UINT8", "FP32"])
def test_tritonclient_gets_the_engines_logits(client, engine, logits, binary_input, binary_output, kind):
    images = ONE if kind == "UINT8" else np.random.default_rng(1).normal(size=ONE.shape).astype(np.float32)
    if kind == "FP32" and not binary_input:
        images = images.round(2)  # the body is limited
    given = triton.InferInput("images", list(images.shape), kind)
    given.set_data_from_numpy(images, binary_data=binary_input)
    outputs = None if binary_output is None else [triton.InferRequestedOutput("logits", binary_data=binary_output)]
    found = client.infer("tiny", [given], outputs=outputs, request_id="7", timeout=60_000_000)
    assert found.get_response()["id"] == "7"
    expected = logits[:1] if kind == "UINT8" else engine(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found.as_numpy("logits"), expected, rtol=0, atol=5e-5)


def test_an_answer_does_not_depend_on_its_batch(client, logits):
    pending = []
    for image in IMAGES:
        given = triton.InferInput("images", [1, 3, 64, 64], "UINT8")
        given.set_data_from_numpy(image[None])
        pending.append(client.async_infer("tiny", [given]))
    for row, answer in zip(logits, pending, strict=True):
        np.testing.assert_allclose(answer.get_result().as_numpy("logits")[0], row, rtol=0, atol=5e-5)
    given = triton.InferInput("images", list(IMAGES.shape), "UINT8")
    given.set_data_from_numpy(IMAGES)
    found = client.infer("tiny", [given]).as_numpy("logits")
    np.testing.assert_allclose(found, logits, rtol=0, atol=5e-5)


def test_tritonclient_is_told_what_is_expected(client):
    given = triton.InferInput("pixels", [1, 3, 64, 64], "UINT8")
    given.set_data_from_numpy(ONE)
    with pytest.raises(InferenceServerException, match=r'\[400\] inputs: "pixels" is no input of tiny; expected: imag'):
        client.infer("tiny", [given])
    with pytest.raises(InferenceServerException, match=r"\[404\] model: 'other' is not served; these are: tiny"):
        client.get_model_metadata("other")


@pytest.mark.parametrize("nested", [True, False])
def test_data_in_json_may_be_nested(port, logits, nested):
    data = (ONE if nested else ONE.ravel()).tolist()
    status, answer = infer(port, "tiny", {"inputs": [tensor(ONE, parameters={}, data=data)]})
    assert status == 200
    assert list(answer) == ["model_name", "model_version", "outputs"]
    output = answer["outputs"][0]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [1, 10])
    np.testing.assert_allclose(output["data"], logits[0], rtol=0, atol=5e-5)


FLOATS = ONE.astype(np.float32)
WRONG = {
    "no list": ({"inputs": {}}, b"", f"inputs: a list of one tensor is expected: {EXPECTED}"),
    "two tensors": ({"inputs": [tensor(ONE)] * 2}, b"", f"inputs: a list of one tensor is expected: {EXPECTED}"),
    "name": ({"inputs": [tensor(ONE, name=None)]}, b"", f"inputs: null is no input of tiny; expected: {EXPECTED}"),
    "datatype": ({"inputs": [tensor(ONE, datatype="INT64")]}, b"", f'images: datatype "INT64"; expected: {EXPECTED}'),
    "no datatype": ({"inputs": [tensor(ONE, datatype=[])]}, b"", f"images: datatype []; expected: {EXPECTED}"),
    "size": ({"inputs": [tensor(ONE, shape=[1, 3, 9, 9])]}, b"", f"images: shape [1, 3, 9, 9]; expected: {EXPECTED}"),
    "rank": ({"inputs": [tensor(ONE[0])]}, b"", f"images: shape [3, 64, 64]; expected: {EXPECTED}"),
    "no images": ({"inputs": [tensor(ONE[:0])]}, b"", f"images: shape [0, 3, 64, 64]; expected: {EXPECTED}"),
    "too many": ({"inputs": [tensor(ONE, shape=[5, 3, 64, 64])]}, b"", f"shape [5, 3, 64, 64]; expected: {EXPECTED}"),
    "no number": ({"inputs": [tensor(ONE, shape=[True, 3, 64, 64])]}, b"", f"[true, 3, 64, 64]; expected: {EXPECTED}"),
    "fewer bytes": (
        {"inputs": [tensor(ONE)]},
        ONE.tobytes()[:-1],
        "binary_data_size 12288, and 12287 bytes follow the JSON; UINT8 of shape [1, 3, 64, 64] has 12288",
    ),
    "more bytes": ({"inputs": [tensor(ONE)]}, ONE.tobytes() + b"x", "and 12289 bytes follow the JSON"),
    "other size": ({"inputs": [tensor(ONE, parameters={"binary_data_size": "1"})]}, ONE.tobytes(), 'data_size "1",'),
    "no data": ({"inputs": [tensor(ONE, parameters={})]}, b"", "either data or the parameter binary_data_size is exp"),
    "data twice": ({"inputs": [tensor(ONE, data=[])]}, ONE.tobytes(), "either data or the parameter binary_data_size"),
    "data and bytes": ({"inputs": [tensor(ONE, parameters={}, data=[])]}, b"x", "1 bytes follow the JSON, but its dat"),
    "ragged": ({"inputs": [tensor(ONE, parameters={}, data=[[1], [1, 2]])]}, b"", "shape [1, 3, 64, 64] or flat are"),
    "words": ({"inputs": [tensor(ONE, parameters={}, data=["1"] * 12288)]}, b"", "not <U1 in shape [12288]"),
    "fractions": ({"inputs": [tensor(ONE, parameters={}, data=[0.5] * 12288)]}, b"", "whole numbers from 0 to 255 in"),
    "over 255": ({"inputs": [tensor(ONE, parameters={}, data=[256] * 12288)]}, b"", "or flat are expected, not 256 to"),
    "huge": ({"inputs": [tensor(ONE, parameters={}, data=[10**30] + [0] * 12287)]}, b"", "not object in shape [12288]"),
    "infinite": ({"inputs": [tensor(FLOATS, parameters={}, data=[1e300] * 12288)]}, b"", "images: has NaN or Inf; fin"),
    "NaN": ({"inputs": [tensor(FLOATS)]}, (FLOATS * np.nan).tobytes(), "images: has NaN or Inf; finite values are"),
    "shared": ({"inputs": [tensor(ONE, parameters={"shared_memory_region": "a"})]}, b"", "shared memory is not supp"),
    "output": ({"inputs": [tensor(ONE)], "outputs": [{"name": "x"}]}, ONE.tobytes(), '"x" is no output; expected: log'),
    "outputs": ({"inputs": [tensor(ONE)], "outputs": "x"}, ONE.tobytes(), "a list of one output is expected: logits"),
    "classification": (
        {"inputs": [tensor(ONE)], "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
        ONE.tobytes(),
        'logits: parameter "classification" is not supported; binary_data is',
    ),
    "id": ({"id": 5, "inputs": [tensor(ONE)]}, ONE.tobytes(), "id: 5; a string is expected"),
    "timeout": (
        {"inputs": [tensor(ONE)], "parameters": {"timeout": -1}},
        ONE.tobytes(),
        "timeout: -1; a whole number of microseconds is expected",
    ),
    "parameters": ({"inputs": [tensor(ONE)], "parameters": 3}, ONE.tobytes(), "parameters: 3; a JSON object is"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_expected(port, what):
    request, binary, message = WRONG[what]
    status, answer = infer(port, "tiny", request, binary)
    assert status == 400
    assert list(answer) == ["error"]
    assert message in answer["error"]


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"", {}, "body: no JSON"),
        (b"{", {}, "body: no JSON"),
        (b"[]", {}, "body: []; a JSON object is expected"),
        (b"[" * 100_000, {}, "body: no JSON"),
        (b"\xff", {}, "body: no JSON"),
        (b"{}", {"Inference-Header-Content-Length": "3"}, "'3' is no length within 2 bytes"),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, "'-1' is no length within 2 bytes"),
    ],
)
def test_what_is_no_json(port, body, headers, message):
    status, _, answer = ask(port, "POST", "/v2/models/tiny/infer", body, headers)
    assert status == 400
    assert message in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v2/models/other/infer", 404, "model: 'other' is not served; these are: tiny"),
        ("GET", "/v2/models/tiny/versions/2", 404, "version: tiny has version 1 alone"),
        ("GET", "/v2/models/tiny/infer", 405, "Method Not Allowed"),
        ("GET", "/v2/nothing", 404, "Not Found"),
        ("GET", "/v2/models/tiny/", 404, "Not Found"),
    ],
)
def test_what_is_not_there(port, method, path, status, message):
    found, _, answer = ask(port, method, path)
    assert (found, json.loads(answer)) == (status, {"error": message})
