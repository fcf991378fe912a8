"""Node kinds that leave fewer tokens, each with its shapes, MACs and bytes for one image."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from dvit_infer.graph.nodes import TokenNode
from dvit_infer.graph.tokens import Tokens, index_of_kept, note_kept
from dvit_infer.ops.prune_tokens import gather_tokens_ref


@dataclass(frozen=True, kw_only=True)
class Reduce(TokenNode):
    """Leaves fewer patch tokens. Each reduction has a subclass, which chooses; prefix tokens stay, in front.

    Attributes:
        signal_size: how many float32 numbers of what attention left it reads for an image.
        rows: the number of prefix rows that pass, if nothing behind it reads others. It then chooses only for those
            who ask which tokens stay, and moves none. None: it moves all.
    """

    choice_name: ClassVar[str]  # of what it chooses, in files
    num_keep: int
    num_prefix: int
    channels: int
    rows: int | None = None
    signal_size: int = 0

    @property
    def dim(self) -> int:
        return self.channels

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.tokens if self.rows is None else self.rows, self.dim

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.left if self.rows is None else self.rows, self.dim

    @property
    def keeps_x(self) -> bool:
        return self.rows is not None

    def bytes_moved(self, batch: int, itemsize: int) -> int:
        return super().bytes_moved(batch, itemsize) + batch * (4 * self.signal_size + 8 * self.choice_size)

    @property
    def left(self) -> int:
        """The number of tokens that it leaves."""
        return self.num_prefix + self.num_keep

    @property
    @abstractmethod
    def choice_size(self) -> int:
        """The number of numbers by which it states its choice for an image, which `note` takes."""

    @abstractmethod
    def note(self, tokens: Tokens, choice: torch.Tensor) -> None:
        """Note what a choice (B, choice_size) int64 did with tokens that have been moved by it."""

    @abstractmethod
    def choice_of(self, tokens: Tokens, given: torch.Tensor) -> torch.Tensor:
        """Return the choice that does what is given in the form of `Tokens.choices`."""

    @property
    def macs(self) -> int:
        return 0 if self.rows is not None else self.choice_macs

    @property
    @abstractmethod
    def choice_macs(self) -> int:
        """The number of MACs for one image of choosing and moving tokens."""

    def for_all_rows(self) -> Self:
        return replace(self, rows=None)

    def to(self, device: torch.device, dtype: torch.dtype, copy: bool = True) -> Self:
        """Return a copy on `device`; its weights are in the dtypes that the choice needs."""
        return self.with_weights(lambda w: w.to(device, copy=copy))


@dataclass(frozen=True, kw_only=True)
class Prune(Reduce):
    """Drops patch tokens. Its choice are the positions (B, k), among the patch tokens, of those that stay.

    Attributes:
        fused: the original position of one more token, behind the others, into which those dropped are fused; None:
            there is none.
    """

    kind = "prune"
    choice_name = "index"
    fused: int | None = None

    @property
    def left(self) -> int:
        return super().left + (self.fused is not None)

    @property
    def choice_size(self) -> int:
        return self.num_keep

    def note(self, tokens: Tokens, choice: torch.Tensor) -> None:
        note_kept(tokens, choice, self.fused)

    def choice_of(self, tokens: Tokens, given: torch.Tensor) -> torch.Tensor:
        return index_of_kept(tokens, given)

    @abstractmethod
    def prune(self, x: torch.Tensor, signal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, P+N, C) -> the kept tokens (B, P+k, C), and their (B, k) ascending positions among the N.

        With `rows`, x is (B, rows, C), and the tokens are x as it is.
        """

    def keep(self, x: torch.Tensor, index: torch.Tensor, signal: torch.Tensor | None) -> torch.Tensor:
        """Return the same tokens for given positions (B, k)."""
        return gather_tokens_ref(x, index, self.num_prefix)
