"""The cache of OpenVINO models: written once, mapped, replaced when damaged, done without when it cannot be written."""

import json
import os
from pathlib import Path

import pytest
import torch
from golden_cases import case_images, official_checkpoint

import dvit_infer as dvit
from dvit_infer.backends import openvino as backend
from dvit_infer.backends import openvino_cache

pytest.importorskip("openvino")
CASE = "tiny-deit-r0.7-s1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that takes models of any size; and the files in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "LEAST_BYTES", 0)
    return lambda: sorted((tmp_path / "cache" / "dvit_infer" / "openvino").glob("*/model.*"))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "m.safetensors"
    dvit.convert(official_checkpoint(CASE), device="cpu", backend="torch", assume={"num_heads": 2}).save(path)
    return path


def logits(path, **more):
    engine = dvit.load(path, device="cpu", **more)
    return engine(case_images(CASE)), engine.runner.runtime


def test_a_model_is_written_once_for_each_output_and_dtype(saved, cache, monkeypatch):
    first, said = logits(saved)
    assert "cache" not in said
    assert [path.name for path in cache()] == ["model.bin", "model.xml"]
    written = {path: path.stat().st_mtime_ns for path in cache()}
    monkeypatch.setattr(backend, "openvino_model", None)  # not called
    assert torch.equal(logits(saved)[0], first)
    monkeypatch.undo()
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_other_dtypes_rates_and_files_have_their_own(saved, cache):
    engine, images = dvit.load(saved, device="cpu"), case_images(CASE)
    engine.features(images)
    engine(images, kept=engine(images, return_kept=True)[1])
    assert len(cache()) == 2  # one model with every output
    logits(saved, dtype="bfloat16")
    logits(saved, keep_rate=0.5)
    logits(saved, dtype="int8")
    assert len(cache()) == 8
    both = {"model": {k: v * 1.1 for k, v in official_checkpoint(CASE)["model"].items()}}
    dvit.convert(both, device="cpu", assume={"num_heads": 2})
    assert len(cache()) == 10


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("changed", "model.bin"),
        ("gone", "sums.json"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("truncated", "model.xml"), ("changed", "model.xml"), ("changed", "sums.json")),
                *(("empty", "model.bin"), ("gone", "model.bin")),
            ]
        ),
    ],
)
def test_a_damaged_one_is_replaced_and_that_is_said(name, damage, saved, cache):
    expected, _ = logits(saved)
    (folder,) = {path.parent for path in cache()}
    content = (folder / name).read_bytes()
    changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    new = {"truncated": content[: len(content) // 2], "changed": changed, "empty": b"", "gone": None}[damage]
    (folder / name).unlink()
    if new is not None:
        (folder / name).write_bytes(new)
    again, said = logits(saved)
    assert torch.equal(again, expected)
    assert ("its damaged cache file was replaced" in said) == (name != "sums.json" or damage != "gone")
    assert (folder / name).read_bytes() == content or name != "model.bin"
    assert "damaged" not in logits(saved)[1]


def test_without_a_folder_to_write_to(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "LEAST_BYTES", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found, said = logits(saved)
    assert found.isfinite().all()
    assert f"no cache in {tmp_path / 'file' / 'dvit_infer' / 'openvino'}: Not a directory" in said


def test_without_a_home(saved, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(backend, "LEAST_BYTES", 0)
    monkeypatch.setattr(openvino_cache, "cache_folder", no_home)
    found, said = logits(saved)
    assert found.isfinite().all()
    assert said.endswith("; no cache: Could not determine home directory.")


def test_one_that_cannot_be_marked_as_used(saved, cache, monkeypatch):
    """Another user's, or on a read-only disk."""
    expected, _ = logits(saved)
    monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(PermissionError()))
    found, said = logits(saved)
    assert torch.equal(found, expected)
    assert "cache" not in said


def test_a_full_disk_leaves_nothing(saved, cache, monkeypatch):
    import openvino

    def full(model, path, weights):
        Path(path).write_text("<net")
        raise RuntimeError("Exception from src/core/serialize.cpp:1:\nno space")

    monkeypatch.setattr(openvino, "serialize", full)
    found, said = logits(saved)
    assert found.isfinite().all()
    assert "no cache in" in said
    assert "it cannot be written" in said
    assert not cache()


def test_a_full_disk_that_openvino_does_not_notice(saved, cache, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(openvino_cache, "write_error", lambda path: full)
    found, said = logits(saved)
    assert found.isfinite().all()
    assert "no cache in" in said
    assert "No space left on device" in said
    assert not cache()


def test_a_file_that_openvino_cannot_read_though_its_checksum_is_right(saved, cache):
    """As when another process is just replacing it."""
    expected, _ = logits(saved)
    (folder,) = {path.parent for path in cache()}
    (folder / "model.xml").write_text("<net")
    (folder / "sums.json").write_text(json.dumps(openvino_cache._sums(folder)))
    assert torch.equal(logits(saved)[0], expected)


def test_those_used_longest_ago_go(saved, cache, monkeypatch):
    for rate, time in ((0.5, 100), (0.6, 200)):
        logits(saved, keep_rate=rate)
        latest = max(cache(), key=lambda path: path.stat().st_mtime_ns).parent
        os.utime(latest, (time, time))
    size = sum(file.stat().st_size for file in cache()[0].parent.iterdir())
    monkeypatch.setattr(openvino_cache, "MOST_BYTES", int(2.5 * size))
    kept = {path.parent for path in cache() if path.parent.stat().st_mtime == 200}
    logits(saved, keep_rate=0.7)
    assert len({path.parent for path in cache()}) == 2
    assert kept < {path.parent for path in cache()}


def test_verification_reads_what_runs(saved, cache):
    """One weight changed in the cache, and its checksum with it: caught."""
    logits(saved)
    (folder,) = {path.parent for path in cache()}
    content = bytearray((folder / "model.bin").read_bytes())
    content[1000:1004] = b"\0\0\x80\x40"
    (folder / "model.bin").write_bytes(content)
    (folder / "sums.json").write_text(json.dumps(openvino_cache._sums(folder)))
    report = dvit.verify(dvit.load(saved, device="cpu"), official_checkpoint(CASE), num_images=4)
    assert report.wrong_weight is not None
    assert not report.passed
