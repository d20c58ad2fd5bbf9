"""Pictures of a control while it is trained."""

from pathlib import Path

import torch
from PIL import Image

from configs import replacing
from controls.lora import strength
from models.families import Family
from models.sample import Member


@torch.no_grad()
def strip(family: Family, member: Member, seeds: list[int], control: str, scales: list[float], prompt: str, path: Path) -> Path:
    """Writes a picture of an attached control: one prompt, seeds in rows, scales in columns. Returns its path."""
    columns = []
    for scale in scales:
        with strength(member.denoiser.net, {control: scale}):
            columns.append(family.draw(member, [prompt] * len(seeds), seeds))
    page = torch.stack(columns, 1)  # (rows, columns, 3, H, W)
    page = torch.cat(torch.cat(page.unbind(1), -1).unbind(0), -2)
    with replacing(path) as new:
        Image.fromarray(((page + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(new)
    return path
