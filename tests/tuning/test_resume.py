"""The file of a search: what is read back, and where it cannot be written."""

from pathlib import Path

import pytest

from dvit_infer.errors import InputError
from dvit_infer.tuning.quality import Tally
from dvit_infer.tuning.resume import SearchFile
from dvit_infer.tuning.search import Found


def test_a_cache_that_cannot_be_written_is_none(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    file = SearchFile(None, "key")
    file.save(Found())
    assert file.read() is None
    file.remove()
    with pytest.raises(InputError, match=r"^search: /dev/null/here"):
        SearchFile(Path("/dev/null/here"), "key").save(Found())


@pytest.mark.parametrize(
    "tally", ["1", "[1]", '{"images": 1}', '{"images": "x", "loss": 0, "squares": 0, "complete": 1}']
)
def test_a_damaged_file_counts_as_none(tally, tmp_path):
    file = SearchFile(tmp_path / "search.json", "key")
    file.path.write_text(f'{{"version": 1, "key": "key", "times": {{}}, "tallies": {{"a": {tally}}}}}')
    assert file.read() is None
    file.save(Found({"a": Tally(3, 1.0, 1.0, True)}))
    assert file.read().tallies == {"a": Tally(3, 1.0, 1.0, True)}
