"""The CPU quota of the control groups that a process is in: the CPU time that a container allows, on Linux."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Where the hierarchies usually are, for a /proc without mountinfo: version 2, alone and in the hybrid layout, and 1.
_USUAL = (
    ("", PurePosixPath("/sys/fs/cgroup")),
    ("", PurePosixPath("/sys/fs/cgroup/unified")),
    ("cpu", PurePosixPath("/sys/fs/cgroup/cpu")),
    ("cpu", PurePosixPath("/sys/fs/cgroup/cpu,cpuacct")),
)
_USUAL_PERIOD = "100000"  # microseconds; the kernel's default


class _Hierarchy(NamedTuple):
    """A mounted hierarchy: its controller (empty: version 2), the group shown at the mount point, the mount point."""

    controller: str
    top: PurePosixPath
    mount: PurePosixPath


def cpu_quota(root: Path = Path("/")) -> Fraction | None:
    """Return the CPUs that the process may use at a time on average; None without a quota, and on other systems.

    The quota of a group holds for the groups in it, so the smallest one from the process's own group up to the top of
    what is mounted counts, in version 2 (cpu.max) and 1 (cpu.cfs_quota_us, cpu.cfs_period_us) of control groups. Files
    that cannot be read, or that do not hold what they should, are ignored.

    Args:
        root: the folder that holds proc and sys.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[Fraction]:
    groups = dict(_groups(root))
    for hierarchy in _hierarchies(root):
        if hierarchy.controller not in groups:
            continue
        for folder in _folders(hierarchy, groups[hierarchy.controller]):
            where = root / folder.relative_to("/")
            if hierarchy.controller:
                limit = _read(where / "cpu.cfs_quota_us"), _read(where / "cpu.cfs_period_us") or _USUAL_PERIOD
            else:
                words = _read(where / "cpu.max").split()
                limit = " ".join(words[:1]), " ".join(words[1:]) or _USUAL_PERIOD
            if (quota := _ratio(*limit)) is not None:
                yield quota


def _ratio(quota: str, period: str) -> Fraction | None:
    """Return quota / period; None if it is no limit: 'max' in version 2, -1 in version 1, or not two numbers."""
    if not (re.fullmatch(r"[0-9]{1,20}", quota.strip()) and re.fullmatch(r"[0-9]{1,20}", period.strip())):
        return None
    return Fraction(int(quota), int(period)) if int(quota) and int(period) else None


def _groups(root: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield each controller of this process, '' for version 2, and the path of its group."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and path.startswith("/"):
            for controller in controllers.split(","):
                if controller or number == "0":
                    yield controller, PurePosixPath(path)


def _hierarchies(root: Path) -> list[_Hierarchy]:
    """Return the mounted hierarchies that may hold a CPU quota (proc(5), mountinfo)."""
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mounted, dash, of = (part.split() for part in line.partition(" - "))
        if not dash or len(mounted) < 5 or len(of) < 3 or of[0] not in ("cgroup", "cgroup2"):
            continue
        if of[0] == "cgroup" and "cpu" not in of[2].split(","):
            continue
        top, mount = (PurePosixPath(_unescaped(mounted[at])) for at in (3, 4))
        if mount.is_absolute():
            found.append(_Hierarchy("cpu" if of[0] == "cgroup" else "", top, mount))
    return found or [_Hierarchy(controller, PurePosixPath("/"), mount) for controller, mount in _USUAL]


def _folders(hierarchy: _Hierarchy, group: PurePosixPath) -> list[PurePosixPath]:
    """Return the folder of a group and those above it, up to the mount point.

    A container that sees the host's names of its groups has its own group, and nothing above it, at the mount point.
    """
    if ".." in group.parts or not group.is_relative_to(hierarchy.top):
        return [hierarchy.mount]  # the group is outside what this process sees
    below = group.relative_to(hierarchy.top)
    return [hierarchy.mount / part for part in (below, *below.parents)]


def _unescaped(text: str) -> str:
    """Replace what mountinfo escapes: a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):  # not there, not ours to read, or an impossible name
        return ""
