"""Encoded prompts: what a network is told besides x and t."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """B encoded prompts; what a kind of network is not told is None.

    Where `negative` is None, guidance has nothing to push away from.
    """

    tokens: Tensor  # (B, L, D) text encoder states; Krea 2 (B, L, layers, D)
    pooled: Tensor | None = None  # (B, P) one vector for the whole text: SDXL, SD3, Flux
    # pixels. SDXL (B, 6): original size, crop, target size. PixArt (B, 2): height, width
    size: Tensor | None = None
    negative: "Prompts | None" = None
    mask: Tensor | None = None  # (B, L) 1 where a token counts: PixArt, Z-Image, Krea 2, Qwen-Image

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows) -> "Prompts":
        """Some of them, in order; repeats allowed."""
        return _each(lambda tensor: tensor[rows], self)

    @property
    def size_bytes(self) -> int:
        """Of all its tensors."""
        own = sum(
            tensor.nbytes for tensor in (self.tokens, self.pooled, self.size, self.mask) if tensor is not None
        )
        return own + (self.negative.size_bytes if self.negative else 0)

    def to(self, *args, **kwargs) -> "Prompts":
        """On another device or in another dtype."""
        return _each(lambda tensor: tensor.to(*args, **kwargs), self)

    def trimmed(self) -> "Prompts":
        """Without the end that no text's mask reaches."""
        negative = self.negative and self.negative.trimmed()
        if self.mask is None:
            return replace(self, negative=negative)
        length = int((self.mask > 0).any(0).nonzero().max()) + 1
        return replace(self, tokens=self.tokens[:, :length], mask=self.mask[:, :length], negative=negative)

    def conditional(self) -> "Prompts":
        """Without the negative side."""
        return replace(self, negative=None)


def concatenate(*parts: Prompts) -> Prompts:
    """One batch of several, negatives dropped."""
    return _each(_cat, *(part.conditional() for part in parts))


def stacked(parts: Sequence[Prompts]) -> Prompts:
    """One batch of several, each with its negative side."""
    return _each(_cat, *parts)


def _cat(*tensors: Tensor) -> Tensor:
    """Tensors (B, L, ...) one after the other; shorter texts, which a mask ends, filled up with zeros."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([_filled(tensor, longest) for tensor in tensors])


def _filled(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)


def _each(change, *parts: Prompts) -> Prompts:
    """Prompts made of what `change` makes of each of their tensors, negatives included."""
    found = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Prompts)}
    negatives = found.pop("negative")
    changed = {name: None if values[0] is None else change(*values) for name, values in found.items()}
    return Prompts(**changed, negative=_each(change, *negatives) if negatives[0] is not None else None)
