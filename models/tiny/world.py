"""Samples of the world: portraits as tensors, the truth about them, captions."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.tiny.faces import STYLES, Face, attributes, describe, draw, random_face


def faces(n: int, seed: int, styled: float = 0.0) -> list[Face]:
    """n random faces; a share `styled` of them in one of the held-out styles.

    Face k depends on (seed, k) alone.
    """
    found = []
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        found.append(random_face(rng, style=str(rng.choice(STYLES)) if rng.random() < styled else ""))
    return found


def siblings(n: int, seed: int, styled: float = 0.0) -> list[Face]:
    """n faces in groups of four that differ only in age, smile, eyes, glasses, beard and hat: hard to tell
    apart.
    """
    own = ("age", "smile", "eyes", "glasses", "beard", "hat")
    firsts, others = faces(n // 4, seed, styled), faces(n, seed + 1)
    return [
        replace(firsts[k // 4], **{name: getattr(other, name) for name in own})
        for k, other in enumerate(others[: n // 4 * 4])
    ]


def pictures(people: list[Face]) -> Tensor:
    """The portraits, (n, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([draw(face) for face in people])).permute(0, 3, 1, 2).contiguous()


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def truth(people: list[Face]) -> Tensor:
    """Their attributes, (n, len(ATTRIBUTES))."""
    return torch.from_numpy(np.stack([attributes(face) for face in people]))


def captions(people: list[Face], seed: int, keep: float = 0.5) -> list[str]:
    """One caption each, with a random part left out."""
    return [describe(face, np.random.default_rng((seed, k)), keep) for k, face in enumerate(people)]
