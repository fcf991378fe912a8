"""The names of every owner's vision transformers become timm's, with the values of the file."""

import pytest
import torch
from owners_files import State, file_of, same

from dvit_infer.models.checkpoint import read_checkpoint

QKV, QV, SEPARATE = "attn.qkv", "attn.qkv.weight attn.q_bias attn.v_bias", "attn.q_proj attn.k_proj.weight attn.v_proj"
MLP, SPLIT = "mlp.fc1 mlp.fc2", "mlp.fc1_g mlp.fc1_x mlp.fc2"
LS, GAMMA = "ls1.gamma ls2.gamma", "gamma_1 gamma_2"
VIT = "cls_token pos_embed patch_embed.proj norm"
SIGLIP = "pos_embed patch_embed.proj norm"
CLIP = "cls_token pos_embed patch_embed.proj.weight norm_pre"
DINOV3 = "cls_token reg_token patch_embed.proj norm"
MAP = "attn_pool.latent attn_pool.q attn_pool.kv attn_pool.proj attn_pool.norm attn_pool.mlp.fc1 attn_pool.mlp.fc2"

# What stands in a block beside norms and attn.proj, what stands outside, facts that follow, what is left over.
CASES: dict[str, tuple[str, str, dict[str, object], tuple[str, ...]]] = {
    "hf-vit-tiny": (f"{QKV} {MLP}", f"{VIT} head", {"model": "vit", "pool": "token"}, ()),
    "hf-vit-tiny-v5names": (f"{QKV} {MLP}", f"{VIT} head", {"model": "vit", "resample": "huggingface"}, ()),
    "hf-vitmodel-tiny": (f"{QKV} {MLP}", f"{VIT} pre_logits.fc", {"pool": "token"}, ()),
    "hf-deit-tiny": (f"{QKV} {MLP}", f"{VIT} dist_token head", {"model": "deit"}, ()),
    "hf-deit-tiny-teacher": (f"{QKV} {MLP}", f"{VIT} dist_token head head_dist", {"model": "deit"}, ()),
    "hf-dinov2-tiny": (f"{QKV} {MLP} {LS}", f"{VIT} head", {"pool": "token_mean"}, ("dinov2.embeddings.mask_token",)),
    "hf-dinov2-swiglu-tiny": (f"{QKV} {MLP} {LS}", VIT, {"pool": "token", "act": "silu"}, ("embeddings.mask_token",)),
    "hf-dinov2reg-tiny": (
        f"{QKV} {MLP} {LS}",
        f"{VIT} reg_token head",
        {"model": "dinov2_with_registers", "pool": "token_mean"},
        ("dinov2_with_registers.embeddings.mask_token",),
    ),
    "hf-dinov3-tiny": (f"{SEPARATE} {MLP} {GAMMA}", DINOV3, {"rope": "dinov3"}, ("embeddings.mask_token",)),
    "hf-dinov3-gated-tiny": (f"{SEPARATE} {SPLIT} {GAMMA}", DINOV3, {"pool": "token"}, ("embeddings.mask_token",)),
    "hf-clip-proj-tiny": (f"{QKV} {MLP}", f"{CLIP} fc_norm head.weight", {"pool": "token", "projection": 48}, ()),
    "hf-clip-full-tiny": (
        f"{QKV} {MLP}",
        f"{CLIP} fc_norm head.weight",
        {"model": "clip", "projection": 48},
        ("logit_scale", "text_model.*", "text_projection.*"),
    ),
    "hf-clip-cls-tiny": (f"{QKV} {MLP}", f"{CLIP} head", {"pool": "mean"}, ("vision_model.post_layernorm.*",)),
    "hf-clip-vision-tiny-bare": (f"{QKV} {MLP}", f"{CLIP} fc_norm", {"pool": "token"}, ()),
    "hf-siglip-tiny": (f"{QKV} {MLP}", f"{SIGLIP} {MAP}", {"model": "siglip", "pool": "map"}, ()),
    "hf-siglip-cls-tiny": (f"{QKV} {MLP}", f"{SIGLIP} head", {"pool": "mean"}, ("vision_model.head.*",)),
    "hf-siglip-full-tiny": (
        f"{QKV} {MLP}",
        f"{SIGLIP} {MAP}",
        {"pool": "map"},
        ("logit_bias", "logit_scale", "text_model.*"),
    ),
    "hf-siglip2-naflex-tiny": (f"{QKV} {MLP}", f"{SIGLIP} {MAP}", {"model": "siglip2", "resample": "siglip2"}, ()),
    "hf-beit-tiny": (
        f"{QV} {MLP} {GAMMA} attn.relative_position_bias_table",
        "cls_token patch_embed.proj fc_norm head",
        {"model": "beit", "pool": "mean"},
        (),
    ),
    "hf-vitmae-tiny": (f"{QKV} {MLP}", VIT, {"pool": "token"}, ()),
    "npz-augreg-tiny": (
        f"{QKV} {MLP}",
        f"{VIT} head",
        {"num_heads": 3, "pool": "token", "act": "gelu_tanh", "no_embed_class": False},
        (),
    ),
    "npz-bv-perblock-cls": (f"{QKV} {MLP}", f"{VIT} head", {"num_heads": 3, "no_embed_class": True}, ()),
    "npz-bv-stacked-cls": (f"{QKV} {MLP}", f"{VIT} head", {"num_heads": 3, "resample": "big_vision"}, ()),
    "npz-bv-stacked-map": (f"{QKV} {MLP}", f"{SIGLIP} {MAP} head", {"map_heads": 3, "pool": "map"}, ()),
    "npz-siglip-perblock-map": (f"{QKV} {MLP}", f"{SIGLIP} {MAP}", {"num_heads": 2, "eps": 1e-6}, ()),
    "npz-siglip-stacked-map": (f"{QKV} {MLP}", f"{SIGLIP} {MAP}", {"num_heads": 2, "map_heads": 2}, ()),
    "openclip-tiny-gelu": (
        f"{QKV} {MLP}",
        f"{CLIP} norm head.weight",
        {"owner": "open_clip", "projection": 48, "eps": 1e-5},
        ("ln_final.*", "logit_scale", "positional_embedding", "text_projection", "token_embedding.*", "transformer.*"),
    ),
    "dinov2-hub-tiny": (f"{QKV} {MLP} {LS}", VIT, {"owner": "meta", "act": "gelu", "eps": 1e-6}, ("mask_token",)),
    "dinov2-hub-reg-swiglu-tiny": (
        f"{QKV} {MLP} {LS}",
        f"{VIT} reg_token",
        {"resample": "meta", "act": "silu"},
        ("mask_token",),
    ),
    "dinov3-hub-tiny": (f"{QV} {MLP} {GAMMA}", f"{DINOV3} rope.periods", {"num_heads": 3}, ("mask_token",)),
    "dinov3-hub-swiglu-tiny-at-64x128": (
        f"{QV} {SPLIT} {GAMMA}",
        f"{DINOV3} rope.periods",
        {"act": "silu", "eps": 1e-5},
        ("mask_token",),
    ),
}


def names(words: str) -> set[str]:
    """`norm` stands for norm.weight and norm.bias, unless the name ends in a tensor's own."""
    single = ("weight", "bias", "token", "embed", "gamma", "gamma_1", "gamma_2", "latent", "table", "periods")
    found = [[word] if word.endswith(single) else [f"{word}.weight", f"{word}.bias"] for word in words.split()]
    return {name for part in found for name in part}


def values_of(state: State) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()]).sort().values


@pytest.mark.parametrize("case", CASES)
def test_the_names_of_a_golden_case(case):
    in_block, outside, facts, left_over = CASES[case]
    file = file_of(case)
    found = read_checkpoint(file)
    depth = max(int(key.split(".")[1]) for key in found.state if key.startswith("blocks.")) + 1
    block = names(f"norm1 norm2 attn.proj {in_block}")
    expected = names(outside) | {f"blocks.{i}.{name}" for i in range(depth) for name in block}
    assert found.state.keys() == expected
    assert tuple(sorted(what for what, _ in found.left_over)) == left_over
    implied = {what: value for what, (value, _) in found.implied.items()}
    assert facts.items() <= implied.items()
    assert found.owner == implied["owner"]

    width = found.state["patch_embed.proj.weight"].shape[0]
    for key, tensor in found.state.items():
        assert tensor.is_contiguous()
        ndim = {"weight": 2, "token": 3, "latent": 3, "pos_embed": 3, "table": 2}
        if "norm" not in key and not key.endswith("proj.weight"):
            assert tensor.dim() == next((n for end, n in ndim.items() if key.endswith(end)), 1)
        if key.endswith("attn.qkv.weight"):
            assert tensor.shape == (3 * width, width)

    unused = tuple(what.removesuffix("*") for what in left_over)
    used = {key: w for key, w in file.items() if not key.startswith(unused) and not key.endswith("position_ids")}
    if "dinov3-hub" in case:  # the third of the bias that the mask drops, and the mask
        used = {key: w for key, w in used.items() if not key.endswith("bias_mask")}
        third = width
        used = {k: w[[*range(third), *range(2 * third, 3 * third)]] if "qkv.bias" in k else w for k, w in used.items()}
    assert torch.equal(values_of(found.state), values_of(used))


def test_the_names_on_disk_and_in_memory_become_the_same():
    pairs = (
        ("hf-vit-tiny", {"encoder.layer.": "layers.", "attention.attention.query": "attention.q_proj"}),
        ("hf-dinov2-tiny", {"attention.attention.query": "attention.q_proj"}),
        ("hf-dinov3-gated-tiny", {"layer.": "model.layer."}),
        ("hf-beit-tiny", {"encoder.layer.": "layers.", "attention.attention.relative": "relative"}),
    )
    others = {
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "encoder.relative_position_bias.": "shared_position_bias.",
    }
    for case, renamed in pairs:
        disk, memory = file_of(case), {}
        for key, tensor in disk.items():
            new = key
            for old, changed in {**renamed, **others}.items():
                if old in new and changed not in new:
                    new = new.replace(old, changed)
            memory[new.replace("attention.attention.query", "attention.q_proj")] = tensor
        assert memory.keys() != disk.keys()
        assert same(read_checkpoint(disk), read_checkpoint(memory))


def test_dinov2s_gate_is_packed_in_front():
    disk = file_of("hf-dinov2-swiglu-tiny")
    memory = {}
    for key, tensor in disk.items():
        if ".weights_in." in key:
            gate, up = tensor.chunk(2)
            memory |= {key.replace("weights_in", "gate_proj"): gate, key.replace("weights_in", "up_proj"): up}
        else:
            memory[key.replace("weights_out", "down_proj")] = tensor
    assert same(read_checkpoint(disk), read_checkpoint(memory))


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_model."])
def test_a_tower_is_the_same_under_any_prefix(prefix):
    bare = file_of("hf-clip-vision-tiny-bare")
    assert same(read_checkpoint({prefix + key: w for key, w in bare.items()}), read_checkpoint(bare))
    classified = {prefix + key: w for key, w in bare.items()} | {"classifier.weight": torch.ones(3, 96)}
    found = read_checkpoint(classified)
    assert found.state["head.weight"].shape == (3, 96)
    assert found.left_over[0][0] == f"{prefix}post_layernorm.*"


def test_values_that_are_put_in_another_order():
    found = read_checkpoint(file := file_of("openclip-tiny-gelu")).state
    assert torch.equal(found["head.weight"], file["visual.proj"].T)
    assert torch.equal(found["cls_token"][0, 0], file["visual.class_embedding"])
    file = file_of("hf-siglip2-naflex-tiny")
    found = read_checkpoint(file).state
    row, column, channel = 5, 9, 2
    pixel = file["embeddings.patch_embedding.weight"][:, (row * 16 + column) * 3 + channel]
    assert torch.equal(found["patch_embed.proj.weight"][:, channel, row, column], pixel)
    queries, keys_values = file["head.attention.in_proj_weight"].split([96, 192])
    assert torch.equal(found["attn_pool.q.weight"], queries)
    assert torch.equal(found["attn_pool.kv.weight"], keys_values)
    file = file_of("hf-vit-tiny")
    found = read_checkpoint(file).state
    attention = "vit.encoder.layer.2.attention.attention"
    for i, part in enumerate(("query", "key", "value")):
        for leaf in ("weight", "bias"):
            assert torch.equal(found[f"blocks.2.attn.qkv.{leaf}"].chunk(3)[i], file[f"{attention}.{part}.{leaf}"])


def test_flaxs_kernels_are_turned():
    file = file_of("npz-augreg-tiny")
    found = read_checkpoint(file).state
    block = "Transformer/encoderblock_1"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    assert torch.equal(found["patch_embed.proj.weight"][:, 2, 3, 4], file["embedding/kernel"][3, 4, 2])
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], file[f"{block}/MlpBlock_3/Dense_0/kernel"].T)
    assert torch.equal(found["head.weight"], file["head/kernel"].T)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    keys = torch.einsum("nc,chd->nhd", x, file[f"{attention}/key/kernel"]) + file[f"{attention}/key/bias"]
    weight, bias = (found[f"blocks.1.attn.qkv.{leaf}"].chunk(3)[1] for leaf in ("weight", "bias"))
    assert torch.allclose((x @ weight.T + bias).view(5, 3, 32), keys)
    out = torch.einsum("nhd,hdc->nc", keys, file[f"{attention}/out/kernel"])
    assert torch.allclose(keys.flatten(1) @ found["blocks.1.attn.proj.weight"].T, out)


def test_stacked_blocks_are_the_same_as_single_ones():
    for stacked, single in (
        ("npz-bv-stacked-cls", "npz-bv-perblock-cls"),
        ("npz-siglip-stacked-map", "npz-siglip-perblock-map"),
    ):
        file, apart = file_of(stacked), {}
        for key, tensor in file.items():
            for i in range(4):
                if "/encoderblock/" in key:
                    apart[key.replace("encoderblock", f"encoderblock_{i}")] = tensor[i]
                else:
                    apart[key] = tensor
        assert apart.keys() == file_of(single).keys()
        assert same(read_checkpoint(file), read_checkpoint(apart))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_stay(dtype):
    for case in ("hf-vit-tiny", "npz-bv-stacked-map", "dinov3-hub-tiny"):
        file = {key: w.to(dtype) for key, w in file_of(case).items()}
        assert {w.dtype for w in read_checkpoint(file).state.values()} == {dtype}
