"""Pages of mapped files are given back, and what was read stays what it is (Linux)."""

import mmap
import re
import time
from pathlib import Path

import pytest

from dvit_infer.utils.mapping import release_file, release_part, released_meanwhile

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
SIZE = 4 << 20


@pytest.fixture
def path(tmp_path):
    (path := tmp_path / "weights").write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def mapped(path, access=mmap.ACCESS_READ):
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def resident(path):
    """Bytes of a mapped file that are in memory."""
    found = re.search(rf"{path}\n(?:.+\n)*?Rss:\s+(\d+) kB", Path("/proc/self/smaps").read_text())
    return 1024 * int(found[1])


def test_a_file_is_given_back(path):
    with mapped(path) as pages:
        content = pages[:]
        assert resident(path) == SIZE
        release_file(path)
        assert resident(path) == 0
        assert pages[:] == content


def test_a_private_mapping_keeps_what_was_written_to_it(path):
    with mapped(path, mmap.ACCESS_COPY) as pages:
        pages[:3] = b"own"
        release_file(path)
        assert pages[:3] == b"own"


def test_a_part_is_given_back_in_whole_pages(path):
    torch = pytest.importorskip("torch")
    with mapped(path, mmap.ACCESS_COPY) as pages:
        tensor = torch.frombuffer(pages, dtype=torch.uint8)
        total = tensor.sum()
        release_part(tensor.data_ptr() + 1, mmap.PAGESIZE)  # no whole page
        assert resident(path) == SIZE
        release_part(tensor.data_ptr() + 1, SIZE // 2)
        assert resident(path) <= SIZE // 2 + mmap.PAGESIZE  # of a huge page the system takes all
        assert tensor.sum() == total
        del tensor


def test_it_is_given_back_while_another_reads(path):
    with mapped(path) as pages:
        with released_meanwhile(path, seconds=0.001):
            assert len(pages[:]) == SIZE
            end = time.monotonic() + 60
            while resident(path):
                assert time.monotonic() < end
            pages[:]
        assert resident(path) == 0
