"""What an engine holds in OpenVINO: its packed weights, and neither PyTorch's nor the mapped ones (Linux)."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino")

MEASURE = """
import ctypes, gc, re, sys
from pathlib import Path
import torch
import dvit_infer as dvit

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", status)[1])

small = dvit.load(sys.argv[1], device="cpu")  # libraries and their threads are there then
small(torch.zeros(1, 3, *small.config.image_size))
before = resident()
engine = dvit.load(sys.argv[2], device="cpu")
loaded = resident()
engine(torch.zeros(1, 3, *engine.config.image_size))
weights = sum(w.numel() * w.element_size() for node in engine.outline.nodes for w in node.weights.values())
print((loaded - before) / weights, (resident() - before) / weights, engine.runner.runtime)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_engine_holds_no_more_than_its_weights(tmp_path, monkeypatch):
    """At most 1.3 times them; after a call, the buffers of that call too."""
    import dvit_infer as dvit
    from dvit_infer.models.example import example_checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = []
    for arch in ("dynamicvit-deit-t", "dynamicvit-deit-s"):
        names.append(str(tmp_path / f"{arch}.safetensors"))
        dvit.convert(example_checkpoint(arch), device="cpu", backend="torch").save(names[-1])
    for _ in range(2):  # written to the cache, then read from it
        done = subprocess.run([sys.executable, "-c", MEASURE, *names], capture_output=True, text=True, check=True)
        loaded, called, runtime = done.stdout.split(" ", 2)
        assert runtime.startswith("OpenVINO")
        assert float(loaded) < 1.3
        assert float(called) < 1.3 + 0.3
