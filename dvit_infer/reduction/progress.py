"""The stages of a reduction in one forward of a reference model."""

from collections.abc import Sequence

import torch
from torch import nn

from dvit_infer.config import Reduction
from dvit_infer.graph.tokens import Tokens, note_last
from dvit_infer.reduction import METHODS
from dvit_infer.reduction.choices import StageInput


class Progress:
    """The tokens of one forward, as stages reduce them; the block whose attention ran last is current.

    Args:
        reduction: which tokens stay.
        num_prefix: P.
        modules: those of the method in the weights.
        given: what every stage is to do instead of its choice, as `kept`.

    Attributes:
        kept: what each stage so far did, as `Tokens.choices`.
        margins: for each stage the gaps (B,) of its choice.
        positions: (B, n) original positions of the patch tokens; None: all, in order.
        sizes: what attention adds the logarithm of, (B, P+n); None: nothing.
        weights: (B, n) the number of patches in each patch token; None: 1.
        keeps_dropped: whether tokens are noted before some of them are dropped, for `on_grid`.
    """

    keeps_dropped = False

    def __init__(
        self,
        reduction: Reduction,
        num_prefix: int,
        modules: Sequence[nn.Module] = (),
        given: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._reduction, self._num_prefix, self._modules, self._given = reduction, num_prefix, modules, given
        self._settings = dict(reduction.settings)
        self._tokens: Tokens | None = None
        self._block = 0
        self.margins: list[torch.Tensor] = []

    @property
    def kept(self) -> list[torch.Tensor]:
        return [] if self._tokens is None else self._tokens.choices

    @property
    def positions(self) -> torch.Tensor | None:
        return None if self._tokens is None else self._tokens.positions

    @property
    def sizes(self) -> torch.Tensor | None:
        return None if self._tokens is None or not self._settings.get("prop_attn") else self._tokens.sizes

    @property
    def weights(self) -> torch.Tensor | None:
        sizes = None if self._tokens is None else self._tokens.sizes
        return None if sizes is None else sizes[:, self._num_prefix :]

    @property
    def leaves(self) -> str:
        """What the current block's attention has to leave."""
        stage = self._at("after_attention")
        return "" if stage is None else METHODS[self._reduction.method].signal(self._settings)

    def before(self, block: int, x: torch.Tensor) -> torch.Tensor:
        """Begin a block: (B, P+n, C) -> the tokens that remain before its attention."""
        self._block = block
        stage = self._at("before")
        return x if stage is None else self._reduced(stage, x, None)

    def __call__(self, x: torch.Tensor, signal: torch.Tensor | None) -> torch.Tensor:
        """(B, P+n, C), and what attention left -> the tokens that remain behind it."""
        stage = self._at("after_attention")
        return x if stage is None else self._reduced(stage, x, signal)

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P+n, C) tokens at last -> (B, N, C) for every original patch the token that holds it.

        Of a dropped one: what was noted before; else zeros.
        """
        self._tokens = self._tokens or Tokens(x)
        self._tokens.x = x
        return self._noted(self._tokens)[:, :-1]

    def _noted(self, tokens: Tokens) -> torch.Tensor:
        if tokens.last is None:
            tokens.last = tokens.x.new_zeros(len(tokens.x), self._reduction.num_patches + 1, tokens.x.shape[2])
        note_last(tokens)
        return tokens.last

    def _at(self, where: str) -> int | None:
        stages = enumerate(self._reduction.stages)
        return next((i for i, stage in stages if (stage.block, stage.where) == (self._block, where)), None)

    def _reduced(self, number: int, x: torch.Tensor, signal: torch.Tensor | None) -> torch.Tensor:
        if self._tokens is None:
            self._tokens = Tokens(x)
        tokens, stage = self._tokens, self._reduction.stages[number]
        assert stage.keep is not None
        tokens.x = x
        if self.keeps_dropped:
            self._noted(tokens)
        num_patches = self._reduction.num_patches
        choice = METHODS[self._reduction.method].choose(
            StageInput(x, signal, number, stage.keep, self._num_prefix, num_patches, self._modules, self._settings)
        )
        given = None if self._given is None else self._given[number].to(x.device)
        choice.move(tokens, self._num_prefix, stage.keep, given)
        self.margins.append(choice.gap)
        return tokens.x
