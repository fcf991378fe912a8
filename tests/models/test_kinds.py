"""Files that no family reads are named as what they are."""

import numpy as np
import pytest
import torch
from golden_cases import CASES, keys_of, state_dict

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.models.kinds import describe


def dense() -> dict[str, torch.Tensor]:
    return {key: w for key, w in state_dict("tiny-deit", 1).items() if "predictor" not in key}


BLOCK = "blocks.0.norm1.weight"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["less_less_token.cls_token", "normal_token.cls_token"], "a Dynamic Vision Transformer (DVT)"),
        ([BLOCK, "score_predictor.0.in_conv.0.0.weight"], "SPViT"),
        (["visual.trunk.stem.0.weight", "text.x"], "open_clip's CLIP with an image tower that is no plain ViT"),
        (["visual.conv1.weight", "visual.layer1.0.conv1.weight", "text_projection"], "CLIP with a ResNet for images"),
        (["text_model.encoder.x", "logit_scale"], "a text model, as CLIP and SigLIP have"),
        (["text_model.embeddings.token_embedding.weight", "text_model.encoder.x"], "a text model"),
        (["bert.encoder.layer.0.attention.self.query.weight", "cls.x"], "a transformer under Hugging Face's names"),
        (
            ["swin.embeddings.patch_embeddings.projection.weight", "swin.encoder.layers.0.blocks.0.x"],
            "Hugging Face's Swin",
        ),
        (["convnext.encoder.stages.0.layers.0.dwconv.weight", "convnext.embeddings.x"], "Hugging Face's ConvNeXt"),
        ([BLOCK, "blocks_token_only.0.norm1.weight"], "CaiT"),
        (["layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.cpb_mlp.0.weight"], "Swin Transformer V2"),
        (["stages.0.blocks.0.mlp.grn.weight", "stages.0.blocks.0.conv_dw.weight"], "ConvNeXt V2"),
        ([BLOCK, "blocks.0.attn.pool_q.weight", "head.projection.weight"], "MViT"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "ResNet"),
        (["conv_stem.weight", "blocks.0.0.conv_dw.weight"], "EfficientNet"),
    ],
)
def test_other_families_are_named_in_one_line(keys, what):
    with pytest.raises(dvit.InputError, match="is not read yet; plain vision transformers") as caught:
        dvit.convert({key: torch.ones(3) for key in keys})
    line = str(caught.value)
    assert line.startswith(f"state dict: is {what}")
    stripped = [key.partition(".")[2] for key in keys]  # where all keys begin alike
    assert any(f"(key {key})" in line for key in (*keys, *stripped))


def test_what_can_be_read_is_none_of_them():
    for case in CASES.values():
        state = state_dict(keys_of(case), 1) if str(case["id"]).startswith("tiny") else {}
        assert describe(state) is None


@pytest.mark.parametrize(("channels", "said"), [(1, "images of 1 channel "), (4, "images of 4 channels ")])
def test_other_channel_counts_are_named(channels, said):
    weight = dense()["patch_embed.proj.weight"]
    with pytest.raises(dvit.InputError, match=f"{said}.*; 3 are supported"):
        dvit.convert(dense() | {"patch_embed.proj.weight": weight[:, :1].repeat(1, channels, 1, 1)})
    lvvit = state_dict("tiny-lvvit", 1)
    lvvit["patch_embed.conv1.weight"] = lvvit["patch_embed.conv1.weight"][:, :1].repeat(1, channels, 1, 1)
    with pytest.raises(dvit.InputError, match=said):
        dvit.convert(lvvit, assume={"num_heads": 2})


@pytest.mark.parametrize(
    ("key", "buffer", "what"),
    [
        ("layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.relative_position_index", "Swin"),
        ("text_model.encoder.x", "text_model.embeddings.position_ids", "a text model"),
    ],
)
def test_buffers_of_whole_numbers_do_not_hide_the_name(key, buffer, what):
    with pytest.raises(dvit.InputError, match=f"is {what}"):
        dvit.convert({buffer: torch.arange(4), key: torch.ones(3)})


def test_a_file_that_is_named_is_one_on_disk_too(tmp_path):
    keys = ("swin.embeddings.patch_embeddings.projection.weight", "swin.encoder.layers.0.blocks.0.x", "classifier.bias")
    torch.save({key: torch.from_numpy(np.ones(3, np.float32)) for key in keys}, tmp_path / "hf.bin")
    assert len(read_checkpoint(tmp_path / "hf.bin").state) == 3
    with pytest.raises(dvit.InputError, match=r"hf\.bin: is Hugging Face's Swin Transformer \(key swin\.encoder"):
        dvit.convert(tmp_path / "hf.bin")
