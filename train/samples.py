"""Pictures of a control while it is trained."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from configs import replacing
from controls.lora import strength
from models.families import Family
from models.sample import Member, alone, finish


@torch.no_grad()
def strip(family: Family, member: Member, noise: Tensor, control: str, scales: list[float], prompt: str, path: Path) -> Path:
    """Writes a picture of an attached control: one prompt, noises (rows, …) in rows, scales in columns. Returns its path."""
    prompts = family.encode([prompt] * len(noise))
    columns = []
    for scale in scales:
        with strength(member.denoiser.net, {control: scale}):
            columns.append(family.decode(finish(alone(member), noise, prompts)))
    page = torch.stack(columns, 1)  # (rows, columns, 3, H, W)
    page = torch.cat(torch.cat(page.unbind(1), -1).unbind(0), -2)
    with replacing(path) as new:
        Image.fromarray(((page + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(new)
    return path
