"""Pictures of a control while it is trained."""

from pathlib import Path

import torch
from torch import Tensor

from controls.lora import strength
from controls.show import sheet
from models.families import Family
from models.prompts import Prompts
from models.sample import Member


@torch.no_grad()
def pictures(family: Family, member: Member, prompt: Prompts, seeds: list[int], control: str, scales: list[float]) -> Tensor:
    """What a member draws with an attached control: one prompt, (S seeds, K scales, 3, H, W) in [-1, 1]."""
    columns = []
    for scale in scales:
        with strength(member.denoiser.net, {control: scale}):
            columns.append(family.draw(member, prompt[[0] * len(seeds)], seeds))
    return torch.stack(columns, 1)


def strip(family: Family, member: Member, prompt: Prompts, seeds: list[int], control: str, scales: list[float], path: Path) -> Path:
    """Writes a picture of an attached control: seeds in rows, scales in columns. Returns its path."""
    shown = pictures(family, member, prompt, seeds, control, scales)
    return sheet([(f"seed {seed}", scales, row) for seed, row in zip(seeds, shown, strict=True)], path)


def overview(family: Family, member: Member, prompt: Prompts, seeds: list[int], names: list[str], scales: list[float], path: Path) -> Path:
    """Writes one picture of several attached controls: a row each, the scales of every seed in columns. Returns its path."""
    rows = [(name, scales * len(seeds), pictures(family, member, prompt, seeds, name, scales).flatten(0, 1)) for name in names]
    return sheet(rows, path)
