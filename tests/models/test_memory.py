"""What converting a large file needs in memory, by a process of its own (Linux)."""

import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

DIM, HIDDEN, BLOCKS, CLASSES = 1408, 6144, 4, 1000  # of ViT-g/14, which has 40 blocks

CONVERT = """
import ctypes, gc, sys
import torch
import dvit_infer as dvit

small, path, backend = sys.argv[1:]
known = dict(device="cpu", backend=backend, assume={"num_heads": 16})
dvit.convert(small, **known)(torch.zeros(1, 3, 224, 224))  # libraries and their threads are there then
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
print("ready", flush=True)
sys.stdin.readline()
engine = dvit.convert(path, **known)
print("done", flush=True)
sys.stdin.readline()
"""


def peak_of_converting(small, path, backend):
    """The most memory, in bytes, that a process needs in addition to what it has before it converts a model.

    By PyTorch it is the kernel's peak of all resident pages. While OpenVINO reads its mapped model, a thread gives back
    pages, and how many are there for a moment depends on when it runs; the system may take them at any time. So there
    it is anonymous memory, of which the kernel keeps no peak, seen every millisecond.
    """
    what = "VmHWM" if backend == "torch" else "RssAnon"
    with subprocess.Popen(
        [sys.executable, "-c", CONVERT, small, path, backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the kernel's peak is measured from now on
        before = peak = resident(process.pid, what)
        print(file=process.stdin, flush=True)
        while not select.select([process.stdout], [], [], 0.001)[0]:
            peak = max(peak, resident(process.pid, what))
        assert process.stdout.readline() == "done\n"
        peak = max(peak, resident(process.pid, what))
    assert process.returncode == 0
    return peak - before


def resident(pid, what):
    """Bytes of a kind of memory of a process."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def write(path, dim, hidden, blocks):
    shapes = {
        **{"cls_token": (1, 1, dim), "pos_embed": (1, 257, dim), "patch_embed.proj.weight": (dim, 3, 14, 14)},
        **{"patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)},
        **{"head.weight": (CLASSES, dim), "head.bias": (CLASSES,)},
    }
    for i in range(blocks):
        for name, (out, width) in {
            **{"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)},
            **{"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)},
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": (out, width), f"blocks.{i}.{name}.bias": (out,)}
        shapes |= {f"blocks.{i}.norm{n}.{part}": (dim,) for n in (1, 2) for part in ("weight", "bias")}
    state = {name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("backend", "suffix"), [("openvino", "safetensors"), ("openvino", "pth"), ("torch", "safetensors")]
)
def test_converting_a_giant_needs_little_more_than_its_weights(backend, suffix, tmp_path, monkeypatch):
    if backend == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "small.pth", 64, 128, 1)
    write(giant := tmp_path / f"giant.{suffix}", DIM, HIDDEN, BLOCKS)
    assert peak_of_converting(tmp_path / "small.pth", giant, backend) < 1.2 * giant.stat().st_size
