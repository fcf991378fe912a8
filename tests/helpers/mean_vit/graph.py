"""The family's graph."""

from collections.abc import Iterator

import torch

from dvit_infer.config import Config
from dvit_infer.graph.heads import Head
from dvit_infer.graph.nodes import Attention, Embed, Mlp, Node
from dvit_infer.reduction import METHODS
from mean_vit.reference import MeanViTModel


def graph(model: MeanViTModel, config: Config) -> Iterator[Node]:
    state = {name: w.detach() for name, w in model.state_dict().items()}

    def own(**prefixes: str) -> dict[str, torch.Tensor]:
        """The weights under these prefixes of the model's names, by the nodes' names."""
        return {
            name.replace(prefix, ours, 1): w
            for ours, prefix in prefixes.items()
            for name, w in state.items()
            if name.startswith(f"{prefix}.")
        }

    body, tokens = config.body, config.num_patches
    weights = {name.partition(".")[2]: w for name, w in own(patch="patchify").items()}
    weights |= {"prefix": torch.zeros(1, 0, body.embed_dim), "pos_embed": state["positions"]}
    yield Embed(name="embed", equals="", weights=weights, image=config.image_size)
    reduction, adds_sizes = config.reduction, False
    for i in range(body.depth):
        here = [(s, stage) for s, stage in enumerate(reduction.stages) if stage.block == i]
        before, after = ([one for one in here if one[1].where == where] for where in ("before", "after_attention"))
        for s, stage in before:
            node = reduce(config, s, stage, tokens, f"layers.{i}:in")
            yield node
            tokens = node.left
        layer = f"layers.{i}"
        branch = {"eps": 1e-6, "residual_scale": 1.0}
        yield Attention(
            name=f"{layer}.attn",
            equals="" if after else f"{layer}.norm2:in",
            weights=own(norm=f"{layer}.norm1", qkv=f"{layer}.attn.qkv", proj=f"{layer}.attn.proj"),
            rows=tokens,
            num_heads=body.num_heads,
            scale=(body.embed_dim // body.num_heads) ** -0.5,
            leaves=METHODS[reduction.method].signal(dict(reduction.settings)) if after else "",
            adds_sizes=adds_sizes,
            tokens=tokens,
            **branch,
        )
        for s, stage in after:
            node = reduce(config, s, stage, tokens, f"{layer}.norm2:in")
            yield node
            tokens, adds_sizes = node.left, bool(dict(reduction.settings).get("prop_attn"))
        mlp = own(norm=f"{layer}.norm2", fc1=f"{layer}.mlp.fc1", fc2=f"{layer}.mlp.fc2")
        yield Mlp(name=f"{layer}.mlp", equals=f"{layer}:out", weights=mlp, tokens=tokens, **branch)
    head = own(norm="norm", head="head")
    yield Head(name="head", equals=":out", weights=head, tokens=tokens, eps=1e-6, reads="mean", num_prefix=0)


def reduce(config, number, stage, tokens, equals):
    body, reduction = config.body, config.reduction
    facts = {"tokens": tokens, "num_keep": stage.keep, "num_prefix": 0, "channels": body.embed_dim}
    facts |= {"key_dim": body.embed_dim // body.num_heads} if reduction.merges else {}
    method = METHODS[reduction.method]
    name = f"reduce.{number}"
    return method.node(number, (), dict(reduction.settings), config.num_patches, name=name, equals=equals, **facts)
