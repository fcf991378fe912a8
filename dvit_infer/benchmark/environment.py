"""The environment as text, for a report of a bug or of a speed. No model is needed."""

import os
import platform
from collections.abc import Iterator

import torch

import dvit_infer
from dvit_infer.backends import default_backend
from dvit_infer.benchmark.results import cpu_name, environment, package_version
from dvit_infer.errors import InputError
from dvit_infer.utils.cpu_quota import cpu_quota
from dvit_infer.utils.devices import free_memory, resolve_device
from dvit_infer.utils.threads import SETTINGS, affinity_threads, describe_threads

PACKAGES = (
    *("torch", "triton", "openvino", "onnxruntime", "onnx"),
    *("numpy", "safetensors", "Pillow", "timm", "transformers"),
)
# Variables that change which code runs, or how fast, beside every DVIT_*.
_VARIABLES = (*SETTINGS, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def describe_environment() -> str:
    """Return what a report needs, a fact a line: versions, processor, memory, GPUs, default backend, variables."""
    return "\n".join(f"{what:<11}{value}" for what, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    where = environment()
    commit = f", commit {where['commit']}" if where["commit"] else ""
    yield "dvit-infer", f"{dvit_infer.__version__}{commit}"
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    versions = {name: package_version(name) for name in PACKAGES} | {"torch": where["torch"]}
    yield "packages", ", ".join(f"{name} {version or '-'}" for name, version in versions.items())
    quota = cpu_quota()
    allowed = f"{affinity_threads()} of {os.cpu_count()} CPUs, quota {'none' if quota is None else f'{float(quota):g}'}"
    yield "processor", f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}); {allowed}; {describe_threads()}"
    yield "memory", _memory()
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}", f"{_gpu(index)}, driver {where['driver'] or 'unknown'}, CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        yield "GPU", f"none that CUDA finds; torch is built {built}"
    device = resolve_device(None)
    try:
        backend, why_not = default_backend(device)
    except InputError as error:  # a variable that is not what it should be: the last line shows it, too
        backend, why_not = "none", str(error)
    yield "backend", f"{backend} on {device}: {why_not or 'the fastest that is installed'}"
    given = [name for name in sorted(os.environ) if name.startswith("DVIT_") or name in _VARIABLES]
    yield "variables", ", ".join(f"{name}={os.environ[name]}" for name in given) or "none"


def _memory() -> str:
    free = free_memory(torch.device("cpu"))
    if free is None or not hasattr(os, "sysconf"):
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.1f} GiB"
