"""The facts of a module are read off its attributes; modules like timm's stand for timm's, which need not be here."""

import pytest
import torch
from torch import nn

import dvit_infer as dvit
from dvit_infer.models.vit.timm_module import is_timm_module, module_facts, reason_of


def timms(name, base=nn.Module):
    """A class of timm's by name."""
    return type(name, (base,), {"__module__": "timm.models.x"})


def part(name, **attributes):
    module = timms(name)()
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def small(kind="VisionTransformer", **attributes):
    def block():
        attn = part("Attention", num_heads=2, scale=16**-0.5, proj=nn.Linear(32, 32))
        mlp = part("Mlp", act=nn.GELU(), fc2=nn.Linear(64, 32))
        return part("Block", norm1=nn.LayerNorm(32, eps=1e-5), attn=attn, mlp=mlp, ls1=None, ls2=None)

    cfg = {"architecture": "vit_x", "mean": (0.5,) * 3, "crop_pct": 0.9, "input_size": (3, 256, 256)}
    own = {
        "embed_dim": 32,
        "num_prefix_tokens": 1,
        "global_pool": "token",
        "patch_embed": part("PatchEmbed", patch_size=(16, 16), img_size=(224, 224), norm=nn.Identity()),
        "blocks": nn.Sequential(block(), block()),
        "norm": nn.LayerNorm(32, eps=1e-5),
        "head": nn.Linear(32, 7),
        "attn_pool": None,
        "pretrained_cfg": cfg,
    }
    return part(kind, **(own | attributes))


def small_beit_blocks():
    blocks = small().blocks
    for block in blocks:
        block.attn.relative_position_bias_table = nn.Parameter(torch.ones(3, 2))
    return blocks


def test_a_module_says_what_its_weights_do_not():
    found = module_facts(small())
    values = {what: value for what, (value, _) in found.items()}
    assert values == {
        **{"owner": "timm", "model": "vit_x", "resample": "timm", "rope": "none", "pool": "token", "act": "gelu"},
        **{"num_heads": 2, "eps": 1e-5, "embed_dim": 32, "depth": 2, "patch_size": 16, "mlp_dim": 64},
        **{"num_classes": 7, "image_size": [224, 224], "mean": [0.5] * 3, "crop_pct": 0.9},
    }
    assert found["num_heads"][1] == "the module's blocks.0.attn.num_heads"
    assert "num_classes" not in module_facts(small(head=nn.Sequential(nn.Linear(32, 7))))
    assert module_facts(small(head=nn.Identity()))["num_classes"][0] == 0
    assert module_facts(small(dynamic_img_size=True))["image_size"][0] == [256, 256]


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"global_pool": ""}, "global_pool is '': it returns tokens, no embedding"),
        ({"global_pool": "avgmax"}, "global_pool is 'avgmax': its head reads the mean and"),
        ({"head": nn.Sequential()}, "its head is a Sequential"),
        ({"norm": part("RmsNorm", eps=1e-5)}, "it has a RmsNorm"),
        ({"norm": nn.LayerNorm(32, eps=1e-6)}, "its LayerNorms have different eps: 1e-06, 1e-05"),
        ({"blocks": nn.Sequential(part("ParallelScalingBlock"))}, "its blocks are ParallelScalingBlock"),
        ({"patch_embed": part("HybridEmbed", patch_size=(16, 16), img_size=None)}, "its patch_embed is a HybridEmbed"),
        ({"patch_embed": part("PatchEmbed", patch_size=(16, 8), img_size=None)}, "its patches are 16x8"),
        ({"blocks": small_beit_blocks(), "rel_pos_bias": nn.Linear(1, 1)}, "its blocks have relative positions beside"),
    ],
)
def test_a_module_that_cannot_be_read_says_why(attributes, why):
    assert reason_of(small(**attributes)).startswith(why)
    reason, where = module_facts(small(**attributes))["unsupported"]
    assert reason == f"{reason_of(small(**attributes))}; dvit_infer does not read such models yet"
    assert where == "the module"


@pytest.mark.parametrize(
    ("where", "attributes", "why"),
    [
        ("attn", {"gate": nn.Linear(1, 1)}, "its attention is gated (block 1)"),
        ("attn", {"num_kv_heads": 1}, "it has 2 heads of queries and 1 of keys (block 1)"),
        ("attn", {"proj": nn.Linear(48, 32)}, "its heads are 48 wide together, its tokens 32 (block 1)"),
        ("attn", {"scale": 0.5}, "its attention is scaled by 0.5 (block 1)"),
        ("attn", {"num_heads": 4, "scale": 8**-0.5}, "its blocks have different numbers of heads"),
        ("attn", {"proj": nn.Linear(32, 32, bias=False)}, "its branches end without a bias (block 1)"),
        ("mlp", {"act": nn.ReLU()}, "its activation is ReLU (block 1)"),
        ("mlp", {"gate_last": True}, "its MLP is gated by the second half of fc1 (block 1)"),
        ("", {"ls1": nn.Linear(1, 1)}, "one branch alone has a layer scale (block 1)"),
    ],
)
def test_one_odd_block_is_found(where, attributes, why):
    module = small()
    for key, value in attributes.items():
        setattr(getattr(module.blocks[1], where) if where else module.blocks[1], key, value)
    assert reason_of(module) == why


def test_a_module_of_another_class_is_an_error():
    assert is_timm_module(small())
    for other in (nn.Linear(1, 1), timms("ToMeVisionTransformer", timms("VisionTransformer"))()):
        with pytest.raises(dvit.InputError, match="a module of none of timm's classes VisionTransformer, "):
            module_facts(other)
