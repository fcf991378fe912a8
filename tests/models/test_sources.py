"""Files in which people bring weights: one, shards, a folder; and files that are no checkpoint yet."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import official_checkpoint
from safetensors.torch import load_file, save_file

import dvit_infer as dvit
from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.source import WeightSource

STATE: dict[str, torch.Tensor] = official_checkpoint("tiny-deit-r0.7-s1")["model"]


def same(source) -> bool:
    found = read_checkpoint(source).state
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    """A folder as Hugging Face's libraries write it."""
    folder.mkdir()
    table, keys = {}, list(STATE)
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    for i, part in enumerate((keys[:20], keys[20:]), 1):
        name = f"{stem}-0000{i}-of-00002{suffix}"
        tensors = {key: STATE[key].contiguous() for key in part}
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / name)
        table |= dict.fromkeys(part, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(kind, tmp_path):
    folder = sharded(tmp_path / "shards", kind)
    (index,) = folder.glob("*.index.json")
    for source in (folder, f"{folder}/", index):
        assert same(source)
    (first, second) = sorted(folder.glob("*-of-*"))
    with pytest.raises(InputError, match=r"-of-00002\..*: is shard 1 of 2; give their folder"):
        read_checkpoint(first)
    source = WeightSource(folder, read_checkpoint(folder))
    assert source.read().state.keys() == STATE.keys()
    whole = second.read_bytes()
    tensors = load_file(second) if kind == "safetensors" else torch.load(second)
    changed = {key: value + 1 for key, value in tensors.items()}
    (save_file if kind == "safetensors" else torch.save)(changed, second)
    with pytest.raises(InputError, match="has changed since"):
        source.read()
    second.write_bytes(whole)
    source.read()
    second.unlink()
    with pytest.raises(InputError, match=rf"{second.name}: is missing: shard 2 of 2"):
        read_checkpoint(folder)


def test_an_engine_is_made_and_verified_from_a_folder(tmp_path):
    folder = sharded(tmp_path / "shards")
    chosen = {"assume": {"num_heads": 2}, "device": "cpu"}
    engine = dvit.convert(folder, **chosen)
    images = torch.randint(0, 256, (2, 3, *engine.config.image_size), dtype=torch.uint8)
    assert torch.equal(engine(images)[0], dvit.convert(STATE, **chosen)(images)[0])
    assert dvit.verify(engine, folder, num_images=2).passed


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(name, tmp_path):
    (save_file if name == "model.safetensors" else torch.save)(STATE, tmp_path / name)
    assert same(tmp_path)


def test_a_folder_without_a_checkpoint_names_what_may_be_one(tmp_path):
    torch.save(STATE, tmp_path / "best.pth")
    with pytest.raises(InputError, match=r"is a folder without model\.safetensors .*may be one: best\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "sub/a", "..", "", "a\\b", "C:a", 3, None])
def test_shards_outside_of_the_folder_are_refused(name, tmp_path):
    torch.save(STATE, tmp_path / "a")
    index = tmp_path / "in" / "x.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputError, match=r"x\.index\.json: (names the shard|is no index)"):
        read_checkpoint(index)


def test_links_lead_no_further_than_hugging_faces_cache(tmp_path):
    folder = sharded(tmp_path / "shards")
    (shard, _) = sorted(folder.glob("*-of-*"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"{shard.name}: is a link to outside"):
        read_checkpoint(folder)
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = tmp_path / "hub" / "blobs" / file.name[::-1]
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    assert same(snapshot)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000], ids=range(6)
)
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json: is no index of shards"):
        read_checkpoint(tmp_path)


def packed(how: str, name: str = "best.pth") -> bytes:
    buffer = io.BytesIO()
    if how == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("readme.txt", "text")
            archive.writestr(name, bytes(10))
    elif how == "npz":
        np.savez(buffer, **{"Transformer/encoder_norm/bias": np.ones(3)})
    else:
        with tarfile.open(fileobj=buffer, mode=how) as tar:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 88299621\n".encode(),
         "is a Git LFS pointer of 133 bytes; git lfs pull fetches the file of 84.2 MiB"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page.*download the file itself"),
        (b"\n<html><body>404</body></html>", "is a web page"),
        (b'{"error": "Repository not found"}', "is JSON text"),
        (packed("zip"), "is a zip archive with best.pth in it; unpack it"),
        (packed("zip", "a.txt"), "is a zip archive.*no checkpoint is seen in it .readme.txt, a.txt"),
        *((packed(how), "is a tar archive with best.pth in it; unpack it") for how in ("w", "w:gz", "w:bz2", "w:xz")),
        (gzip.compress(b"weights"), "is packed with gzip; unpack it"),
        (packed("npz"), "NumPy archive .* of no vision transformer .first name .Transformer/encoder_norm/bias"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "is HDF5, as Keras writes"),
        (b"", "the file is empty"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # archives hold the time
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_checkpoint_yet(content, message, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.{suffix}: .*{message}") as caught:
        read_checkpoint(path)
    assert "damaged" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_is_not_taken_for_a_path():
    for url in ("https://dl.fbaipublicfiles.com/deit/x.pth", "s3://bucket/x.pth", "file:///x.pth"):
        with pytest.raises(InputError, match=f"{url}: is a URL; download"):
            read_checkpoint(url)


def test_a_torch_file_named_safetensors_is_read(tmp_path):
    torch.save(STATE, tmp_path / "a.safetensors")
    assert same(tmp_path / "a.safetensors")
