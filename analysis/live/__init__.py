"""Controls by hand: python -m analysis.live [config=FILE] [key=value ...]

A page in the browser: base, student and a plan of both side by side on one prompt and seed, a dial for every
control, what the networks believe step by step, and nine seeds with their variety. Without arguments: the
embedded family, dmd8, hybrid(1) and all shipped controls, on a CPU. Needs gradio (extra live) and no network.
"""

from dataclasses import dataclass, field

import torch

from analysis.images.cache import ways
from analysis.live import page
from analysis.live.studio import Studio, bare_wish, check_plan
from configs import ROOT, UserError, list_of, note
from controls import formats
from controls.lora import Control, fits
from models.cards import FamilyCard
from models.families import DTYPES, Family, Memory
from models.quantized import check

SHIPPED = ROOT / "controls"  # a folder of control files per family
ORDER = {"slider": 0, "lora": 1, "sliderspace": 2}  # of their dials


@dataclass
class Config:
    family: str = "tiny"  # a card in configs/families, or the path of one
    # member beside the base; empty = the one with the most guidance distilled into it, which loses most
    # variety
    student: str = ""
    plan: str = "hybrid(1)"  # drawn third, of base and student, as models/plans.py writes it
    # control files, a dial each; empty = all shipped ones of the family that fit (controls/<family>)
    controls: list[str] = list_of()
    prompt: str = ""  # what is drawn first; empty = the first prompt of the family's card
    seed: int = 11  # of the first picture, and of the first of nine
    port: int = 7860  # of the page
    host: str = "127.0.0.1"  # who may see it: this machine alone; 0.0.0.0 = everybody who reaches it
    # images at once; 0 = as many as usual at their size (48; 4 at 1024 px); halved where memory does not
    # suffice
    batch_size: int = 0
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(default_factory=Memory)  # what to do without, at the price of time


def main(cfg: Config) -> None:
    """Opens the page and stays until it is interrupted."""
    page.check_place(cfg.host, cfg.port)
    studio = opened(cfg)
    with page.served(studio, cfg.host, cfg.port) as (address, wait):
        print(f"open {address} (Ctrl-C ends it)", flush=True)
        wait()


def opened(cfg: Config) -> Studio:
    """The studio of a config. Raises UserError for what cannot be, before any weights are loaded."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
    check(cfg.quantize)
    bare = Family(cfg.family, bare=True)
    first = bare_wish(cfg.prompt or next(iter(bare.card.prompts), ""), cfg.seed)
    student = cfg.student or most_guided(bare.card)
    ways([cfg.plan], [student], bare)
    check_plan(cfg.plan)
    controls = dials_of(cfg.controls, student, bare)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    device = cfg.memory.planned(device, dry_run=False)
    how = DTYPES[cfg.dtype], cfg.memory, False, cfg.batch_size, cfg.quantize
    return Studio(Family(cfg.family, device, *how), student, cfg.plan, controls, first)


def most_guided(card: FamilyCard) -> str:
    """The student with the most guidance distilled into it, the first where several have or none says so."""
    students = [name for name in card.usual if name != card.base]
    if not students:
        raise UserError(f"family {card.name} has no student; this page sets one beside its base")
    return max(students, key=lambda name: card.members[name].teacher_guidance or 0)


def dials_of(files: list[str], student: str, bare: Family) -> list[Control]:
    """The controls of these files, or those shipped with the family that fit its networks.

    Raises UserError for a given one without a place in them, and for two of one name.
    """
    nets = [bare.member(name).denoiser.net for name in (bare.card.base, student)]
    shipped = sorted((SHIPPED / bare.card.name).glob("*.safetensors"))
    controls = []
    for control in map(formats.load, files or shipped):
        try:
            for net in nets:
                fits(net, control, bare.card.name)
        except UserError as error:
            if files:
                raise
            note(f"left out: {error}")
        else:
            controls.append(control)
    if not files:
        controls.sort(key=lambda its: (ORDER.get(its.card.kind, len(ORDER)), its.card.name))
    names = [control.card.name for control in controls]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two controls are called {twice[0]!r}; python -m controls.convert IN OUT name=… gives one "
            f"another name"
        )
    return controls
