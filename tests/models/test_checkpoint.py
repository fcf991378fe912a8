"""Reading files: every container and wrapper; and nothing in a file runs, whatever it is."""

import argparse
import collections
import io
import os
import pickle
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from golden_cases import state_dict
from safetensors.torch import save_file

from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.header import WEIGHT_SETS
from dvit_infer.models.state_dicts import PREFIXES


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return state_dict("tiny-lvvit", 1)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.pt", "a.bin"])
def test_torch_files(name, legacy, state, tmp_path):
    torch.save(collections.OrderedDict(state), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert same(read_checkpoint(tmp_path / name).state, state)


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    assert same(read_checkpoint(tmp_path / "a.safetensors").state, state)
    for length in range(1, 70):  # one of these header lengths has a pickle's first byte
        save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors", {"pad": "x" * length})
        assert read_checkpoint(tmp_path / "b.safetensors").state["w"].item() == 1


@pytest.mark.parametrize("key", WEIGHT_SETS)
def test_every_wrapper(key, state, tmp_path):
    args = argparse.Namespace(base_rate=np.float64(0.7), model="lvvit-s", lr=np.float32(1e-3), seed=np.int64(3))
    torch.save({"epoch": 3, key: state, "best": np.float64(79.3), "args": args}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert same(found.state, state)
    assert found.weights == key
    assert found.metadata["base_rate"] == 0.7
    assert read_checkpoint({key: state}).weights == key


@pytest.mark.parametrize("prefix", [*PREFIXES, "module.backbone.", "_orig_mod.module."])
def test_every_prefix(prefix, state):
    assert same(read_checkpoint({"model": {prefix + k: v for k, v in state.items()}}).state, state)


def test_model_comes_first_and_another_can_be_named(state, tmp_path):
    other = {k: v + 1 for k, v in state.items()}
    torch.save({"model_ema": other, "model": state}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert (found.weights, found.other_sets) == ("model", ("model_ema",))
    assert same(found.state, state)
    assert same(read_checkpoint(tmp_path / "a.pth", weights="model_ema").state, other)
    with pytest.raises(InputError, match=r"weights='teacher'.*model, model_ema"):
        read_checkpoint(tmp_path / "a.pth", weights="teacher")


def test_parameters_and_views_are_read_as_tensors(state, tmp_path):
    wide = torch.randn(4, 8)
    torch.save({"a": torch.nn.Parameter(wide), "b": wide[:, ::2]}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth").state
    assert torch.equal(found["b"], wide[:, ::2])
    assert not found["a"].requires_grad


def test_a_file_overwritten_later_changes_nothing(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth").state
    with (tmp_path / "a.pth").open("r+b") as file:
        file.write(b"\xff" * (tmp_path / "a.pth").stat().st_size)
    assert same(found, state)


def test_threads_may_read_together(tmp_path):
    torch.save({"model": {"w": torch.ones(3)}, "args": argparse.Namespace(rate=np.float64(0.7))}, tmp_path / "a.pth")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: read_checkpoint(tmp_path / "a.pth").metadata["rate"] == 0.7, range(80)))


class Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_something_is_refused_and_not_run(how, state, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"model": state, "args": Evil(str(marker))}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(str(marker))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(InputError, match=r"evil\.pth: refused: .*nothing was run"):
        read_checkpoint(path)
    assert not marker.exists()


def zipped(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_damaged_files_are_named(state, tmp_path):
    good = zipped(state)
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("readme.txt", "a zip, no checkpoint")
    damaged = {
        "empty.pth": b"",
        "text.pth": b"these are no weights\n",
        "half.pth": good[: len(good) // 2],
        "headless.pth": good[: len(good) - 100],
        "start.pth": good[:30],
        "zip.pth": script.getvalue(),
        "short.pth": b"\x80",
        "pickle.pth": pickle.dumps([1, 2, 3]),
        "huge.safetensors": struct.pack("<Q", 2**60) + b"{}",
        "tiny.safetensors": b"\x10",
        "cut.safetensors": struct.pack("<Q", 100) + b'{"a":',
        "json.safetensors": struct.pack("<Q", 4) + b"{no}",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match=str(missing)):
            read_checkpoint(missing)


def test_tensors_that_are_no_weights_are_named(state):
    bad = {
        "NaN": torch.full((4,), float("nan")),
        "Inf": torch.tensor([1.0, -float("inf")]),
        "int64": torch.ones(4, dtype=torch.int64),
        "complex64": torch.ones(4, dtype=torch.complex64),
        "float8_e5m2": torch.ones(4).to(torch.float8_e5m2),
        "is no plain dense tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "too large": torch.ones(4, dtype=torch.float64) * 1e300,
        "dense": torch.ones(4, 4).to_sparse(),
        "with data": torch.ones(4, device="meta"),
        "claims shape": torch.ones(1).expand(1 << 40),
        "list, no tensor": [1.0],
    }
    for what, value in bad.items():
        with pytest.raises(InputError, match=rf"blocks\.0\.norm1\.weight.*{what}"):
            read_checkpoint(state | {"blocks.0.norm1.weight": value})


def test_a_flipped_bit_is_found(state, tmp_path):
    good = bytearray(zipped(state))
    at = good.find(state["head.weight"].numpy().tobytes())
    good[at + 3] ^= 0x40  # an exponent's bit: finite, and astronomically wrong
    (tmp_path / "flipped.pth").write_bytes(good)
    with pytest.raises(InputError, match=r"flipped\.pth: truncated or damaged torch file \(Bad CRC-32"):
        read_checkpoint(tmp_path / "flipped.pth")


def test_torch_files_without_checksums_are_read(state, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_checkpoint(tmp_path / "a.pth").state, state)


def test_a_file_that_was_zipped_anew_is_read(state, tmp_path):
    with (
        zipfile.ZipFile(io.BytesIO(zipped(state))) as old,
        zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert same(read_checkpoint(tmp_path / "a.pth").state, state)


def test_a_negative_variance_is_named(state):
    with pytest.raises(InputError, match=r"bn2\.running_var has a negative variance"):
        read_checkpoint(state | {"patch_embed.bn2.running_var": -torch.ones(64)})


def test_what_is_no_path_and_no_state_dict_is_said(tmp_path):
    for source in (None, [torch.nn.Linear(2, 2)], 3):
        with pytest.raises(InputError, match=f"not a {type(source).__name__}"):
            read_checkpoint(source)
    for name in ("", "a\0b"):
        with pytest.raises(InputError, match="file name"):
            read_checkpoint(name)
    for name in ("nosuch/", f"{tmp_path}/nosuch//"):
        with pytest.raises(InputError, match="^" + re.escape(name) + ": there is no such folder$"):
            read_checkpoint(name)
    torch.save({"w": torch.ones(1)}, tmp_path / "plain.pth")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pth")
    os.rename(tmp_path / "plain.pth", odd)
    with pytest.raises(InputError, match="UTF-8"):
        read_checkpoint(odd)
    torch.save({"w": torch.ones(1)}, tmp_path / "café.pth")
    assert read_checkpoint(tmp_path / "café.pth").state["w"].item() == 1


def test_what_holds_no_state_dict_is_said():
    for content in ({}, {"model": {}}, {"model": [1]}, {"epoch": 3}):
        with pytest.raises(InputError, match="no state dict"):
            read_checkpoint(content)
    for key in (3, "", "a\nb", "\x1b[2J", "k" * 1000):
        with pytest.raises(InputError, match="no parameter name"):
            read_checkpoint({"model": {key: torch.ones(1)}})
    with pytest.raises(InputError, match="two tensors are called 'a'"):
        read_checkpoint({"model": {"a": torch.ones(1), "module.a": torch.ones(1)}})
