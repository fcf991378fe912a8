"""A machine with an Apple GPU, as far as a CPU can pretend: what would go there stays here."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dvit_infer.graph.graph import Graph

MPS = torch.device("mps", 0)


def _here(value):
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "mps" else value


class _StaysHere(TorchFunctionMode):
    """Replace the device by the CPU in every call of PyTorch, and refuse float64, which MPS lacks."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        moves = any(isinstance(v, torch.device) and v.type == "mps" for v in (*args, *kwargs.values()))
        assert not (moves and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64)
        return function(*map(_here, args), **{name: _here(value) for name, value in kwargs.items()})


@pytest.fixture
def on_a_mac(monkeypatch):
    """Return a context in which the device mps is there."""

    @contextlib.contextmanager
    def pretend():
        with monkeypatch.context() as patched, _StaysHere():
            patched.setattr(torch.backends.mps, "is_available", lambda: True)
            patched.setattr(torch.mps, "synchronize", lambda: None)
            patched.setattr(torch.mps, "recommended_max_memory", lambda: 10 << 20)
            patched.setattr(torch.mps, "driver_allocated_memory", lambda: 4 << 20)
            patched.setattr(Graph, "device", property(lambda graph: MPS))
            patched.delenv("DVIT_KERNELS", raising=False)
            yield

    return pretend
