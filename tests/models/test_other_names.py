"""Names of other owners' files: unknown keys, damage, and the owners of whom there is no golden case."""

import pytest
import torch
from owners_files import file_of, same, timms

import dvit_infer as dvit
from dvit_infer.models.checkpoint import read_checkpoint


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("hf-vit-tiny", "vit.encoder.layer.1.attention.attention.query.scale"),
        ("hf-vit-tiny", "vit.embeddings.detection_tokens"),
        ("hf-dinov2-tiny", "dinov2.encoder.layer.1.mlp.fc3.weight"),
        ("hf-clip-full-tiny", "vision_model.encoder.layers.0.self_attn.extra.weight"),
        ("hf-siglip-tiny", "vision_model.head.attention.bias_k"),
        ("openclip-tiny-gelu", "visual.transformer.resblocks.1.ln_attn.weight"),
        ("dinov2-hub-tiny", "blocks.1.attn.extra.weight"),
        ("npz-bv-stacked-cls", "params/Transformer/encoderblock/LayerNorm_7/scale"),
        ("npz-augreg-tiny", "conv_root/kernel"),
        ("hf-vit-tiny", "fc.weight"),
    ],
)
def test_an_unknown_key_is_named_as_the_file_has_it(case, key):
    file = file_of(case) | {key: torch.ones(4, 4)}
    with pytest.raises(dvit.InputError, match="unexpected key") as caught:
        read_checkpoint({"state_dict": {f"module.{name}": w for name, w in file.items()}})
    assert f"unexpected key module.{key}: " in str(caught.value)
    assert ("its heads are called classifier.*" in str(caught.value)) is (key == "fc.weight")


@pytest.mark.parametrize(
    ("case", "key", "change", "said"),
    [
        ("hf-vit-tiny", "vit.encoder.layer.2.layernorm_after.bias", None, "missing key {key} "),
        ("hf-vit-tiny", "vit.encoder.layer.2.attention.attention.key.weight", None, "missing key {key} "),
        ("hf-vit-tiny", "vit.encoder.layer.2.attention.attention.key.bias", None, "missing key {key} "),
        ("hf-vit-tiny", "vit.encoder.layer.1.output.dense.weight", (96, 3), "{key} (blocks.1.mlp.fc2.weight here) has"),
        ("hf-vit-tiny", "vit.encoder.layer.1.attention.attention.key.weight", (96, 3), "{key} has shape (96, 3), vit."),
        ("openclip-tiny-gelu", "visual.proj", (3, 4, 5), "{key} has shape (3, 4, 5), a matrix is expected"),
        ("openclip-tiny-gelu", "visual.class_embedding", (2, 96), "{key} has shape (2, 96), one token is expected"),
        ("hf-siglip2-naflex-tiny", "embeddings.patch_embedding.weight", (96, 70), "{key} has shape (96, 70), rows of"),
        (
            "hf-vitmodel-tiny",
            "pooler.dense.weight",
            (48, 96),
            "{key} has shape (48, 96): a pooler of another width than",
        ),
        ("npz-augreg-tiny", "pre_logits/kernel", (96, 48), "{key} has shape (96, 48): a pooler of another width than"),
        ("hf-clip-proj-tiny", "visual_projection.weight", (), "{key} (head.weight here) has shape (), "),
        ("openclip-tiny-gelu", "visual.proj", (), "{key} has shape (), a matrix is expected"),
        ("dinov3-hub-tiny", "rope_embed.periods", (), "{key} (rope.periods here) has shape (), "),
        ("dinov3-hub-tiny", "norm.weight", (), "{key} has shape (), "),
        (
            "hf-dinov2-swiglu-tiny",
            "encoder.layer.0.mlp.weights_in.weight",
            (),
            "{key} (blocks.0.mlp.fc1.weight here) has shape (), ",
        ),
        (
            "hf-siglip-tiny",
            "vision_model.head.attention.in_proj_bias",
            (200,),
            "{key} has shape (200,), no multiple of",
        ),
        ("dinov3-hub-tiny", "blocks.1.attn.qkv.bias_mask", (7,), "{key} is no mask of zeros and ones"),
    ],
)
def test_damage_is_named_as_the_file_has_it(case, key, change, said):
    file = file_of(case)
    if change is None:
        del file[key]
    else:
        file[key] = torch.ones(change)
    with pytest.raises(dvit.InputError) as caught:
        dvit.convert(file, assume={"num_heads": 3}, device="cpu")
    assert said.format(key=key.removeprefix("vision_model.") if "siglip-tiny" in case else key) in str(caught.value)


def test_two_names_of_one_part_are_named():
    file = file_of("hf-vit-tiny")
    for name in ("vit.layers.0.mlp.fc1.weight", "cls_classifier.bias"):
        with pytest.raises(dvit.InputError, match=f"and {name} are the same part|{name} and .* are the same part"):
            read_checkpoint(file | {name: torch.ones(3)})


def test_metas_mask_decides_about_the_bias():
    file = file_of("dinov3-hub-tiny")
    kept = file | {key: torch.ones_like(w) for key, w in file.items() if key.endswith("bias_mask")}
    assert torch.equal(read_checkpoint(kept).state["blocks.0.attn.qkv.bias"], file["blocks.0.attn.qkv.bias"])
    without = {key: w for key, w in file.items() if not key.endswith("bias_mask")}
    assert "blocks.0.attn.qkv.bias" in read_checkpoint(without).state
    odd = file | {"blocks.0.attn.qkv.bias_mask": torch.full((288,), 0.5)}
    with pytest.raises(dvit.InputError, match=r"blocks\.0\.attn\.qkv\.bias_mask is no mask"):
        read_checkpoint(odd)
    found = read_checkpoint(file).state
    assert torch.equal(found["blocks.0.attn.v_bias"], file["blocks.0.attn.qkv.bias"][192:])


def test_metas_chunks_heads_and_training():
    file = file_of("dinov2-hub-tiny")
    plain = read_checkpoint(file)
    chunked = {key.replace("blocks.", "blocks.1.") if key.startswith("blocks.") else key: w for key, w in file.items()}
    assert same(read_checkpoint(chunked), plain)
    trained = {"teacher": {f"backbone.{key}": w for key, w in file.items()} | {"dino_head.mlp.0.weight": torch.ones(2)}}
    found = read_checkpoint(trained)
    assert same(found, plain)
    assert [what for what, _ in found.left_over] == ["backbone.mask_token", "dino_head.*"]
    linear = {f"backbone.{key}": w for key, w in file.items()} | {"linear_head.weight": torch.ones(5, 192)}
    assert read_checkpoint(linear).implied["pool"][0] == "token_mean"
    with pytest.raises(dvit.InputError, match=r"linear_head\.weight reads 480 channels, of several blocks"):
        read_checkpoint(linear | {"linear_head.weight": torch.ones(5, 480)})


def test_dino_and_mae():
    dino = {f"module.backbone.{key}": w for key, w in timms().items()}
    dino |= {"module.head.mlp.0.weight": torch.ones(8, 96), "module.head.last_layer.weight_v": torch.ones(8, 8)}
    found = read_checkpoint({"student": dino, "teacher": dino, "epoch": 3})
    assert found.weights == "teacher"
    assert found.state.keys() == timms().keys()
    assert [what for what, _ in found.left_over] == ["module.head.last_layer.*", "module.head.mlp.*"]
    assert (found.owner, found.implied["model"][0]) == ("meta", "dino")
    mae = timms() | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 96)}
    found = read_checkpoint({"model": mae | {"decoder_blocks.0.norm1.weight": torch.ones(8)}})
    assert found.state.keys() == timms().keys()
    assert len(found.left_over) == 3


def test_torchvision_and_towers_of_timm():
    tv = {}
    renamed = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2",
        "attn.proj": "self_attention.out_proj", "attn.qkv.": "self_attention.in_proj_", "norm.": "encoder.ln.",
    }  # fmt: skip
    for mlp in (("mlp.0", "mlp.3"), ("mlp.linear_1", "mlp.linear_2")):
        for key, tensor in timms().items():
            new = key
            for ours, theirs in {**renamed, "mlp.fc1": mlp[0], "mlp.fc2": mlp[1]}.items():
                new = new.replace(ours, theirs)
            tv[new] = tensor
        found = read_checkpoint(tv | {"heads.head.weight": torch.ones(4, 96), "heads.head.bias": torch.ones(4)})
        assert found.owner == "torchvision"
        assert all(torch.equal(found.state[key], w) for key, w in timms().items())
        tv = {}
    tower = {f"visual.trunk.{key}": w for key, w in timms().items()} | {"visual.head.proj.weight": torch.ones(7, 96)}
    found = read_checkpoint(tower | {"text.transformer.x": torch.ones(2), "logit_scale": torch.tensor(1.0)})
    assert found.state.keys() == timms().keys() | {"head.weight"}
    assert found.implied["projection"][0] == 7
    assert [what for what, _ in found.left_over] == ["logit_scale", "text.*"]


def test_timms_names_pass_and_its_evas_layer_scales_keep_theirs():
    state = timms()
    found = read_checkpoint(state)
    assert found.state.keys() == state.keys()
    assert (found.owner, found.left_over, found.implied) == (None, (), {})
    gammas = {"blocks.0.gamma_1": torch.ones(96)}
    assert "blocks.0.ls1.gamma" in read_checkpoint(state | gammas).state
    for sign in ("blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight", "blocks.0.mlp.fc1_g.weight", "rope.freqs"):
        assert "blocks.0.gamma_1" in read_checkpoint(state | gammas | {sign: torch.ones(96)}).state
    without = {key: w for key, w in state.items() if key != "pos_embed"}
    assert "blocks.0.gamma_1" in read_checkpoint(without | gammas).state
    beit = state | {"blocks.0.attn.relative_position_index": torch.arange(9)}
    assert read_checkpoint(beit).skipped == ("blocks.0.attn.relative_position_index",)


def test_what_is_read_and_what_is_left_over_is_noted():
    file = {key: w for key, w in file_of("hf-deit-tiny").items() if "distillation" not in key}
    file["deit.embeddings.position_embeddings"] = file["deit.embeddings.position_embeddings"][:, :37].clone()
    file["deit.embeddings.mask_token"] = torch.ones(1, 1, 96)
    found = read_checkpoint(file)
    notes = dvit.convert(file, assume={"num_heads": 3}, device="cpu").notes
    said = {note.what: (note.how, note.value) for note in notes}
    assert said["names"] == ("read", found.whose)
    assert said["deit.embeddings.mask_token"] == ("read", "not used")


def test_mae_under_hugging_faces_names():
    file = {f"vit.{key}": w for key, w in file_of("hf-vitmae-tiny").items()}
    found = read_checkpoint(
        file | {"decoder.decoder_embed.weight": torch.ones(8, 96), "decoder.mask_token": torch.ones(8)}
    )
    assert found.implied["model"][0] == "vit_mae"
    assert [what for what, _ in found.left_over] == ["decoder.*", "decoder.decoder_*"]


def test_a_pooler_that_the_classifier_does_not_read_is_left_over():
    file = {f"vit.{key}": w for key, w in file_of("hf-vitmodel-tiny").items()} | {
        "classifier.weight": torch.ones(3, 96)
    }
    found = read_checkpoint(file)
    assert "pre_logits.fc.weight" not in found.state
    assert [what for what, _ in found.left_over] == ["vit.pooler.dense.*"]


@pytest.mark.parametrize(
    ("case", "key", "resample"),
    [
        ("hf-dinov3-tiny", "embeddings.register_tokens", None),
        ("hf-dinov2reg-tiny", "dinov2_with_registers.embeddings.register_tokens", "timm"),  # with antialiasing
        ("dinov2-hub-reg-swiglu-tiny", "register_tokens", "meta"),
        ("dinov3-hub-tiny", "storage_tokens", None),
    ],
)
def test_registers_without_a_row_are_none(case, key, resample):
    file = file_of(case)
    assert file[key].shape[1] == 4
    found = read_checkpoint(file | {key: torch.zeros(1, 0, 96)})
    assert "reg_token" not in found.state
    assert (key, "it is empty: the model has no registers") in found.left_over
    assert found.implied.get("resample", (None,))[0] == resample
    engine = dvit.convert(file | {key: torch.zeros(1, 0, 96)}, assume={"num_heads": 3}, device="cpu")
    assert engine.config.body.num_registers == 0


def test_relative_positions_of_a_block_beside_shared_ones_are_not_read():
    file = file_of("hf-beit-tiny")
    key = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table"
    shared = {"beit.encoder.relative_position_bias.relative_position_bias_table": file[key]}
    with pytest.raises(dvit.InputError) as caught:
        read_checkpoint(file | shared)
    assert str(caught.value).startswith(f"state dict: {key}: relative positions of a block beside those that all")
    without = {key: w for key, w in file.items() if not key.endswith("relative_position_bias_table")}
    assert "rel_pos_bias.relative_position_bias_table" in read_checkpoint(without | shared).state


@pytest.mark.parametrize("bias", [False, True])
def test_a_towers_head_is_a_projection_with_a_bias_too(bias):
    def projection(file, weight, turned=False, **more):
        head = {weight: torch.ones(96, 7) if turned else torch.ones(7, 96)}
        key = weight.replace("kernel", "bias").replace("weight", "bias")
        found = read_checkpoint(file | head | ({key: torch.ones(7)} if bias else {}) | more)
        assert ("head.bias" in found.state) == bias
        return found.implied.get("projection", (None,))[0]

    trunk = {f"visual.trunk.{key}": w for key, w in timms().items()} | {"logit_scale": torch.tensor(1.0)}
    assert projection(trunk, "visual.head.proj.weight") == 7
    assert projection(trunk, "visual.trunk.head.weight") == 7  # open_clip gives timm's classifier that task
    flax = {key: w for key, w in file_of("npz-bv-perblock-cls").items() if "/head/" not in key}
    assert (
        projection(
            {key.replace("params/", "params/img/"): w for key, w in flax.items()}, "params/img/head/kernel", True
        )
        == 7
    )
    assert projection(flax, "params/head/kernel", True) is None
    assert projection({f"vit.{key}": w for key, w in file_of("hf-vitmae-tiny").items()}, "classifier.weight") is None
