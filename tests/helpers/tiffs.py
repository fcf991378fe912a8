"""TIFF files that Pillow cannot write: any bands, bits and tags, uncompressed, little-endian."""

import struct
from pathlib import Path

import numpy as np


def write_tiff(path: Path, samples: np.ndarray, *, photometric: int = 1, bits: int | None = None, **tags: int) -> Path:
    """Write (H, W) or (H, W, bands) samples; `extra` (338) and `s_max` (341) are further tags.

    bits: of a sample, if not those of the dtype; 12: samples are packed, two in three bytes.
    """
    samples = samples[:, :, None] if samples.ndim == 2 else samples
    height, width, bands = samples.shape
    bits = samples.dtype.itemsize * 8 if bits is None else bits
    content = samples.tobytes()
    if bits == 12:
        pairs = samples.reshape(-1, 2).astype(int)
        content = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    fields = {
        256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric], 273: [0], 277: [bands],
        278: [height], 279: [len(content)],
    }  # fmt: skip
    if "extra" in tags:
        fields[338] = [tags["extra"]] * (bands - 3 if photometric == 2 else bands - 1)
    if "s_max" in tags:
        fields[341] = [tags["s_max"]]
    directory_size = 2 + 12 * len(fields) + 4
    at = 8 + directory_size
    far, entries = b"", b""
    for tag in sorted(fields):
        values = fields[tag]
        kind, form = (4, "I") if tag in (273, 279, 341) else (3, "H")
        packed = struct.pack(f"<{len(values)}{form}", *values)
        if len(packed) > 4:
            packed, far = struct.pack("<I", at + len(far)), far + packed
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    start = at + len(far)
    entries = entries.replace(struct.pack("<HHI", 273, 4, 1) + bytes(4), struct.pack("<HHII", 273, 4, 1, start))
    header = b"II*\0" + struct.pack("<I", 8)
    path.write_bytes(header + struct.pack("<H", len(fields)) + entries + bytes(4) + far + content)
    return path
