"""Measures how far a control can be taught: python train/bench/pupil.py [key=value ...]

For controls that `analysis.transfer adapt=true` has taught to members: which share of the original's effect
on its source a member has with the original, with the adapted one, and as the perfect pupil, whose x0 at
every step is its own and exactly the change that train/adapt.py teaches, no weights trained; and where it
lies without a control, in the same units, for what is nearly there cannot go as far. Writes
runs/bench-pupil/results.json.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from configs import entry, list_of
from configs.screen import show_table
from controls.lora import Control, content, fusing
from models import promptsets
from models.denoiser import Denoiser
from models.evaluators import load_evaluators
from models.families import Family, split
from models.hashing import identity
from models.noise import Noise
from models.prompts import Prompts
from models.sampler import Member
from train.adapt import ranged, taught_change
from train.bench.figures import write_cells
from train.bench.obeys import adapted
from train.shares import Shares

SEED = 900_000


@dataclass
class Config:
    results: str = "runs/transfer/all/results.json"  # of a run with adapt=true
    controls: list[str] = list_of()  # originals, by name; empty = all that were adapted
    images: int = 96  # one per prompt of those that are neither learnt on nor judged by
    ahead: int = 4  # as in train/adapt.py
    cache: str = "runs/cache"  # what is seen of the originals on their sources is kept here
    out: str = "runs/bench-pupil"  # results.json goes there


@dataclass
class Taught(Denoiser):
    """A denoiser whose x0 is changed by exactly what is taught."""

    change: Callable[[Tensor, Noise, Prompts], Tensor] | None = None

    def __call__(self, x: Tensor, noise: Noise, prompts: Prompts, guidance: float | None = None) -> Tensor:
        return super().__call__(x, noise, prompts, guidance) + self.change(x, noise, prompts)


def main(cfg: Config) -> None:
    """Draws with every original, with all that was made of it and as the perfect pupil; prints the table."""
    cells, files = adapted(cfg.results, cfg.controls)
    family, rows = Family("tiny"), []

    @cache
    def effect(name: str) -> Shares:
        return effect_of(cfg, family, files[name])

    for cell in cells:
        name, shares = cell["adapted_from"], effect(cell["adapted_from"])
        source, member = (family.member(split(cell[end])[1]) for end in ("source", "target"))
        on = fusing(source.denoiser.net, files[name], 1.0)
        sides = {
            "original": (member, fusing(member.denoiser.net, files[name], 1.0)),
            "adapted": (member, fusing(member.denoiser.net, files[cell["control"]], 1.0)),
            "pupil": (perfect(member, source, on, cfg.ahead), nullcontext),
        }
        bare = shares.seen(member, nullcontext)
        kept = {"without": shares.of(shares.plain, bare)}
        kept |= {side: shares.of(bare, shares.seen(*drawn)) for side, drawn in sides.items()}
        about = {"control": name, "on": cell["target"]}
        rows += [
            {**about, "evaluator": judge, **{side: its[judge] for side, its in kept.items()}}
            for judge in bare
        ]
    write_cells(cfg, rows)
    sides = ("without", "original", "adapted", "pupil")
    shown = [{**row, **{side: ranged(row[side]) for side in sides}} for row in rows]
    show_table("Share of the original's effect on its source [95 %]", shown)


def effect_of(cfg: Config, family: Family, original: Control) -> Shares:
    """What the original does on its source, on prompts that train/adapt.py has not seen."""
    about = original.card
    words = tuple(about.recipe.get(key, "") for key in ("positive", "negative"))
    texts = promptsets.read([family.card.more_prompts]).texts[: cfg.images]
    shares = Shares(family, load_evaluators(family.card, family.device), words, texts, SEED)
    source = family.member(about.member)
    sides = nullcontext, fusing(source.denoiser.net, original, 1.0)
    keys = identity(family.card, about.member), content(original)
    shares.source(family, source, sides, Path(cfg.cache), keys)
    return shares


def perfect(member: Member, source: Member, on: Callable[[], AbstractContextManager], ahead: int) -> Member:
    """The member that has learnt all that it is taught of what a control does on a source."""
    own = member.denoiser
    parts = {its.name: getattr(own, its.name) for its in fields(own) if its.init}
    return replace(member, denoiser=Taught(**parts, change=partial(taught_change, source, on, ahead=ahead)))


if __name__ == "__main__":
    entry(main, Config)
