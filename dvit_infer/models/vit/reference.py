"""The trunk of every plain vision transformer: embed, blocks with pruning between them, head."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.models.reference import EvalOutput, Reference, TrainOutput
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.layers import NOWHERE, Block, Places, Reducing
from dvit_infer.models.vit.relative_position import relative_position_bias, table_rows
from dvit_infer.models.vit.rope import rope_tables


class Progress(Reducing, Protocol):
    """The stages of a reduction in one forward; a `Reducing` between attention and MLP of the current block.

    Attributes:
        kept, margins: for each stage so far what it did, and (B,) the gap of its choice, as in `EvalOutput`.
        positions: (B, n) original positions of the patch tokens; None: all, in order.
        weights: (B, n) the number of patches in each patch token; None: 1.
        keeps_dropped: whether tokens that are dropped are kept for `on_grid`.
    """

    keeps_dropped: bool
    margins: list[torch.Tensor]

    @property
    def kept(self) -> list[torch.Tensor]: ...

    @property
    def positions(self) -> torch.Tensor | None: ...

    @property
    def weights(self) -> torch.Tensor | None: ...

    def before(self, block: int, x: torch.Tensor) -> torch.Tensor:
        """Begin a block: (B, P+n, C) -> the tokens that remain before its attention."""

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P+n, C) tokens at last -> (B, N, C) of every patch; of dropped ones as they were when kept, or zeros."""


# (score_predictor, what every stage is to do or None for its own choice) -> the stages of one forward
Begin = Callable[[Sequence[nn.Module], Sequence[torch.Tensor] | None], Progress]


class VisionTransformer(Reference):
    """A vision transformer, some of whose patch tokens may be dropped or merged.

    Args:
        body: its facts.
        grid: patches down and across at the image size it is built for.
        prune_at: the block of every stage; empty to run dense, with or without predictors.
        begin: begins the stages of a forward in evaluation; None: it runs dense.
        fuses: whether its stages fuse tokens into others, which then have no place.
        score_predictor: one module per stage, if the weights hold some.
        trainable: whether these modules choose.
    """

    patch_embed: nn.Module

    def __init__(
        self,
        body: ViT,
        *,
        grid: tuple[int, int],
        prune_at: Sequence[int] = (),
        begin: Begin | None = None,
        fuses: bool = False,
        score_predictor: nn.ModuleList | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.body, self.grid = body, grid
        self.begin, self.trainable, self.fuses = begin, trainable, fuses
        self.num_prefix = body.num_prefix
        self.prune_at = tuple(prune_at)
        dim = body.embed_dim
        if body.class_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if body.class_tokens == 2:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        if body.num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, body.num_registers, dim))
        if not body.no_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, body.placed_prefix + grid[0] * grid[1], dim))
        if body.norm_pre:
            self.norm_pre = nn.LayerNorm(dim, eps=body.eps)
        if body.rope == "mixed" or body.rope_periods:
            self.rope = _Frequencies(body)
        if body.rel_pos == "shared":
            self.rel_pos_bias = RelativePosition(grid, body.num_heads)
        self.blocks = nn.ModuleList(Block(body) for _ in range(body.depth))
        if body.rel_pos == "blocks":
            for block in self.blocks:
                RelativePosition.into(block.get_submodule("attn"), grid, body.num_heads)
        if not body.no_norm:
            self.norm = nn.LayerNorm(dim, eps=body.eps)
        self.score_predictor = score_predictor

    @abstractmethod
    def pool(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """(B, P+n, C) tokens as `last_tokens` returns them -> (B, D), which the classifier reads.

        A mean of patches is that of the original ones: `weights` (B, n) says how many are in each token; None: 1.
        """

    @abstractmethod
    def classify(self, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The same tokens, and what `pool` returned for them -> (B, K) logits, in evaluation."""

    @abstractmethod
    def patch_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P+N, C) tokens after the last norm -> the outputs of every patch that training distils."""

    def train_logits(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, P+N, C) tokens after the last norm, (B, N) mask of those that stay -> (B, K) logits, in training."""
        return self.classify(x, self.pool(x))

    def last_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P+n, C) tokens after the last block -> the same after the last norm, where there is one."""
        out: torch.Tensor = x if self.body.no_norm else self.norm(x)
        return out

    def prefix_tokens(self) -> list[torch.Tensor]:
        """Return those of class, distillation and register tokens that there are, (1, any, C) each."""
        return [getattr(self, name) for name in ("cls_token", "dist_token", "reg_token") if hasattr(self, name)]

    def positions(self) -> torch.Tensor:
        """Return the position embedding (1, P+N, C), with zeros for the prefix tokens that have none."""
        missing = self.num_prefix - self.body.placed_prefix
        if not missing:
            return self.pos_embed
        prefix, patches = self.pos_embed.tensor_split([self.body.placed_prefix], dim=1)
        return torch.cat([prefix, prefix.new_zeros(1, missing, prefix.shape[2]), patches], dim=1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, P+N, C)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        prefix = [token.expand(patches.shape[0], -1, -1) for token in self.prefix_tokens()]
        x = torch.cat([*prefix, patches], dim=1)
        x = x if self.body.no_pos_embed else x + self.positions()
        out: torch.Tensor = self.norm_pre(x) if self.body.norm_pre else x
        return out

    def places(self) -> list[Places]:
        """Return what each block knows about the places of all patches."""
        body, sin, cos, bias = self.body, None, None, None
        if body.rope:
            weights = {key.removeprefix("rope."): w for key, w in self.named_buffers() if key.startswith("rope.")}
            weights |= {key.removeprefix("rope."): w for key, w in self.named_parameters() if key.startswith("rope.")}
            sin, cos = rope_tables(body, self.grid, weights.get("freqs"), weights.get("periods"))
            sin, cos = (table.to(self.device) for table in (sin, cos))
        if body.rel_pos == "shared":
            bias = self.rel_pos_bias.bias(self.grid)
        places = []
        for i, block in enumerate(self.blocks):
            of_block = (sin[i], cos[i]) if body.rope == "mixed" and sin is not None and cos is not None else (sin, cos)
            if body.rel_pos == "blocks":
                bias = relative_position_bias(block.get_parameter(f"attn.{RelativePosition.TABLE}"), self.grid)[None]
            places.append(Places(*of_block, bias))
        return places

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        """Run inference: drop tokens at every stage; `kept` overrides the choice."""
        x, progress = self._trunk(images, kept)
        tokens = self.last_tokens(x)
        if progress is None:
            pooled = self.pool(tokens)
            return EvalOutput(self.classify(tokens, pooled), [], x.new_empty(x.shape[0], 0), pooled, tokens)
        pooled = self.pool(tokens, progress.weights)
        margin = torch.stack(progress.margins, dim=1) if progress.margins else x.new_empty(x.shape[0], 0)
        logits = self.classify(tokens, pooled)
        return EvalOutput(logits, progress.kept, margin, pooled, tokens, progress.positions)

    def feature_map(
        self,
        images: torch.Tensor,
        fill: Literal["last", "zeros"] = "last",
        kept: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C, h, w), as an engine's; `kept` overrides the choice. It has a gradient."""
        if fill not in ("last", "zeros"):
            raise ValueError(f"fill: {fill!r} is not one of last, zeros")
        x, progress = self._trunk(images, kept, keeps_dropped=fill == "last")
        if progress is None:
            rows = self.last_tokens(x)[:, self.num_prefix :]
        elif fill == "last":
            rows = self.last_tokens(progress.on_grid(x))
        else:
            rows = progress.on_grid(self.last_tokens(x))
        return rows.reshape(len(rows), *self.grid, -1).permute(0, 3, 1, 2)

    def _trunk(
        self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None, keeps_dropped: bool = False
    ) -> tuple[torch.Tensor, Progress | None]:
        """Return the tokens that the last block leaves, and what the stages did; None: there are none."""
        x = self.embed(images)
        progress = None if self.begin is None else self.begin(list(self.score_predictor or ()), kept)
        if progress is not None:
            progress.keeps_dropped = keeps_dropped
        places = self.places()
        for i, block in enumerate(self.blocks):
            x = x if progress is None else progress.before(i, x)
            positions = None if progress is None else progress.positions
            here = places[i] if positions is None else self._of_kept(places[i], positions)
            x = block(x, None, here, progress)
        return x, progress

    def _of_kept(self, places: Places, positions: torch.Tensor) -> Places:
        """Return what of the places remains for patches at `positions` (B, n); fused ones, at N or more, have none."""
        if places == NOWHERE:
            return places
        sin, cos, bias = places
        if self.fuses:
            positions = positions.clamp(max=self.grid[0] * self.grid[1])
            sin, cos = (None if t is None else F.pad(t, (0, 0, 0, 1), value=v) for t, v in ((sin, 0.0), (cos, 1.0)))
            bias = None if bias is None else F.pad(bias, (0, 1, 0, 1))
        if sin is not None and cos is not None:  # (B, 1 or heads, n, D)
            sin, cos = (t[..., positions, :] for t in (sin, cos))
            sin, cos = (t.transpose(0, 1) if t.ndim == 4 else t[:, None] for t in (sin, cos))
        if bias is not None:
            prefix = torch.arange(self.num_prefix, device=positions.device).expand(len(positions), -1)
            rows = torch.cat([prefix, positions + self.num_prefix], dim=1)
            bias = bias[0][:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)
        return Places(sin, cos, bias)

    def forward_train(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> TrainOutput:
        """Run with dropped tokens masked out of attention and decisions drawn by Gumbel-softmax (Rao et al. 2021, 3.3).

        A model without predictors is a teacher: nothing is masked. Dropout, if any, is up to the trainer.

        Args:
            images: (B, 3, H, W).
            noise: (stages, B, N, 2) float32 Gumbel samples to decide by; None: PyTorch draws them.
        """
        if self.prune_at and not self.trainable:
            raise NotImplementedError("a reduction without predictors cannot be trained")
        x = self.embed(images)
        p = self.num_prefix
        keep = x.new_ones(len(x), x.shape[1] - p, 1)
        policy = None  # before the first predictor nothing is masked
        decisions = []
        places = self.places()
        for i, block in enumerate(self.blocks):
            if i in self.prune_at:
                stage = self.prune_at.index(i)
                assert self.score_predictor is not None
                scores = self.score_predictor[stage](x[:, p:], keep).log_softmax(dim=-1)
                keep = _decide(scores, None if noise is None else noise[stage])[..., :1] * keep
                policy = torch.cat([keep.new_ones(len(x), p, 1), keep], dim=1)
                decisions.append(keep.squeeze(-1))
            x = block(x, policy, places[i])
        x = self.last_tokens(x)
        mask = keep.detach().squeeze(-1)
        return TrainOutput(self.train_logits(x, mask), self.patch_outputs(x), mask, decisions)


class _Frequencies(nn.Module):
    """Frequencies or periods of rotary positions that are among the weights."""

    def __init__(self, body: ViT) -> None:
        super().__init__()
        if body.rope == "mixed":
            self.freqs = nn.Parameter(torch.zeros(2, body.depth, body.num_heads, body.head_dim // 2))
        else:
            self.register_buffer("periods", torch.ones(body.head_dim // 4))


class RelativePosition(nn.Module):
    """The table of a relative position bias."""

    TABLE = "relative_position_bias_table"

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.into(self, grid, num_heads)

    @classmethod
    def into(cls, module: nn.Module, grid: tuple[int, int], num_heads: int) -> None:
        module.register_parameter(cls.TABLE, nn.Parameter(torch.zeros(table_rows(grid), num_heads)))

    def bias(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return the bias, (1, heads, 1+N, 1+N)."""
        return relative_position_bias(self.get_parameter(self.TABLE), grid)[None]


def _decide(scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """(B, N, 2) log-probabilities -> one-hot decisions whose gradient is the softmax's (Jang et al. 2017, section 2.2).

    With `noise` (B, N, 2), the arithmetic is in float32, also under autocast.
    """
    if noise is None:
        return F.gumbel_softmax(scores, hard=True)
    soft = (scores.float() + noise).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())
