"""What is read and assumed of models of four stages, and what of them is refused in one line."""

import json

import pytest
import torch
from hierarchical_cases import checkpoint, images, state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.registry import recognise

SWIN, CNN, TIMM = "tiny-swin-r0.7-s1", "tiny-cnn-r0.7-s1", "timm-tiny-swin-tame"


def read(source, **given):
    options = {name: given.pop(name) for name in ("image_size", "method") if name in given}
    config, notes = recognise(read_checkpoint(source), None, given, options)
    return config, {note.what: note for note in notes}


def table(rows: int) -> dict[str, torch.Tensor]:
    """DynamicSwin with other tables in its first stage."""
    state = state_dict(SWIN)
    return state | {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(rows, 1)}


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        (lambda: table(170), {}, "has 170 rows, which are those of no window; one of 7x7 has 169"),
        (lambda: table(25), {}, "224x224 cuts windows of 3x3 in stage 0"),
        (
            lambda: checkpoint(SWIN),
            {"image_size": 256},
            "256x256 cuts windows of 7x7 in stage 0; multiples",
        ),
        (lambda: state_dict(TIMM), {"image_size": 226}, "image_size: 226x226 is not a multiple of the patch size 4"),
        (lambda: state_dict(TIMM), {"trained_size": 160}, "trained_size: 160x160 has other windows than 7,7,7,7"),
        (lambda: checkpoint(CNN), {"image_size": 24}, "image_size: 24x24 is under 32 pixels"),
        (lambda: checkpoint(SWIN), {"prune_at": (1, 2, 4)}, "prune_at: there is no block 4"),
        (lambda: checkpoint(CNN), {"prune_at": (0, 1, 2)}, "prune_at: block 0 of the third stage has no fast path"),
        (
            lambda: checkpoint(SWIN),
            {"keep_rate": 0.3},
            r"keep_rate: 0.3 makes -0.1 at stage 2.* r, r-0.2, r-0.4; a rate",
        ),
        (lambda: checkpoint(SWIN), {"keep_rate": 0.4}, "keep_rate: a keep rate of 0.4 leaves no patch token"),
        (
            lambda: checkpoint(SWIN),
            {"method": "tome"},
            "method: 'tome' removes tokens, but windows and convolutions need all of them; .* takes predictor, none",
        ),
        (lambda: checkpoint(SWIN), {"merge": 8}, "merge: means nothing for dynamicswin"),
        (lambda: checkpoint(SWIN), {"method": "best"}, "method: 'best' is not one of predictor, none"),
        (lambda: state_dict(TIMM), {"method": "predictor"}, "holds none; 'none' runs it dense"),
        (
            lambda: state_dict(TIMM),
            {"keep_rate": 0.7},
            "keep_rate: state dict holds no score predictors, so it runs dense",
        ),
        (lambda: state_dict(SWIN) | {"layers.1.surprise": torch.ones(3)}, {}, "unexpected key layers.1.surprise"),
        (
            lambda: {k: w for k, w in state_dict(CNN).items() if "fast_path" not in k},
            {},
            "holds 3 score predictors, but no block with a fast path",
        ),
        (
            lambda: {k: w for k, w in state_dict(CNN).items() if not k.startswith("stages.3")},
            {},
            "has 3 stages of 1, 1, 4 blocks; 4 with blocks are expected",
        ),
    ],
)
def test_what_is_impossible_is_named_in_one_line(source, given, message):
    assume = {name: given.pop(name) for name in ("trained_size",) if name in given}
    with pytest.raises(dvit.InputError, match=message) as caught:
        dvit.load_reference(source(), assume=assume, **given)
    assert "\n" not in str(caught.value)


def test_sizes_and_blocks_are_read_or_assumed_aloud():
    config, notes = read(checkpoint(SWIN))
    assert notes["trained_size"].how == "read"  # by the masks
    assert config.num_keep == (137, 97, 58)
    assert notes["prune_at"].value == "1,2,3"
    assert notes["prune_at"].how == "assumed"
    config, notes = read(state_dict(TIMM), image_size=(192, 256))
    assert notes["trained_size"].how == "assumed"
    assert config.body.shifts(config.trained_size) == [3, 3, 3, 0]
    assert read(checkpoint(SWIN), image_size=448)[0].num_patches == 784
    wide = {
        key: torch.zeros(23 * 23, w.shape[1]) if key.endswith("bias_table") else w
        for key, w in state_dict(TIMM).items()
    }
    assert read(wide)[0].trained_size == (384, 384)


def test_another_rate_and_the_dense_counterpart():
    config, _ = read(checkpoint(CNN), keep_rate=0.9)
    assert config.num_keep == (176, 137, 98)
    dense = dvit.convert(checkpoint(CNN), device="cpu", method="none")
    assert dense.params < dvit.convert(checkpoint(CNN), device="cpu").params
    assert dvit.verify(dense, checkpoint(CNN), num_images=2).passed


@pytest.mark.slow
@pytest.mark.parametrize("case", [SWIN, CNN])
def test_references_are_exported_for_any_batch(case):
    """dvit-bench has OpenVINO and ONNX Runtime run them; the exporter to ONNX would fix the batch without a word."""
    model, two = dvit.load_reference(checkpoint(case)), images(case)[:1].repeat(2, 1, 1, 1)
    any_batch = {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (two,), dynamic_shapes=any_batch, strict=False).module()
    three = two[:1].repeat(3, 1, 1, 1)
    torch.testing.assert_close(exported(three), model(three))


def test_given_positions_are_used_and_checked():
    engine = dvit.convert(checkpoint(SWIN), device="cpu")
    x = images(SWIN)[:2]
    logits, kept = engine(x, return_kept=True)
    assert torch.equal(engine(x, kept=kept), logits)
    others = [torch.arange(stage.shape[1]).expand_as(stage) + 196 - stage.shape[1] for stage in kept]  # not nested
    changed = engine(x, kept=others)
    with torch.no_grad():
        expected = dvit.load_reference(checkpoint(SWIN))(x, kept=others)
    assert (changed - expected).abs().max() < 2e-5 < (changed - logits).abs().max()
    with pytest.raises(ValueError, match=r"kept: stage 2 is not ascending positions from 0 to 195$"):
        engine(x, kept=[*kept[:2], kept[2] + 196])
    tokens, positions = engine.tokens(x)
    assert tokens.shape[:2] == positions.shape == (2, 49)


def test_headers_of_saved_files_are_checked(tmp_path):
    engine = dvit.convert(state_dict(TIMM), device="cpu", image_size=(192, 256))
    engine.save(tmp_path / "m.safetensors")
    again = dvit.load(tmp_path / "m.safetensors", device="cpu", image_size=224)
    assert (again.config.body, again.config.image_size) == (engine.config.body, (224, 224))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        header = json.loads(file.metadata()["dvit_infer"])
    state = load_file(tmp_path / "m.safetensors")
    for change, message in (({"windows": [7, 7, 7]}, "one for each stage"), ({"depths": "x"}, "not a list of numbers")):
        body = header["config"]["body"] | change
        text = json.dumps(header | {"config": header["config"] | {"body": body}})
        save_file(state, tmp_path / "bad.safetensors", {"dvit_infer": text})
        with pytest.raises(dvit.InputError, match=message):
            dvit.load(tmp_path / "bad.safetensors")
