"""The kernels that are compiled beforehand for the GPU suite: recorded, packed, unpacked where Triton finds them."""

import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from pretended_gpu import _on_an_h100  # noqa: F401 (fixtures are found by being there)

sys.path.append(str(ROOT / "bench"))
import kernel_cache
from forwards import checkpoint


@pytest.fixture
def packed(tmp_path):
    """A cache of one kernel, as Triton leaves it, packed for Triton's own key and sm_90."""
    pytest.importorskip("triton")
    from triton.runtime.cache import triton_key

    kernel = tmp_path / "made" / "ABC"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ptx", "k.ttir", "__grp__k.json"):
        (kernel / name).write_text(f"{name} of /elsewhere")
    manifest = {"triton_key": kernel_cache.short(triton_key()), "target": "sm_90"}
    path = tmp_path / "kernels.tar.xz"
    assert kernel_cache.pack(tmp_path / "made", manifest | {"sources": kernel_cache.fingerprint()}, path) == 1
    return path


@pytest.mark.usefixtures("_on_an_h100")
def test_compiled_kernels_are_unpacked_where_triton_finds_them(packed, tmp_path, monkeypatch):
    line = kernel_cache.unpack(packed)
    assert line.startswith("compiled kernels: HIT: 1 for Triton's key ")
    folder = tmp_path / "cache" / "ABC"
    assert sorted(path.name for path in folder.iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    from triton.runtime.cache import FileCacheManager

    manager = FileCacheManager("ABC")
    assert manager.get_group("k.json") == {name: str(folder / name) for name in ("k.cubin", "k.json")}

    monkeypatch.setattr(kernel_cache, "fingerprint", lambda: {"linear.py": "another"})
    assert "HIT in part, 1 files of kernels have changed since: 1 for" in kernel_cache.unpack(packed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "MISS, the GPU is sm_80, they are for sm_90" in kernel_cache.unpack(packed)
    monkeypatch.setattr("triton.runtime.cache.triton_key", lambda: "another Triton")
    assert "MISS, Triton's key is " in kernel_cache.unpack(packed)
    assert "MISS, none were taken along" in kernel_cache.unpack(tmp_path / "nothing.tar.xz")
    for content in (b"", b"no archive", packed.read_bytes()[:90]):
        (tmp_path / "broken.tar.xz").write_bytes(content)
        assert "broken.tar.xz cannot be read (" in kernel_cache.unpack(tmp_path / "broken.tar.xz")


@pytest.mark.interpreter
def test_launches_are_recorded_and_nothing_is_launched(monkeypatch):
    """Every kernel of a forward, its tensors without memory, with programmatic launches and without."""
    build = pytest.importorskip("kernel_cache_build")
    monkeypatch.setattr(build, "ARCHS", ("dynamicvit-deit-s", "dynamicvit-lvvit-s"))
    monkeypatch.setattr(build, "checkpoint", lambda arch, dry: checkpoint(arch, True))
    launches = list(build.recorded())
    names = {launch.kernel.__name__ for launch in launches}
    assert names >= {"_linear_kernel", "_attention_kernel", "_project_kernel", "_score_kernel", "_select_kernel"}
    assert names >= {"_patch_embedding_kernel"}
    assert {launch.arguments["PDL"] for launch in launches} == {True, False}
    tensors = [v for launch in launches for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    assert all(tensor.is_meta for tensor in tensors)
    assert torch.uint8 in {tensor.dtype for tensor in tensors}


def test_a_key_is_that_of_another_triton_of_the_same_version_alone(tmp_path):
    build = pytest.importorskip("kernel_cache_build")
    import triton
    from triton.runtime.cache import triton_key

    here, other = Path(triton.__file__).parent, tmp_path / "triton"
    (other / "_C").mkdir(parents=True)
    for entry in here.iterdir():
        if entry.name != "_C":
            (other / entry.name).symlink_to(entry)
    (other / "_C" / "libtriton.so").write_bytes(b"of another Python")
    key = build.key_for(tmp_path)
    assert key != triton_key()
    assert len(key) == len(triton_key())
    (other / "__init__.py").unlink()
    with pytest.raises(SystemExit, match=r"__init__\.py: is not the same as Triton"):
        build.key_for(tmp_path)
