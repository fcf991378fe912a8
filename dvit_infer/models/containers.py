"""The files that hold a checkpoint, one or several shards; and what a file is that holds none."""

import json
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from dvit_infer.errors import InputError

# What Hugging Face's libraries write into a folder, in the order in which they look.
_IN_FOLDERS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt", ".bin", ".safetensors")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MOST = 1 << 26  # bytes of an index
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z"}
_OTHERS = {b"\x89HDF": "HDF5, as Keras writes", b"GGUF": "GGUF", b"\x93NUMPY": "a NumPy array"}


def check_no_url(source: str | Path) -> None:
    if _URL.match(str(source)):
        raise InputError(f"{source}: is a URL; download the file first and give its name")


def tensor_files(path: Path) -> dict[Path, frozenset[str] | None]:
    """Return the files that hold a checkpoint's tensors, each with the keys that an index says are in it.

    Args:
        path: a file, the index of shards, or the folder of either.

    Raises:
        InputError: a folder holds none, a shard is missing or lies elsewhere, or the file is one shard of several.
    """
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".index.json"):
        return _shards(path)
    if (found := _SHARD.search(path.name)) and int(found[2]) > 1:
        raise InputError(f"{path}: is shard {int(found[1])} of {int(found[2])}; give their folder, or its .index.json")
    return {path: None}


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights under a name that Hugging Face's libraries give them."""
    return any((folder / name).is_file() for name in _IN_FOLDERS)


def _in_folder(folder: Path) -> Path:
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    there = sorted(file.name for file in folder.iterdir() if file.name.endswith((*SUFFIXES, ".index.json")))
    others = f"; files in it that may be one: {', '.join(there[:5])}" if there else ""
    raise InputError(
        f"{folder}: is a folder without {' or '.join(_IN_FOLDERS[:4:2])}; a checkpoint is expected{others}"
    )


def _shards(index: Path) -> dict[Path, frozenset[str] | None]:
    try:
        if index.stat().st_size > _MOST:
            raise ValueError
        table = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(table.values()))
        if not names or not all(isinstance(text, str) for text in (*table, *names)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index}: is no index of shards (JSON with a weight_map of keys and files)") from None
    files: dict[Path, frozenset[str] | None] = {}
    for i, name in enumerate(names, 1):
        if name != os.path.basename(name) or name in ("", ".", "..") or re.search(r"[\0\\:]", name):
            raise InputError(f"{index}: names the shard {name[:80]!r}; a file in the index's own folder is expected")
        file = index.parent / name
        if not file.is_file():
            raise InputError(f"{file}: is missing: shard {i} of {len(names)} that {index.name} names")
        if os.path.dirname(os.path.realpath(file)) not in _allowed(index.parent):
            raise InputError(f"{file}: is a link to outside of its folder, which a shard may not be")
        files[file] = frozenset(key for key, where in table.items() if where == name)
    return files


def _allowed(folder: Path) -> list[str]:
    """Return the folders in which shards may lie: their own, and the store to which Hugging Face's cache links."""
    real = Path(os.path.realpath(folder))
    return [str(real), *([str(real.parents[1] / "blobs")] if real.parent.name == "snapshots" else [])]


def describe(path: Path, head: bytes) -> str | None:
    """Return a sentence about a file that is no checkpoint, by its first 512 bytes; None if it is not known."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,18})\s", head)
        stands = f"the file of {int(size[1]) / 2**20:.1f} MiB" if size else "the file"
        return f"is a Git LFS pointer of {path.stat().st_size} bytes; git lfs pull fetches {stands} that it stands for"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, as servers send in place of a file (a login, an error); download the file itself"
    if text.startswith((b"{", b"[")) and b"\0" not in head[:8]:
        return "is JSON text, no checkpoint; the file of the weights is expected"
    packed = next((kind for start, kind in _PACKED.items() if head.startswith(start)), None)
    if packed or head[257:262] == b"ustar":
        return _describe_tar(path, packed)
    if other := next((kind for start, kind in _OTHERS.items() if head.startswith(start)), None):
        return f"is {other}, no checkpoint of PyTorch"
    return None


def describe_zip(names: Iterable[str]) -> str:
    """Return a sentence about a zip archive that torch.save did not write."""
    members = list(names)
    return _unpack("zip", members)


def _describe_tar(path: Path, packed: str | None) -> str:
    names, size = [], 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                names.append(member.name)
                size += member.size
                # Passing a member of a compressed archive means unpacking it.
                if member.name.endswith(SUFFIXES) or len(names) == 100 or (packed and size > 1 << 28):
                    break
    except (tarfile.TarError, OSError, EOFError, ValueError):
        if not names:
            return f"is packed with {packed}; unpack it first" if packed else "is a damaged tar archive"
    return _unpack("tar", names)


def _unpack(kind: str, members: list[str]) -> str:
    if found := next((name for name in members if name.endswith(SUFFIXES)), None):
        return f"is a {kind} archive with {found} in it; unpack it and give that file"
    some = ", ".join(members[:3]) or "nothing"
    return f"is a {kind} archive, no file of torch.save; no checkpoint is seen in it ({some})"
