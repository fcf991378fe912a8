"""An image to read: its path, its class if known, and its place in an archive if it is in one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """The place of a file in an archive; any process can read it by this alone.

    Attributes:
        archive: path of the archive.
        packing: "tar", "gz", "bz2" or "xz" (a compressed tar), "stored" or "deflated" (in a zip).
        offset: of its bytes in the decompressed tar, or of its local header in the zip.
        size: bytes, decompressed.
        packed: bytes as stored in the archive.
        checksum: CRC-32 of its bytes; None: the archive has none.
    """

    archive: str
    packing: str
    offset: int
    size: int
    packed: int
    checksum: int | None = None


@dataclass(frozen=True)
class Entry:
    """An image to read.

    Attributes:
        path: its path; in an archive, that of the archive followed by its name there.
        label: its class, if known.
        member: its place in an archive; None: `path` is a file.
        error: the reason why it cannot be read, if already known.
    """

    path: str
    label: int | None = None
    member: Member | None = None
    error: str | None = None
