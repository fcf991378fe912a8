"""Pickles of today's trainers are read, whatever lies beside the weights; nothing in one runs, whatever it is."""

import argparse
import ast
import collections
import datetime
import enum
import errno
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_files import call, content, with_pickle, zipped
from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.loading import load_torch
from dvit_infer.models.torch_file import read_torch

STATE = {"head.weight": torch.randn(3, 4), "head.bias": torch.arange(3.0), "cls_token": torch.ones(1, 1, 4)}


class Config(dict):
    """As yacs and others make them: a dict with attributes."""

    frozen = False


class Meter:
    def __init__(self) -> None:
        self.values = collections.deque([1.0, 2.0], maxlen=20)
        self.total = collections.defaultdict(list, {"a": [1]})


class Stage(enum.Enum):
    LAST = "last"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)


@pytest.fixture(autouse=True)
def _package(monkeypatch):
    """The classes are those of a package that whoever reads the file does not have."""
    package = types.ModuleType("trainers_own")
    for kind in (Config, Meter, Stage, Net):
        kind.__module__ = "trainers_own"
        setattr(package, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "trainers_own", package)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("beside", "skipped"),
    [
        (Config(a=Config(b=1)), ("trainers_own.Config",)),
        ([Meter(), Meter()], ("trainers_own.Meter",)),
        (Stage.LAST, ("trainers_own.Stage",)),
        (functools.partial(Net, 3), ("functools.partial", "trainers_own.Net")),
        (pathlib.PurePosixPath("/a/b"), ("pathlib.PurePosixPath",)),
        ({"on": datetime.datetime(2026, 1, 2), "type": int}, ("datetime.datetime",)),
        (torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1).defaults, ()),
        ({1, 2, (3, 4)}, ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_beside_the_weights_are_inert_and_named(beside, skipped, protocol, legacy, tmp_path):
    content = {"model": STATE, "args": argparse.Namespace(model="deit-s"), "beside": beside}
    path = tmp_path / "a.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    del sys.modules["trainers_own"]
    found = read_checkpoint(path)
    assert {*found.skipped} == {*skipped}
    assert found.metadata == {"model": "deit-s"}
    assert all(torch.equal(found.state[key], STATE[key]) for key in STATE)
    assert "trainers_own" not in sys.modules


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 3), np.int16)), np.array(3, ">i4"), np.zeros((0, 2)),
     np.array(["a", "bc"]), np.array([True, False]), np.float32(2.5), np.int64(-3)],
)  # fmt: skip
def test_numpy_arrays_of_numbers_are_read(array, tmp_path):
    torch.save({"model": STATE, "array": array}, tmp_path / "a.pth")
    found = load_torch(tmp_path / "a.pth", True)["array"]
    assert found.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array)


def test_the_state_of_random_numbers_is_read(tmp_path):
    rng = {"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state()}
    torch.save({"model": STATE, "rng": rng}, tmp_path / "a.pth")
    found, skipped = read_torch(tmp_path / "a.pth", True)
    assert np.array_equal(found["rng"]["numpy"][1], rng["numpy"][1])
    assert torch.equal(found["rng"]["torch"], rng["torch"])
    assert skipped == ()


def test_generators_of_random_numbers_are_inert(tmp_path):
    torch.save({"model": STATE, "rng": [np.random.RandomState(0), np.random.default_rng(0)]}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.skipped
    assert all(name.startswith("numpy.random.") for name in found.skipped)


def test_an_array_of_objects_is_left_out_and_named(tmp_path):
    torch.save({"model": STATE, "array": np.array([Meter(), None])}, tmp_path / "a.pth")
    assert "numpy.ndarray" in read_checkpoint(tmp_path / "a.pth").skipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.uint16])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_tensor_comes_back(dtype, legacy, tmp_path):
    wide = torch.arange(24.0).reshape(4, 6).to(dtype)
    tensors = {"whole": wide, "turned": wide.T, "part": wide[1:3, ::2], "none": wide[:0]}
    parameter = nn.Parameter(wide, requires_grad=dtype.is_floating_point)
    torch.save({**tensors, "parameter": parameter}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = load_torch(tmp_path / "a.pth", not legacy)
    for key, expected in {**tensors, "parameter": wide}.items():
        assert found[key].dtype == dtype
        assert found[key].stride() == expected.stride()
        ours, theirs = (tensor.contiguous().view(torch.uint8) for tensor in (found[key], expected))
        assert torch.equal(ours, theirs)


def test_a_whole_model_is_refused_with_the_lines_that_save_its_weights(tmp_path):
    for saved, at in ((Net(), ""), ({"epoch": 3, "model": Net()}, r"\['model'\]")):
        torch.save(saved, tmp_path / "a.pth")
        lines = (
            rf"trainers_own\.Net.*model = torch\.load\(.*weights_only=False\){at}; torch\.save\(model\.state_dict\(\)"
        )
        with pytest.raises(InputError, match=rf"a\.pth: holds a whole model .*{lines}"):
            read_checkpoint(tmp_path / "a.pth")
    torch.save({"ema": Net(), "weights": STATE}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").weights == "weights"


NAMES = [
    *("os.system", "posix.system", "nt.system", "posixpath.join", "subprocess.Popen", "sys.exit"),
    *("builtins.eval", "builtins.exec", "builtins.open", "builtins.compile", "builtins.getattr"),
    *("builtins.setattr", "builtins.__import__", "builtins.vars", "importlib.import_module", "runpy.run_path"),
    *("ctypes.CDLL", "_ctypes.dlopen", "socket.socket", "_socket.socket", "shutil.rmtree", "pickle.loads"),
    *("_pickle.loads", "code.interact", "pty.spawn", "marshal.loads", "types.FunctionType", "types.CodeType"),
    *("operator.attrgetter", "webbrowser.open", "multiprocessing.Process", "io.open", "tempfile.mkstemp"),
    *("zipimport.zipimporter", "pdb.run", "timeit.timeit", "http.client.HTTPConnection", "asyncio.run"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.storage._load_from_bytes"),
    *("torch.utils.cpp_extension.load", "numpy.load", "numpy.testing._private.utils.runstring"),
    *("numpy.f2py.compile", "dill.loads", "cloudpickle.loads", "joblib.load", "cffi.FFI", "pip.main"),
    *("pathlib.os.system", "logging.os.system", "random._os.system", "__builtin__.eval", "cPickle.loads"),
    *("commands.getoutput", "urllib2.urlopen", "collections.abc.sys.exit"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_can_act_is_refused_by_name(name, tmp_path):
    for data in (b"\x80\x02" + call(name) + b".", b"\x80\x02}X\x01\x00\x00\x00a" + call(name) + b"s."):
        (tmp_path / "evil.pth").write_bytes(with_pickle(zipped(STATE), data))
        with pytest.raises(InputError, match=r"evil\.pth: refused: loading it would run .*nothing was run.*state_dict"):
            read_checkpoint(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    "data",
    [
        b"ccollections\nOrderedDict\nN}X\x04\x00\x00\x00keysK\x01s\x86b.",  # attributes for a class
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",  # and for a function
        b"cargparse\nNamespace\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.",
        b"]K\x01K\x02s.",  # an item of a list
        b"}K\x01a.",
        b"}" + b")" + b"\x85" * 3 + b"K\x01s.",  # a key of tuples of tuples
        b"K\x01)R.",  # a call of a number
        b"]c__main__\nA\n)\x81Q.",  # persistent ids that are none
        b"(X\x07\x00\x00\x00storagec__main__\nA\n" + b")" + b"\x85" * 200 + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x82\x01.",  # a registered class
        b"(i__main__\nA\n.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x00",  # 2**56 bytes
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x00",
        b"r\xff\xff\xff\x7f.",
    ],
)
def test_instructions_that_weights_do_not_need_are_refused(data, tmp_path):
    for path, whole in ((tmp_path / "a.pth", with_pickle(zipped(STATE), b"\x80\x02" + data)),
                        (tmp_path / "old.pth", b"\x80\x02" + data)):  # fmt: skip
        path.write_bytes(whole)
        with pytest.raises(InputError, match=path.name):
            read_checkpoint(path)
    assert collections.OrderedDict.keys is not None
    assert argparse.Namespace(a=1).a == 1


@pytest.mark.parametrize(
    "change", [("size", (9, 4)), ("stride", (9, 9)), ("offset", 5), ("offset", -1), ("size", (-3, -4))]
)
def test_a_tensor_outside_of_its_data_is_refused(change, tmp_path):
    class Tensor:
        def __reduce__(self):
            known = {"storage": storage, "offset": 0, "size": (3, 4), "stride": (4, 1)} | dict([change])
            return torch._utils._rebuild_tensor_v2, (*known.values(), False, {})

    storage = torch.ones(3, 4).storage()
    torch.save({"head.weight": Tensor()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: truncated or damaged"):
        read_checkpoint(tmp_path / "a.pth")


def test_an_error_of_the_system_is_not_the_files(tmp_path, monkeypatch):
    torch.save({"model": {"a.b": torch.ones(3)}}, tmp_path / "a.pth")

    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dvit_infer.models.torch_file._mapped", fails)
    with pytest.raises(InputError, match=r"a\.pth: Input/output error$"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_plain_pickle_is_told_from_a_damaged_file(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(InputError, match=r"is a pickle, but no file of torch\.save"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_pickles_do_nothing(count, tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "odd_files.py"
    found = subprocess.run(
        [sys.executable, str(script), str(count), str(tmp_path)],
        capture_output=True, text=True, timeout=600, cwd=script.parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"])},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    events, results = (ast.literal_eval(line) for line in found.stdout.splitlines())
    assert events == {}
    assert results.keys() == {"read", "refused", "damaged"}
    assert sum(results.values()) == count


def test_the_file_that_is_mutated_holds_what_trainers_save(tmp_path):
    torch.save(content(), tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").metadata["text"] == b"bytes"
