"""Weights in a loaded object: under any key, at any depth, under any prefix, with counters between them."""

import argparse

import numpy as np
import pytest
import torch
from golden_cases import official_checkpoint

import dvit_infer as dvit
from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import read_checkpoint

FULL = official_checkpoint("tiny-deit-r0.7-s1")
STATE: dict[str, torch.Tensor] = FULL["model"]
OTHER = {key: value + 1 for key, value in STATE.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": []}


def same(source, expected=STATE, weights=None) -> bool:
    found = read_checkpoint(source, weights).state
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("key", ["model_state_dict", "net", "params", "network", "ema_state_dict", "my weights"])
def test_any_key_that_alone_holds_weights(key):
    content = {
        key: STATE,
        "epoch": 3,
        "args": FULL["args"],
        "optimizer_state_dict": OPTIMIZER,
        "acc": torch.tensor(0.9),
    }
    found = read_checkpoint(content)
    assert (found.weights, found.other_sets, found.metadata["base_rate"]) == (key, (), 0.7)
    assert same(content)
    assert same(content, weights=key)
    engine = dvit.convert(content, assume={"num_heads": 2}, device="cpu")
    assert engine.config.weights == key
    assert ("weights", key) in [(note.what, note.value) for note in engine.notes]


def test_at_any_depth():
    deep = {
        "a": {"b": {"c": STATE, "args": argparse.Namespace(base_rate=0.5)}, "n": 3},
        "epoch": 1,
        "optim": {"x": OTHER},
    }
    assert read_checkpoint(deep).weights == "a.b.c"
    assert read_checkpoint(deep).metadata == {"base_rate": 0.5}
    assert same(deep)
    looped: dict = {"a": {"net": STATE}}
    looped["a"]["self"] = looped
    assert read_checkpoint(looped).weights == "a.net"


def test_several_are_named_and_one_can_be_picked():
    content = {"net": STATE, "nested": {"ema": OTHER}}
    with pytest.raises(
        InputError, match=rf"several state dicts: net \({len(STATE)} entries\), nested\.ema .*weights=KEY"
    ):
        read_checkpoint(content)
    assert same(content, OTHER, "nested.ema")
    assert read_checkpoint(content, "net").other_sets == ("nested.ema",)
    known = {"net": OTHER, "state_dict_ema": OTHER, "model": STATE}
    assert read_checkpoint(known).weights == "model"
    assert read_checkpoint(known).other_sets == ("state_dict_ema", "net")
    assert same(known, OTHER, "net")
    with pytest.raises(InputError, match=r"weights='none' is not in it; sets of weights there: net, nested\.ema"):
        read_checkpoint(content, "none")


def test_one_of_several_models_in_a_state_dict_can_be_picked():
    both = {f"student.{k}": v for k, v in STATE.items()} | {f"teacher.{k}": v for k, v in OTHER.items()}
    assert same({"state_dict": both}, OTHER, "state_dict.teacher")
    assert same(both, STATE, "student")
    chosen = {"num_heads": 2, "weights": "student"}
    engine = dvit.convert(both, assume=chosen, device="cpu")
    assert dvit.verify(engine, both, num_images=2).passed
    assert dvit.verify(engine, STATE, num_images=2).passed


def test_what_is_there_instead_is_named():
    with pytest.raises(InputError, match=r"holds no state dict .*its keys: epoch, config"):
        read_checkpoint({"epoch": 3, "config": {"a": 1}})
    with pytest.raises(InputError, match=r"NumPy arrays, not tensors"):
        read_checkpoint({"w": np.ones(3)})


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "module.model.", "model.module.", "model._orig_mod.", "model.backbone.encoder.", "a.b.c.d."],
)
def test_a_prefix_that_all_keys_share_is_stripped(prefix):
    assert same({"state_dict": {prefix + key: value for key, value in STATE.items()}})
    assert same({prefix + key: value for key, value in STATE.items()})


@pytest.mark.parametrize(
    "keys", [["blocks.0.w", "blocks.1.w"], ["head.weight", "head.bias"], ["model.w"], ["stack.0.w"]]
)
def test_the_name_of_a_part_is_not_stripped(keys):
    assert [*read_checkpoint({key: torch.ones(1) for key in keys}).state] == keys


def test_counters_and_buffers_are_skipped_and_named():
    extra = {
        "n_averaged": torch.tensor(12), "module.total_ops": torch.zeros(1, dtype=torch.float64),
        "module.blocks.0.total_params": torch.zeros(1), "module.embeddings.position_ids": torch.arange(5)[None],
    }  # fmt: skip
    content = {"state_dict": extra | {f"module.{key}": value for key, value in STATE.items()}, "args": FULL["args"]}
    assert same(content)
    assert read_checkpoint(content).skipped == tuple(extra)
    (note,) = [n for n in dvit.convert(content, assume={"num_heads": 2}, device="cpu").notes if n.what == "skipped"]
    assert "n_averaged" in note.value
    with pytest.raises(InputError, match="no state dict, only n_averaged"):
        read_checkpoint({"model": {"n_averaged": torch.ones(1)}})
    old = read_checkpoint({"bn.num_batches_tracked": torch.tensor([7]), "bn.weight": torch.ones(3)})
    assert old.state["bn.num_batches_tracked"].shape == ()
