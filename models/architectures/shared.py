"""What several architectures share: packed latents, places, clocks, padded texts, shifted schedules."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.prompts import Prompts


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a sequence of their 2x2 patches, (B, H/2 W/2, 4C)."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT.contiguous()


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """The sequence of height x width patches as latents again."""
    return F.pixel_shuffle(x.mT.contiguous().unflatten(2, (height, width)), 2)


def places(height: int, width: int, device, axes: int = 3) -> Tensor:
    """Where each token of an image stands, (H W, axes): row and column, axes 1 and 2; zeros on the others."""
    grid = torch.zeros(height, width, axes, device=device)
    grid[..., 1] += torch.arange(height, device=device)[:, None]
    grid[..., 2] += torch.arange(width, device=device)
    return grid.flatten(0, 1)


def clock(x: Tensor, t: float) -> Tensor:
    """The same t for each of B latents, (B,), fp32."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.float32)


def sizes(texts: list[str], device, *sizes: int) -> Tensor:
    """Sizes in pixels for each text, (B, how many)."""
    return torch.tensor(sizes, device=device, dtype=torch.float32).expand(len(texts), -1)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token rows (L_i, D) as (B, L, D), L the longest, and where they count, (B, L)."""
    tokens = pad_sequence(rows, batch_first=True)
    ends = torch.tensor([len(row) for row in rows], device=tokens.device)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < ends[:, None]


def trimmed(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, ...) that count, moved to the front, and their mask, no longer than the longest text.

    For networks to which a text's tokens have no places.
    """
    return padded([row[kept] for row, kept in zip(tokens, mask, strict=True)])


def by_length(prompts: Prompts) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """The rows of equally long texts, and their tokens (b, L, ...) without padding."""
    if prompts.mask is None:
        yield slice(None), prompts.tokens
        return
    lengths = prompts.mask.sum(1)
    for length in lengths.unique().int().tolist():
        rows = lengths == length
        yield rows, prompts.tokens[rows, :length]


def paired(prompts: Prompts, count: int, negatives: int) -> Prompts:
    """The first `count` of them, with the others, one for all or one each, as their negative sides."""
    rows = torch.arange(count) * (negatives > 1) + count
    return replace(prompts[:count], negative=prompts[rows])


def size_shift(config: Mapping, tokens: int, steps: int) -> float:
    """A flow's mu by the size of an image, on a line: as Flux.1's pipeline, whatever the steps."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    lengths = config["base_image_seq_len"], config["max_image_seq_len"]
    return calculate_shift(tokens, *lengths, config["base_shift"], config["max_shift"])


def empirical_shift(config: Mapping, tokens: int, steps: int) -> float:
    """A flow's mu by the size of an image and the steps: as Flux.2's pipeline, whatever the config."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(tokens, steps)
