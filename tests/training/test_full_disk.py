"""A disk that is full, or a limit on a file's size: said as that, and no partial file is left."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from dvit_infer.errors import InputError
from dvit_infer.training import saving
from dvit_infer.utils.files import atomic_write, write_error


@pytest.fixture
def _limited():
    """Files of this process may have 1 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_limited")
def test_a_checkpoint_over_the_limit(tmp_path):
    out = tmp_path / "out.pth"
    saving.write(out, {"model": torch.ones(10)})
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"^out: .*out.pth: File too large \(.*ulimit -f\)$"):
        saving.write(out, {"model": torch.ones(1 << 20)})
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
    assert out.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk():
    found = write_error(Path("/dev/full"))
    assert found is not None
    assert found.errno == errno.ENOSPC


def test_a_disk_with_room_is_not_blamed(tmp_path, monkeypatch):
    def broken(content, path):
        raise RuntimeError("unexpected pos 64 vs 0\nand more")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(InputError, match=r"out.pth: cannot be written \(unexpected pos 64 vs 0\)$"):
        saving.write(tmp_path / "out.pth", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")]
)
def test_every_writer_says_it(number, says, tmp_path):
    expected = rf"^json: .*: {os.strerror(number)} \({says}\)$"
    with pytest.raises(InputError, match=expected), atomic_write(tmp_path / "x.json", "json"):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())
