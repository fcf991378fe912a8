"""Small calls of every op that has a kernel, and kernels that fail or answer wrongly."""

import importlib

import pytest
import torch
from routing_inputs import make_branches, make_order

import dvit_infer as dvit
from dvit_infer.ops.attention import attention, attention_with_signal
from dvit_infer.ops.choices import Choices
from dvit_infer.ops.keep_tokens import keep_tokens
from dvit_infer.ops.layer_norm import layer_norm, row_stats
from dvit_infer.ops.linear import linear, row_sums
from dvit_infer.ops.merge_tokens import merge_tokens
from dvit_infer.ops.patch_embedding import pack_patch_embedding, patch_embedding
from dvit_infer.ops.routed_mlp import routed_mlp

TRITON = Choices(otherwise="triton")


def make_rows(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_linear(dim_in, dim_out, dtype):
    return (make_rows(dim_out, dim_in, seed=3) * 0.2).to(dtype), make_rows(dim_out, seed=4).to(dtype)


def call_linear(dtype):
    x, (weight, bias) = make_rows(3, 5, 32).to(dtype), make_linear(32, 48, dtype)
    return linear(x, weight, bias, make_rows(3, 5, 48, seed=2).to(dtype), row_sums(weight))[0]


def call_statistics(dtype):
    """Those that a linear leaves."""
    x, (weight, bias) = make_rows(3, 5, 32).to(dtype), make_linear(32, 64, dtype)
    return linear(x, weight, bias, stats_block=64)[1]


def call_attention(dtype):
    return attention(*make_rows(2, 7, 3 * 2 * 16).to(dtype).view(2, 7, 3, 2, 16).unbind(2))


def call_pair_attention(dtype):
    """Images take turns with three biases; the check looks at the first two images and the last two."""
    qkv = make_rows(6, 7, 3 * 2 * 16).to(dtype).view(6, 7, 3, 2, 16).unbind(2)
    return attention(*qkv, bias=make_rows(6, 7, seed=2), pair_bias=make_rows(3, 2, 7, 7, seed=3))


def call_signal(leaves):
    """The result or the signal: both are checked."""

    def call(dtype):
        q, k, v = make_rows(2, 7, 3 * 2 * 16).to(dtype).view(2, 7, 3, 2, 16).unbind(2)
        return attention_with_signal(q, k, v, None, make_rows(2, 7, seed=2), leaves)[1]

    return call


def call_merge_tokens(dtype):
    return merge_tokens(make_rows(3, 21, 64).to(dtype), make_rows(3, 21, 16, seed=2), make_rows(3, 21).exp(), 6)[0]


def call_keep_tokens(dtype):
    return keep_tokens(make_rows(3, 21, 64).to(dtype), make_rows(3, 2, 21, seed=2).softmax(dim=-1), 12)[0]


def call_patch_embedding(dtype):
    weight, table = (make_rows(*size) for size in ((32, 3, 4, 4), (1, 7, 32)))
    packed = pack_patch_embedding(weight, None, make_rows(1, 1, 32), table, dtype)
    return patch_embedding(make_rows(3, 3, 8, 12), *packed, 4)


def call_routed_mlp(which):
    """The result or its statistics: both are checked."""

    def call(dtype):
        x, (mlp, fast) = make_rows(3, 21, 64).to(dtype), make_branches(64, 48, dtype)
        return routed_mlp(x, x, make_order(3, 21, 12), 12, mlp, fast, stats_block=64)[which]

    return call


def make_state():
    """A predictor's weights, for 64 channels."""
    state, half = {}, 32
    for seed, (name, shape) in enumerate(
        {
            **{"in_conv.0.weight": (64,), "in_conv.0.bias": (64,), "in_conv.1.weight": (64, 64)},
            **{"in_conv.1.bias": (64,), "out_conv.0.weight": (half, 64), "out_conv.0.bias": (half,)},
            **{"out_conv.2.weight": (16, half), "out_conv.2.bias": (16,), "out_conv.4.weight": (2, 16)},
            "out_conv.4.bias": (2,),
        }.items()
    ):
        state[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return state


def call_prune_tokens(dtype):
    return dvit.prune_tokens(make_rows(3, 21, 64).to(dtype), make_state(), 12)[0]


# Op, where its launcher is, a call of it, which of the launcher's results is made wrong.
OPS = [
    pytest.param("linear", "linear", call_linear, 0, id="linear"),
    pytest.param("linear", "linear", call_statistics, 1, id="statistics"),
    pytest.param("attention", "attention", call_attention, None, id="attention"),
    pytest.param("attention", "attention", call_pair_attention, None, id="pair_bias"),
    pytest.param("layer_norm", "layer_norm", lambda d: layer_norm(make_rows(3, 5, 40).to(d)), None, id="layer_norm"),
    pytest.param("row_stats", "layer_norm", lambda d: row_stats(make_rows(7, 5, 40).to(d)), None, id="row_stats"),
    pytest.param("patch_embedding", "patch_embedding", call_patch_embedding, None, id="patch_embedding"),
    pytest.param("prune_tokens", "prune_tokens", call_prune_tokens, 0, id="prune_tokens"),
    pytest.param("attention_with_signal", "attention", call_signal("mean_keys"), 1, id="mean_keys"),
    pytest.param("attention_with_signal", "attention", call_signal("class_attention"), 1, id="class_attention"),
    pytest.param("merge_tokens", "merge_tokens", call_merge_tokens, 0, id="merge_tokens"),
    pytest.param("keep_tokens", "keep_tokens", call_keep_tokens, 0, id="keep_tokens"),
    pytest.param("routed_mlp", "routed_mlp", call_routed_mlp(0), 0, id="routed_mlp"),
    pytest.param("routed_mlp", "routed_mlp", call_routed_mlp(1), 1, id="routed_mlp-stats"),
]


class CompilationError(Exception):
    """Stands for the compiler's own kind."""


def does_not_compile(out):
    raise CompilationError("error: at 1:0: no such layout")


def does_not_launch(out):
    raise RuntimeError("Triton Error [CUDA]: invalid argument")


def one_nan(out):
    out = out.clone()
    out.view(-1)[0] = float("nan")
    return out


def one_percent_off(out):
    return out * 1.01


def all_of(launcher, fault, which):
    """The launcher with a fault in one of its results; and how often it was called."""
    calls = []

    def faulty(*given, **named):
        calls.append(1)
        out = launcher(*given, **named)
        return fault(out) if which is None else tuple(fault(o) if i == which else o for i, o in enumerate(out))

    return faulty, calls


def break_kernel(monkeypatch, op, module, fault, which):
    home, name = importlib.import_module(f"dvit_kernels.{module}"), f"launch_{op}"
    faulty, calls = all_of(getattr(home, name), fault, which)
    monkeypatch.setattr(home, name, faulty)
    return calls
