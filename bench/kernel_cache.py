"""Unpack kernels compiled beforehand (`make gpu-cache`) into Triton's cache on a GPU machine.

Compilation takes most of a first run: 0.7 s for each of some 500 kernels. Triton finds a kernel by a key of Triton's
own files, including libtriton.so for the Python in use, and of the kernel's source, arguments and options. If a key
differs, Triton compiles the kernel as usual.
"""

import hashlib
import io
import json
import lzma
import tarfile
import time
from pathlib import Path
from typing import Any

from children import ROOT
from gpu_checks import cache_folder

PACKED = ROOT / "build" / "gpu-cache" / "kernels.tar.xz"
MANIFEST = "manifest.json"


def fingerprint() -> dict[str, str]:
    """Return hashes of the kernels' source files."""
    files = sorted((ROOT / "kernels" / "dvit_kernels").glob("*.py"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def short(key: str) -> str:
    """Return the short form of Triton's own key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def pack(cache: Path, manifest: dict[str, Any], path: Path) -> int:
    """Pack the files that a launch reads from Triton's cache, binaries and metadata; return the number of kernels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = sorted(f for f in cache.glob("*/*") if f.suffix in (".cubin", ".json") and f.name[:2] != "__")
    count = sum(file.suffix == ".cubin" for file in kept)
    with tarfile.open(path, "w:xz") as archive:
        text = json.dumps({**manifest, "kernels": count}).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
        for file in kept:
            archive.add(file, f"{file.parent.name}/{file.name}")
    return count


def unpack(path: Path = PACKED) -> str:
    """Unpack into Triton's cache if the kernels fit this Triton and GPU; return a line that reports it."""
    if not path.exists():
        return "compiled kernels: MISS, none were taken along (make gpu-cache makes them)"
    try:
        return f"compiled kernels: {_unpacked(path)}"
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, ValueError, LookupError) as error:
        return f"compiled kernels: MISS, {path} cannot be read ({str(error) or type(error).__name__})"


def _unpacked(path: Path) -> str:
    import torch
    from triton.runtime.cache import triton_key

    here = short(triton_key())
    target = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "no GPU"
    start = time.monotonic()
    with tarfile.open(path) as archive:
        manifest = json.load(archive.extractfile(MANIFEST))
        for what, wanted, found in (
            ("Triton's key", manifest["triton_key"], here),
            ("the GPU", manifest["target"], target),
        ):
            if wanted != found:
                return f"MISS, {what} is {found}, they are for {wanted}; kernels compile as needed"
        files = [member for member in archive.getmembers() if member.name != MANIFEST]
        archive.extractall(cache_folder(), files, filter="data")
    for member in files:
        if member.name.endswith(".json"):
            _write_group(cache_folder() / member.name)
    changed = sum(manifest["sources"].get(name) != value for name, value in fingerprint().items())
    part = f" in part, {changed} files of kernels have changed since" if changed else ""
    taken = time.monotonic() - start
    return f"HIT{part}: {manifest['kernels']} for Triton's key {here} on {target}, {taken:.1f} s"


def _write_group(metadata: Path) -> None:
    """Write the list of a kernel's files, by absolute paths; Triton does not see the files without it."""
    files = metadata.parent.glob(f"{metadata.stem}.*")
    group = metadata.with_name(f"__grp__{metadata.name}")
    group.write_text(json.dumps({"child_paths": {file.name: str(file.resolve()) for file in files}}))
