"""Converts a control between layouts: python -m controls.convert IN OUT [key=value ...]

IN is a file, a folder of PEFT's, or hub:owner/name/file, of any known layout: diffusers, kohya with
diffusers, SGM, Flux's or SD3's names, LyCORIS (LoCon, LoHa, LoKr where a low-rank pair holds them), PEFT, the
original sliders' .pt, ai-toolkit's, XLabs', Z-Image's fused.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from configs import UserError, entry, load, plain, plain_name
from controls import formats
from controls.formats.files import header
from controls.formats.layouts import ENCODER_POLICIES
from controls.lora import Card, Control
from models import cards
from models.cards import split
from models.loading import skeleton


@dataclass
class Config:
    # of OUT: diffusers (native, for this toolkit and diffusers), kohya (ComfyUI, A1111)
    format: str = "diffusers"
    # family/member that a file of other tools was trained on; its config says where the layers are
    member: str = ""
    # what becomes of text encoders' layers: refuse the file, or ignore them and say how many are left out
    encoders: str = "refuse"
    kind: str = ""  # slider or lora; empty = as the card says, lora where the file has none
    name: str = ""  # of the control; empty = as the card says, or IN's file name
    positive: str = ""  # what it makes, in words, by which it is measured; empty = as the card says
    negative: str = ""  # what it departs from; empty = as the card says


KINDS = ("", "slider", "lora", "sliderspace")
WRITERS = {"diffusers": formats.save, "kohya": formats.save_kohya}


def main(source: str | Path, target: str | Path, cfg: Config) -> None:
    """Reads, writes, and says what was written."""
    if cfg.format not in WRITERS:
        raise UserError(f"no format {cfg.format!r}; there are {', '.join(WRITERS)}")
    if cfg.encoders not in ENCODER_POLICIES:
        raise UserError(f"no encoders={cfg.encoders}; there are {', '.join(ENCODER_POLICIES)}")
    if cfg.kind not in KINDS:
        raise UserError(f"no kind={cfg.kind}; there are {', '.join(filter(None, KINDS))}")
    if cfg.name:
        plain_name(cfg.name)
    control = labelled(opened(source, cfg), cfg)
    WRITERS[cfg.format](control, target)
    layers = len(control.tensors) // 2
    print(
        f"{target}: {control.card.name}, {layers} layers, rank {control.card.rank}, alpha "
        f"{control.card.alpha:g}, {cfg.format}"
    )


def opened(source: str | Path, cfg: Config) -> Control:
    """A control of any layout. Raises UserError where the network to read it by is not named."""
    card = formats.card_of(source, header(source)[1])
    if cfg.member and card and cards.card(split(cfg.member)[0]).name != card.family:
        raise UserError(
            f"{source} was trained on {card.family}/{card.member}, as its card says, not on {cfg.member}"
        )
    if formats.native(source):
        return formats.load(source)
    if not cfg.member and card is None:
        raise UserError(
            f"{source} does not say what it was trained on: give member=family/member, e.g. member=sdxl/base"
        )
    family, member = split(cfg.member) if cfg.member else (card.family, card.member)
    its = cards.card(family)
    if member not in its.members:
        raise UserError(f"no member {member!r} in family {family}: there are {', '.join(its.members)}")
    own = Card("lora", formats.name(source), its.name, member, 0, 0.0, "full", "c3lier")
    return formats.adopt(source, skeleton(its, member), own, cfg.encoders)


def labelled(control: Control, cfg: Config) -> Control:
    """The control with what the command line says of it in its card."""
    said = {key: getattr(cfg, key) for key in ("name", "kind") if getattr(cfg, key)}
    words = {key: getattr(cfg, key) for key in ("positive", "negative") if getattr(cfg, key)}
    return Control(replace(control.card, **said, recipe={**control.card.recipe, **words}), control.tensors)


def run() -> None:
    files, words = plain(sys.argv[1:])
    cfg = load(Config, words)
    if len(files) != 2:
        raise UserError(
            f"say what to convert and where to: python -m controls.convert IN OUT; got "
            f"{' '.join(files) or 'nothing'}"
        )
    main(*files, cfg)


if __name__ == "__main__":
    entry(run)
