"""What a file of a plain ViT, and a config beside it, say of its sizes, its pooling and its positions."""

import pytest
import torch
from any_vit import tiny

import dvit_infer as dvit
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph import fold
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.registry import recognise

OPTIONS = {"image_size": None, "method": None}


def read(state, given=None, **args):
    """The config of a state dict beside a config.json of timm with these `model_args`."""
    checkpoint = read_checkpoint(state)
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 10}
    checkpoint.beside = {
        "config.json": {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": sizes | args}
    }
    return recognise(checkpoint, None, given or {}, OPTIONS)


@pytest.mark.parametrize("kind", ["deit", "dinov2"])
def test_a_grid_that_a_class_token_makes_a_square_is_the_stated_one(kind):
    state = tiny(kind, size=(56, 72)).state  # 7 x 9 patches and a class token: 64 rows
    config, notes = read(state, img_size=[56, 72])
    assert config.trained_size == config.image_size == (56, 72)
    assert not config.body.no_embed_class
    assert any(note.what == "trained_size" and "model_args.img_size" in note.why for note in notes)
    square, _ = read(state, img_size=64)
    assert square.trained_size == (64, 64)
    assert square.body.no_embed_class


def test_a_stated_size_that_does_not_fit_is_the_size_to_run_at():
    config, notes = read(tiny("dinov2", size=(32, 32)).state, img_size=[40, 48])
    assert (config.trained_size, config.image_size) == ((32, 32), (40, 48))
    assert any(note.what == "pos_embed" and note.value == "resampled" for note in notes)


def test_a_distilled_model_without_classifier_reads_both_tokens():
    model = tiny("distilled-headless")
    images = model.images()
    with torch.no_grad():
        expected = model.reference().evaluate(images)
    both = expected.tokens[:, :2].mean(dim=1)
    torch.testing.assert_close(expected.logits, both)
    for graph in (model.graph(), fold(model.graph())):
        torch.testing.assert_close(TorchRunner(graph).run(images).x, both, atol=1e-5, rtol=0)
    assert fold(model.graph()).nodes[-1].tokens == 2


def test_any_rule_of_resampling_can_be_asked_for():
    state = tiny("deit", size=(48, 48)).state
    images = tiny("deit", size=(32, 32)).images()
    outputs = {}
    for rule in ("timm", "huggingface", "meta", "big_vision", "siglip2", "torchvision"):
        engine = dvit.convert(state, image_size=32, assume={"num_heads": 2, "resample": rule}, device="cpu")
        outputs[rule] = engine(images)
        assert any(note.what == "resample" and note.value == rule for note in engine.notes) or rule == "timm"
    for rule, logits in outputs.items():
        others = [other for name, other in outputs.items() if name != rule]
        assert all((logits - other).abs().max() > 1e-3 for other in others), rule


@pytest.mark.parametrize("rope", [{"kind": "index"}, {"foo": 1}, "spiral", 3])
def test_only_names_of_rotary_positions_may_be_given(rope):
    with pytest.raises(dvit.InputError, match=r"^rope: .* is not one of none, dinov3, eva02"):
        dvit.convert(tiny("dinov3").state, assume={"num_heads": 2, "rope": rope}, device="cpu")


@pytest.mark.parametrize("fact", ["embed_dim", "depth", "patch_size", "num_classes"])
def test_a_contradiction_names_both_sides(fact):
    with pytest.raises(dvit.InputError, match=f"says {fact} 1234, but its weights have "):
        read(tiny("dinov2").state, **{fact: 1234})


def test_equal_tables_of_places_are_held_once():
    for kind, shared in (("eva02", True), ("beit-shared", True), ("beit", False)):
        graph = fold(tiny(kind, size=(32, 32)).graph()).to(torch.device("cpu"), torch.bfloat16)
        tables = [node.weights.get("sin", node.weights.get("pair_bias")) for node in graph.nodes]
        first, second = (table for table in tables if table is not None)
        assert (first.data_ptr() == second.data_ptr()) == shared, kind
        assert first.dtype == torch.float32
