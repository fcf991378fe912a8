"""What --ray refuses, which engines a cluster gets, and what the callables do with a batch: no cluster is needed."""

import contextlib
import importlib.util
import os
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, TINY, fails
from drawn import draw, draw_all

import dvit_infer as dvit
from dvit_infer.cli import embed, on_ray, predict
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.serve.ray_cluster import decoders_for, engines_for
from dvit_infer.serve.ray_decode import Decode

pytestmark = pytest.mark.usefixtures("_empty_folder")
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="ray is not installed")


def node(cpus: int = 0, gpus: int = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus), "memory": 1.0}}


@pytest.mark.parametrize(
    ("nodes", "device", "engines", "decoders"),
    [
        ([node(1)], None, [{"num_cpus": 1}], 1),
        ([node(2), node(5), node(0)], None, [{"num_cpus": 2}] * 3, 3),
        ([node(8, 2), node(16)], None, [{"num_gpus": 1, "num_cpus": 1}] * 2, 22),
        ([node(8, 2), node(4, 1, alive=False)], "cpu", [{"num_cpus": 2}] * 4, 4),
        ([node(1, 1)], "cuda", [{"num_gpus": 1, "num_cpus": 1}], 1),
    ],
)
def test_engines_of_a_cluster(nodes, device, engines, decoders):
    assert engines_for(nodes, device) == engines
    assert decoders_for(nodes, engines, None) == decoders
    assert decoders_for(nodes, engines, 7) == 7


def test_devices_that_a_cluster_has_not():
    for nodes, device, why in (
        ([node(2)], "cuda", "device: cuda; no node of the cluster has a GPU"),
        ([node(2, 2)], "cuda:1", "device: cuda:1; on a cluster, Ray gives every engine its GPU"),
        ([node(0)], None, "ray: no node of the cluster has a CPU"),
    ):
        with pytest.raises(dvit.InputError, match=why):
            engines_for(nodes, device)
    with pytest.raises(dvit.InputError, match="workers: 0 processes cannot decode"):
        decoders_for([node(2)], [{"num_cpus": 2}], 0)


@needs_ray
@pytest.mark.parametrize("command", [predict, embed])
def test_clusters_that_cannot_be_reached(command, checkpoint, capsys, monkeypatch):
    draw_all(Path("photos"), 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("dvit_infer.serve.ray_cluster._REACHED_S", 0.1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    out = ["-o", "out"]
    for address, why in (
        (f"127.0.0.1:{port}", "Connection refused"),
        ("auto", "Connection refused"),
        ("127.0.0.1:port", "is no address"),
        ("head", "is no address"),
        ("ray://head:10001", "run this on a node of the cluster"),
        ("no.such.invalid:6379", ""),
    ):
        line = fails(command, [checkpoint, "photos", *TINY, *out, f"--ray={address}"], capsys)
        where = f"127.0.0.1:{port}" if address == "auto" else address
        assert re.match(rf"error: --ray: {re.escape(where)}: {why}.*; HOST:PORT of a cluster's head", line), line


@needs_ray
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_of_something_else(answer, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("dvit_infer.serve.ray_cluster._REACHED_S", 0.1)
    draw_all(Path("photos"), 1)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            with other.accept()[0] as connection, contextlib.suppress(ConnectionResetError):
                connection.sendall(answer)
                while connection.recv(1000):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        line = fails(predict, [checkpoint, "photos", *TINY, f"--ray={address}"], capsys)
        thread.join()
    assert line.startswith(f"error: --ray: {address}: {'is no cluster of Ray' if answer else 'timed out'}; HOST:PORT")


@needs_ray
def test_what_is_refused_before_ray_is_asked(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("ray.init", None)
    draw_all(Path("photos"), 1)
    for argv, why in (
        (["none.pth", "photos", "--ray"], "none.pth: No such file or directory"),
        ([checkpoint, "none", "--ray"], "none: "),
        ([checkpoint, "photos", "-o", "none/out", "--ray"], "--out: none/out: there is no folder"),
        ([checkpoint, "photos", "-o", "/proc/out", "--ray"], "--out: /proc/out: cannot be written"),
    ):
        assert f"error: {why}" in fails(predict, [*argv], capsys)


def test_without_the_extra(checkpoint, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    draw_all(Path("photos"), 1)
    says = "needs ray, not installed; run pip install 'dvit-infer[ray]'"
    assert fails(predict, [checkpoint, "photos", "--ray"], capsys) == f"error: --ray {says}\n"
    with pytest.raises(dvit.InputError, match=f"dvit.ray {re.escape(says)}"):
        dvit.ray.Classify(checkpoint)


def png(seed: int) -> bytes:
    draw(seed).save("one.png")
    return Path("one.png").read_bytes()


def test_decoding_prepares_files_and_images_alike():
    decode = Decode(Preprocess((32, 32)))
    files = np.array([png(0), b"text", None], object)
    out = decode({"bytes": files, "label": np.arange(3)})
    assert list(out) == ["label", "image", "error"]
    assert (out["image"].shape, out["image"].dtype) == ((3, 32, 32, 3), np.uint8)
    assert [bool(why) for why in out["error"]] == [False, True, True]
    assert not out["image"][1:].any()
    again = decode({"image": np.asarray(draw(0))[None]})
    np.testing.assert_array_equal(again["image"][0], out["image"][0])
    for batch, why in (
        ({"x": files}, "column: bytes or image is expected, of image files or images; there are x"),
        ({"image": np.zeros((1, 8, 8, 3))}, r"column: float64 of shape \(8, 8, 3\); the bytes"),
        ({"image": np.array(["a.png"], object)}, "column: a value of type str; the bytes"),
    ):
        with pytest.raises(dvit.InputError, match=why):
            decode(batch)


@needs_ray
def test_a_batch_of_a_dataset(checkpoint):
    options = {"assume": {"num_heads": 2}, "image_size": 64, "device": "cpu", "backend": "torch"}
    decode, content = dvit.ray.Decode(checkpoint, **options), [png(0), b"text", png(1)]
    batch = {"path": np.array(["a", "b", "c"]), "bytes": np.array(content, object)}
    classify = dvit.ray.Classify(checkpoint, kept=True, **options)
    found, again = classify(batch), classify(decode(batch))  # files that the engine decodes itself, and decoded ones
    assert list(found) == ["image", "model", "top5", "kept", "error"]
    assert list(found["image"]) == ["a", "b", "c"]
    assert [why is None for why in found["error"]] == [True, False, True]
    assert found["top5"][1] is None
    assert [list(found[name]) for name in found] == [list(again[name]) for name in found]
    embed = dvit.ray.Embed(checkpoint, normalize=True, **options)
    rows = embed(batch)
    assert rows["features"].shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(rows["features"], axis=1), [1, np.nan, 1], atol=1e-5)


def test_the_files_of_a_model(checkpoint):
    from dvit_infer.serve.ray_model import model_files, source_of

    Path("m").mkdir()
    os.link(checkpoint, "m/w.pth")
    Path("m/config.json").write_text("{}")
    Path("m/other").touch()
    files = model_files("m/w.pth")
    assert (files.name, files.path, sorted(files.files)) == ("m/w.pth", "w.pth", ["config.json", "w.pth"])
    if HAS_RAY:
        with source_of(files) as source:
            assert source.read_bytes() == Path(checkpoint).read_bytes()
            assert (source.parent / "config.json").read_text() == "{}"
        assert not source.exists()
        damaged = files._replace(files={"w.pth": np.zeros(9, np.uint8)})
        with pytest.raises(dvit.InputError, match=r"^m/w\.pth: "):
            dvit.ray.Classify(damaged)
    for missing in ("none.pth", "m"):
        with pytest.raises(dvit.InputError, match=missing):
            model_files(missing)


def test_the_docs_name_options_that_exist():
    known = {
        option for one in (predict, embed) for action in one._parser()._actions for option in action.option_strings
    }
    for name in ("ray.md", "hundred_nodes.md"):
        text = (ROOT / "docs" / name).read_text()
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) <= known


def test_a_start_that_takes_long_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(on_ray, "_LONG_S", 0.0)
    said = on_ray._Patience()
    said()
    said()
    assert capsys.readouterr().err == (
        "warning: ray: no engine has started for 0 s: the cluster is busy, or lacks what one needs\n"
    )
