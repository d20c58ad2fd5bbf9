"""Draws controls: python -m controls.show A B … [key=value ...]

One picture with a row per control file: the same prompt and seed at every scale, on the member that it was
trained on or on another.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError, cut, entry, list_of, load, plain
from controls import formats
from controls.lora import fused
from controls.picture_grid import picture_grid, scale_heads, to_uint8
from models.families import DTYPES, Family, Memory, split
from models.quantized import check

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 512  # side of a tile; small pictures are doubled


@dataclass
class Config:
    member: str = ""  # family/member to draw on; empty = the one that each control was trained on
    prompt: str = ""  # what is drawn; empty = the first prompt of the family's card
    seed: int = 11  # of the picture
    scales: list[float] = list_of(-2.0, -1.0, 0.0, 1.0, 2.0)  # columns, for sliders
    lora_scales: list[float] = list_of(0.0, 0.25, 0.5, 0.75, 1.0)  # columns, for other controls
    # images at once; 0 = as many as usual at their size (48; 4 at 1024 px); halved where memory does not
    # suffice
    batch_size: int = 0
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(default_factory=Memory)  # what to do without, at the price of time
    out: str = "controls.png"  # the picture


def main(files: list[str], cfg: Config) -> Path:
    """Draws every control and returns the picture's path."""
    if Path(cfg.out).is_dir() or not cfg.out.lower().endswith(PICTURES):
        raise UserError(
            f"cannot write out={cut(cfg.out)}: it is a folder, or does not end in {', '.join(PICTURES)}"
        )
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cut(cfg.dtype)!r}; there are {', '.join(DTYPES)}")
    check(cfg.quantize)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    rows, families, device = [], {}, cfg.memory.planned(device, dry_run=False)
    for control in map(formats.load, files):
        card = control.card
        family_name, member_name = split(cfg.member or f"{card.family}/{card.member}")
        if family_name not in families:
            families[family_name] = Family(
                family_name,
                device,
                DTYPES[cfg.dtype],
                cfg.memory,
                batch_size=cfg.batch_size,
                quantize=cfg.quantize,
            )
        family = families[family_name]
        prompt = cfg.prompt or next(iter(family.card.prompts), "")
        family.encode_all([prompt])  # so that the text encoders are gone when the network comes
        member = family.member(member_name)
        scales = cfg.lora_scales if card.kind == "lora" else cfg.scales
        shown = []
        for scale in scales:
            with torch.no_grad(), fused(member.denoiser.net, control, scale, family.card.name):
                shown.append(family.draw(member, [prompt], [cfg.seed]))
        rows.append((card.name, scales, torch.cat(shown)))
    return sheet(rows, Path(cfg.out))


def sheet(rows: list[tuple[str, list[float], Tensor]], path: Path) -> Path:
    """Writes a grid: in each row a name, scales and pictures (K, 3, H, W) in [-1, 1]. Raises UserError."""
    labelled = [(name, scale_heads(scales), list(to_uint8(pictures))) for name, scales, pictures in rows]
    try:
        return picture_grid(labelled, path, min(LARGEST, 2 * rows[0][2].shape[-1]))
    except OSError as error:
        raise UserError(f"cannot write out={cut(path)}: {error.strerror or error}") from None


def run() -> None:
    files, words = plain(sys.argv[1:])
    cfg = load(Config, words)
    if not files:
        raise UserError("say which controls to draw: python -m controls.show FILE …")
    print(main(files, cfg))


if __name__ == "__main__":
    entry(run)
