"""NumPy archives of JAX's vision_transformer and big_vision as sources."""

import contextlib
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from owners_files import file_of, same

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.npz_file import read_npz


def arrays(case: str = "npz-augreg-tiny") -> dict[str, np.ndarray]:
    return {key: w.numpy() for key, w in file_of(case).items()}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_file(write, tmp_path):
    for case in ("npz-augreg-tiny", "npz-bv-stacked-map"):
        write(tmp_path / "a.npz", **arrays(case))
        assert same(read_checkpoint(tmp_path / "a.npz"), read_checkpoint(file_of(case)))
    turned = {key: np.asfortranarray(array) for key, array in arrays().items()}
    write(tmp_path / "b.npz", **turned)
    assert same(read_checkpoint(tmp_path / "b.npz"), read_checkpoint(file_of("npz-augreg-tiny")))


def test_an_npz_file_with_the_bytes_of_bfloat16_and_an_optimiser(tmp_path):
    small = {key: w.bfloat16() for key, w in file_of("npz-augreg-tiny").items()}
    stored = {f"opt/target/{key}": w.view(torch.int16).numpy().view("V2") for key, w in small.items()}
    np.savez(tmp_path / "a.npz", **stored, **{"opt/state/step": np.array(3)})
    found = read_checkpoint(tmp_path / "a.npz")
    assert same(found, read_checkpoint(small))
    assert found.left_over == (("opt/state/*", "the optimiser's state"),)


def test_an_npz_file_that_is_damaged_or_of_something_else(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(3))
    with pytest.raises(
        dvit.InputError, match=r"a\.npz: is a NumPy archive .* of no vision transformer .first name 'a'"
    ):
        read_checkpoint(path)
    np.savez(path, **arrays(), x=np.array([{}], dtype=object))
    with pytest.raises(dvit.InputError, match="an array of objects, which would run code"):
        read_checkpoint(path)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.npy", buffer.getvalue())
    with pytest.raises(dvit.InputError, match=r"damaged NumPy archive .an array of another size"):
        read_checkpoint(path)
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(dvit.InputError, match="damaged"):
        read_checkpoint(path)


def peak_of(path: Path) -> int:
    """The most memory that reading takes at a time, in arrays and Python's own, also if it is an error."""
    tracemalloc.start()
    try:
        with contextlib.suppress(dvit.InputError):
            read_npz(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_npz_file_that_unpacks_to_many_times_its_size_is_not_read(tmp_path):
    path, size = tmp_path / "a.npz", 64 << 20
    np.savez_compressed(path, **arrays() | {"head/bias": np.zeros(size // 4, np.float32)})
    assert path.stat().st_size < size / 20
    with pytest.raises(dvit.InputError) as caught:
        read_checkpoint(path)
    assert "MiB whose arrays would take 6" in str(caught.value)
    assert "over 20 times as much, as trained weights never do" in str(caught.value)
    assert peak_of(path) < 8 << 20


@pytest.mark.slow
def test_an_npz_file_is_read_once_and_only_for_names_that_are_known(tmp_path):
    path, size = tmp_path / "a.npz", 64 << 20
    big = np.random.default_rng(0).random((96, size // 4 // 96), np.float32)
    for write in (np.savez, np.savez_compressed):
        write(path, **arrays() | {"head/kernel": big})
        assert size * 0.9 < peak_of(path) < size * 1.2
        write(path, **arrays() | {"junk": big})
        with pytest.raises(dvit.InputError, match=r"a\.npz: unexpected key junk: the ViT of JAX's .* has no such name"):
            read_checkpoint(path)
        assert peak_of(path) < 8 << 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'descr': '<U5', 'fortran_order': False, 'shape': (1,)}", "an array of <U5"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -5)}", "an array of another size than its data"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 9000 + "5}", ""),
        ("(" * 9000, ""),
        ("{'descr': 3, 'fortran_order': 'x'", ""),
    ],
)
def test_an_npz_file_with_a_header_that_is_none(text, said, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        content = text.encode() + b"\n"
        archive.writestr("b.npy", b"\x93NUMPY\x01\0" + len(content).to_bytes(2, "little") + content + bytes(20))
    with pytest.raises(dvit.InputError, match=rf"a\.npz: damaged NumPy archive \({said}"):
        read_checkpoint(path)


def test_an_npz_file_that_is_packed_in_another_way_or_whose_data_changed(tmp_path):
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_LZMA) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(dvit.InputError, match=r"b\.npz: damaged NumPy archive .packed in another way than NumPy does"):
        read_checkpoint(other)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(dvit.InputError, match=r"a\.npz: damaged NumPy archive .Bad CRC-32 for file"):
        read_checkpoint(path)
