"""Encoded prompts: what a network is told besides x and t."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """B encoded prompts. Where `negative` is None, guidance has nothing to push away from."""

    tokens: Tensor  # (B, L, D) text encoder states
    pooled: Tensor  # (B, P)
    size: Tensor  # (B, 6) SDXL's micro-conditioning: original size, crop, target size, in pixels
    negative: "Prompts | None" = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> "Prompts":
        """Some of them, in order; repeats allowed."""
        negative = self.negative[rows] if self.negative is not None else None
        return Prompts(self.tokens[rows], self.pooled[rows], self.size[rows], negative)

    def to(self, *args, **kwargs) -> "Prompts":
        """On another device or in another dtype."""
        negative = self.negative.to(*args, **kwargs) if self.negative is not None else None
        return Prompts(self.tokens.to(*args, **kwargs), self.pooled.to(*args, **kwargs), self.size.to(*args, **kwargs), negative)

    def conditional(self) -> "Prompts":
        """Without the negative side."""
        return replace(self, negative=None)


def concatenate(*parts: Prompts) -> Prompts:
    """One batch of several, negatives dropped."""
    return Prompts(torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts]), torch.cat([p.size for p in parts]))
