"""The threads that a container allows: made-up control groups, and what PyTorch is set to."""

import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import dvit_infer as dvit
from dvit_infer.images.stream import worker_count
from dvit_infer.utils import threads
from dvit_infer.utils.cpu_quota import cpu_quota

V2 = "30 23 0:26 {top} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 31 0:30 {top} {mount} rw,relatime - cgroup cgroup rw,{controllers}\n"
V1_CPU = V1.format(top="/", mount="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct")
OTHERS = "23 1 254:0 / / rw - ext4 /dev/vda rw\n" + V1.format(
    top="/", mount="/sys/fs/cgroup/cpuset", controllers="cpuset"
)


def quota(root: Path, group: str, mounts: str, **files: str) -> Fraction | None:
    """Return the quota below a root with these files: names of groups are in front of the file, `/` is `__`."""
    write(root, "proc/self/cgroup", group)
    write(root, "proc/self/mountinfo", OTHERS + mounts)
    for name, text in files.items():
        write(root, "sys/fs/cgroup/" + name.replace("__", "/").replace("-", "."), text)
    return cpu_quota(root)


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def version_2(root: Path, **files: str) -> Fraction | None:
    mounts = V2.format(top="/", mount="/sys/fs/cgroup")
    return quota(root, "0::/pod/box\n", mounts, **{k.replace("cpu_max", "cpu-max"): v for k, v in files.items()})


def version_1(root: Path, group: str, mounts: str, folders: dict[str, tuple[str, str]]) -> Fraction | None:
    for folder, (limit, period) in folders.items():
        write(root, f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us", limit)
        write(root, f"sys/fs/cgroup/{folder}/cpu.cfs_period_us", period)
    return quota(root, group, mounts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200000 100000\n", Fraction(2)),
        ("250000 100000\n", Fraction(5, 2)),
        ("50000\n", Fraction(1, 2)),
        ("max 100000\n", None),
        ("max\n", None),
        ("", None),
        ("0 100000\n", None),
        ("100000 0\n", None),
        ("-1 100000\n", None),
        ("1e5 100000\n", None),
        ("2_0 10\n", None),
        ("1 2 3\n", None),
        ("9" * 5000, None),
        ("what is this", None),
    ],
)
def test_the_file_of_version_2(text, expected, tmp_path):
    assert version_2(tmp_path, pod__box__cpu_max=text) == expected


def test_the_smallest_quota_from_the_group_to_the_top_counts(tmp_path):
    assert version_2(tmp_path, pod__box__cpu_max="400000 100000\n") == 4
    assert version_2(tmp_path, pod__cpu_max="300000 100000\n") == 3
    assert version_2(tmp_path, cpu_max="max 100000\n") == 3
    assert version_2(tmp_path, pod__box__cpu_max="100000 50000\n") == 2
    assert version_2(tmp_path, other__cpu_max="1000 100000\n") == 2  # not above this process


def test_a_container_with_names_of_its_own(tmp_path):
    mounts = V2.format(top="/", mount="/sys/fs/cgroup")
    assert quota(tmp_path, "0::/\n", mounts, **{"cpu-max": "150000 100000\n"}) == Fraction(3, 2)


@pytest.mark.parametrize("group", ["/../other", "/docker/id", "/somewhere/else"])
def test_a_group_that_is_not_below_the_mount_point_is_looked_for_at_it(group, tmp_path):
    mounts = V2.format(top="/docker/id", mount="/sys/fs/cgroup")
    assert quota(tmp_path, f"0::{group}\n", mounts, **{"cpu-max": "300000 100000"}) == 3


def test_a_group_below_the_top_of_a_mount(tmp_path):
    mounts = V2.format(top="/docker/id", mount="/sys/fs/cgroup")
    files = {"inner__cpu-max": "200000 100000", "docker__id__inner__cpu-max": "100000 100000"}
    assert quota(tmp_path, "0::/docker/id/inner\n", mounts, **files) == 2


def test_a_mount_point_with_a_space(tmp_path):
    write(tmp_path, "my groups/cpu.max", "200000 100000")
    assert quota(tmp_path, "0::/\n", V2.format(top="/", mount="/my\\040groups")) == 2


def test_version_1(tmp_path):
    group = "5:cpuset:/\n4:cpu,cpuacct:/docker/id\n1:name=systemd:/docker/id\n"
    folders = {"cpu,cpuacct": ("-1", "100000"), "cpu,cpuacct/docker/id": ("350000\n", "100000\n")}
    assert version_1(tmp_path, group, V1_CPU, folders) == Fraction(7, 2)
    assert version_1(tmp_path, group, V1_CPU, {"cpu,cpuacct/docker": ("100000\n", "50000\n")}) == 2
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us").unlink()
    assert cpu_quota(tmp_path) == 1


def test_other_controllers_of_version_1_have_no_quota(tmp_path):
    folders = {"cpuset": ("100000", "100000"), "cpu,cpuacct": ("-1", "100000")}
    assert version_1(tmp_path, "5:cpuset:/\n4:cpu,cpuacct:/\n", V1_CPU, folders) is None


@pytest.mark.parametrize(("first", "second", "expected"), [("-1", "200000 100000", 2), ("100000", "max 100000", 1)])
def test_both_versions_at_once(first, second, expected, tmp_path):
    write(tmp_path, "sys/fs/cgroup/unified/cpu.max", second)
    mounts = V1_CPU + V2.format(top="/", mount="/sys/fs/cgroup/unified")
    group = "4:cpu,cpuacct:/\n0::/\n"
    assert version_1(tmp_path, group, mounts, {"cpu,cpuacct": (first, "100000")}) == expected


def test_without_mountinfo_the_usual_places_are_read(tmp_path):
    version_2(tmp_path, pod__cpu_max="200000 100000")
    (tmp_path / "proc/self/mountinfo").unlink()
    assert cpu_quota(tmp_path) == 2


@pytest.mark.parametrize("name", ["proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/pod/box/cpu.max"])
@pytest.mark.parametrize(
    "content", [b"\xff\0\n", b" - \n - cgroup2\n", b"0:\n::\n0::no/path\n", b"1 2 3 top x - cgroup2 a b\n"]
)
def test_odd_files_are_ignored(name, content, tmp_path):
    version_2(tmp_path, pod__box__cpu_max="200000 100000")
    (tmp_path / name).write_bytes(content)
    assert cpu_quota(tmp_path) in (None, 2)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert cpu_quota(tmp_path) in (None, 2)


def test_a_system_without_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a machine: its CPUs, those of the mask, the quota, PyTorch's threads."""
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    state = {"torch": 0}

    def pretend(cpus: int, mask: int, limit: Fraction | None, by_torch: int) -> dict[str, int]:
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mask)), raising=False)
        monkeypatch.setattr(threads, "cpu_quota", lambda: limit)
        monkeypatch.setattr(threads, "_limited", False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: state["torch"])
        monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(torch=n))
        state["torch"] = by_torch
        threads._quota.cache_clear()
        return state

    yield pretend
    threads._quota.cache_clear()


@pytest.mark.parametrize(
    ("mask", "limit", "by_torch", "allowed", "taken", "text"),
    [
        (64, None, 64, 64, 64, "64 threads"),
        (64, None, 32, 64, 32, "32 threads"),
        (64, Fraction(2), 64, 2, 2, "2 threads (of 64: the container's CPU quota)"),
        (64, Fraction(29, 10), 32, 2, 2, "2 threads (of 64: the container's CPU quota)"),
        (64, Fraction(1, 2), 64, 1, 1, "1 thread (of 64: the container's CPU quota)"),
        (4, Fraction(8), 4, 4, 4, "4 threads (of 64: the affinity mask)"),
        (4, None, 64, 4, 4, "4 threads (of 64: the affinity mask)"),
        (64, Fraction(8), 4, 8, 4, "4 threads"),
    ],
)
def test_a_container_limits_threads(mask, limit, by_torch, allowed, taken, text, machine):
    state = machine(64, mask, limit, by_torch)
    assert threads.allowed_threads() == allowed
    assert threads.num_threads() == taken
    assert state["torch"] == by_torch  # asking changes nothing
    assert threads.limit_threads() == state["torch"] == taken
    assert threads.describe_threads() == text
    assert worker_count(None) == min(8, allowed - 1)


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_a_number_in_the_environment_is_the_users(name, machine, monkeypatch):
    state = machine(64, 64, Fraction(2), 16)
    monkeypatch.setenv(name, "16")
    assert threads.limit_threads() == state["torch"] == 16
    assert threads.describe_threads() == f"16 threads ({name})"


def test_a_number_that_is_set_after_the_first_engine_is_the_users(machine):
    state = machine(64, 64, Fraction(2), 64)
    assert threads.limit_threads() == 2
    torch.set_num_threads(12)
    assert threads.limit_threads() == threads.num_threads() == state["torch"] == 12
    assert threads.describe_threads() == "12 threads"


def test_a_system_without_masks(machine, monkeypatch):
    machine(6, 6, None, 6)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.allowed_threads() == 6


def test_the_first_engine_on_a_cpu_limits_pytorch(machine, checkpoint):
    state = machine(64, 64, Fraction(2), 64)
    dvit.convert(checkpoint, assume={"num_heads": 2}, device="cpu")
    assert state["torch"] == 2


def test_onnx_runtime_takes_as_many(machine, checkpoint, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    dvit.export_onnx(dvit.convert(checkpoint, assume={"num_heads": 2}, device="cpu"), tmp_path / "tiny.onnx")
    taken = []
    usual = onnxruntime.InferenceSession

    def session(model, options, providers):
        taken.append(options.intra_op_num_threads)
        return usual(model, options, providers=providers)

    machine(64, 64, Fraction(3), 64)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    dvit.load_onnx(tmp_path / "tiny.onnx", device="cpu")
    assert set(taken) == {3}
