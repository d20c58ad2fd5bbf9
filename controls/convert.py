"""Converts a control between layouts: python -m controls.convert IN OUT [key=value ...]

IN is a file, or hub:owner/name/file, of any known layout: diffusers, kohya with diffusers or SGM names, the
original sliders' .pt, ai-toolkit's, Flux's fused.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from configs import UserError, entry, load, plain
from controls import formats
from controls.lora import Card, Control
from models import cards
from models.cards import split
from models.loading import skeleton


@dataclass
class Config:
    format: str = "diffusers"  # of OUT: diffusers (native, for this toolkit and diffusers), kohya (ComfyUI, A1111)
    member: str = ""  # family/member that a file of other tools was trained on; its config says where the layers are
    kind: str = "lora"  # slider or lora, where the file has no card
    name: str = ""  # of the control; empty = IN's file name
    positive: str = ""  # what it makes, in words, by which it is measured
    negative: str = ""  # what it departs from


WRITERS = {"diffusers": formats.save, "kohya": formats.save_kohya}


def main(source: Path, target: Path, cfg: Config) -> None:
    """Reads, writes, and says what was written."""
    if cfg.format not in WRITERS:
        raise UserError(f"no format {cfg.format!r}; there are {', '.join(WRITERS)}")
    control = opened(source, cfg)
    WRITERS[cfg.format](control, target)
    layers = len(control.tensors) // 2
    print(f"{target}: {control.card.name}, {layers} layers, rank {control.card.rank}, alpha {control.card.alpha:g}, {cfg.format}")


def opened(source: Path, cfg: Config) -> Control:
    """A control of any layout. Raises UserError when it takes a network to read it and none is named."""
    if formats.native(source):
        return formats.load(source)
    card = formats.card_of(source, formats.read(source)[1])
    if not cfg.member and card is None:
        raise UserError(f"{source} does not say what it was trained on: give member=family/member, e.g. member=sdxl/base")
    family, member = split(cfg.member) if cfg.member else (card.family, card.member)
    its = cards.card(family)
    if member not in its.members:
        raise UserError(f"no member {member!r} in family {family}: there are {', '.join(its.members)}")
    words = {"positive": cfg.positive, "negative": cfg.negative}
    own = Card(cfg.kind, cfg.name or formats.name(source), family, member, 0, 0.0, "full", "c3lier", words)
    return formats.adopt(source, skeleton(its, member), own)


def run() -> None:
    files, words = plain(sys.argv[1:])
    cfg = load(Config, words)
    if len(files) != 2:
        raise UserError(f"say what to convert and where to: python -m controls.convert IN OUT; got {' '.join(files) or 'nothing'}")
    main(Path(files[0]), Path(files[1]), cfg)


if __name__ == "__main__":
    entry(run)
