"""Measures what train/adapt.py brings, what it leaves, and how far it could go at best: python
train/bench/adapted.py [key=value ...], or make bench-adapted

For controls that `analysis.transfer adapt=true` has taught to members, on prompts that they were neither
learnt on nor judged by: the share of the original's effect on its source, preservation, and the share of what
prompts claim that the probe sees. With the original, with the adapted one, and as the perfect pupil, whose x0
at every step is its own and exactly the change that train/adapt.py teaches, no weights trained; and where a
member lies without a control, for what is nearly there cannot go as far. Writes
runs/bench-adapted/results.json.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from configs import UserError, entry, list_of
from configs.screen import show_table
from controls import formats
from controls.effect import cosine
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
from train.bench.figures import read, write_cells
from train.bench.prior import held, with_error
from train.shares import Features, Shares

SEED = 900_000
SIDES = ("without", "original", "adapted", "pupil")  # of a member


@dataclass
class Config:
    results: str = "runs/transfer/all/results.json"  # of a run with adapt=true
    controls: list[str] = list_of()  # originals, by name; empty = all that were adapted
    images: int = 96  # one per prompt of those that are neither learnt on nor judged by
    ahead: int = 4  # as in train/adapt.py
    cache: str = "runs/cache"  # what is seen of the originals on their sources is kept here
    out: str = "runs/bench-adapted"  # results.json goes there


@dataclass
class Taught(Denoiser):
    """A denoiser whose x0 is changed by exactly what is taught."""

    change: Callable[[Tensor, Noise, Prompts], Tensor] | None = None

    def __call__(self, x: Tensor, noise: Noise, prompts: Prompts, guidance: float | None = None) -> Tensor:
        return super().__call__(x, noise, prompts, guidance) + self.change(x, noise, prompts)


def main(cfg: Config) -> None:
    """Draws with every original, with all that was made of it and as the perfect pupil; prints tables."""
    cells, files = taught(cfg.results, cfg.controls)
    family, rows, claims = Family("tiny"), [], []

    @cache
    def effect(name: str) -> Shares:
        return effect_of(cfg, family, files[name])

    for cell in cells:
        shares = effect(cell["adapted_from"])
        its = seen(cfg, family, shares, cell, files)
        about = {"control": cell["adapted_from"], "on": cell["target"]}
        before, source = its["without"], (shares.plain, shares.edited)
        kept = {"without": shares.of(shares.plain, before)}
        kept |= {side: shares.of(before, its[side]) for side in SIDES[1:]}
        left = {"source": preserved(shares, *source)}
        left |= {side: preserved(shares, before, its[side]) for side in SIDES[2:]}
        for judge in before:
            share = {side: kept[side][judge] for side in SIDES}
            preservation = {side: left[side][judge] for side in left}
            rows.append({**about, "evaluator": judge, "share": share, "preservation": preservation})
        ends = dict(zip(("source", "source, original"), source, strict=True)) | its
        claims += [about | {end: obeyed(shares, features) for end, features in ends.items()}]
    write_cells(cfg, {"effects": rows, "claims": claims})
    show(rows, claims)


def show(rows: list[dict], claims: list[dict]) -> None:
    """Prints the shares of the effect, preservation, and what holds of the prompts."""
    about = ("control", "on", "evaluator")
    effects = [
        {key: row[key] for key in about} | {side: ranged(row["share"][side]) for side in SIDES}
        for row in rows
    ]
    show_table("Share of the original's effect on its source [95 %]", effects)
    left = [
        {key: row[key] for key in about} | {key: f"{its:.3f}" for key, its in row["preservation"].items()}
        for row in rows
    ]
    show_table("Preservation; source: by the original there", left)
    obedience = [
        {key: its if isinstance(its, str) else "{:.3f} ± {:.3f}".format(*its) for key, its in row.items()}
        for row in claims
    ]
    show_table("Share of a prompt's claims that the probe sees, ± its standard error", obedience)


def taught(results: str, controls: list[str]) -> tuple[list[dict], dict[str, Control]]:
    """The cells in which something was adapted, of some originals, and all controls by name. Raises UserError
    where there are no results.
    """
    if not Path(results).is_file():
        raise UserError(f"no results {results}: run analysis.transfer adapt=true, and name its results.json")
    record = read(Path(results))
    paths = record["config"]["controls"]
    files = {name: formats.load(path) for name, path in zip(formats.names(paths), paths, strict=True)}
    cells = [c for c in record["cells"] if c["adapted_from"] and c["target"] != c["source"]]
    return [c for c in cells if not controls or c["adapted_from"] in controls], files


def seen(
    cfg: Config, family: Family, shares: Shares, cell: dict, files: dict[str, Control]
) -> dict[str, Features]:
    """A member without a control, with the original, with the adapted one and as the perfect pupil."""
    original = files[cell["adapted_from"]]
    source, member = (family.member(split(cell[end])[1]) for end in ("source", "target"))
    on = fusing(source.denoiser.net, original, 1.0)
    drawn = {
        "without": (member, nullcontext),
        "original": (member, fusing(member.denoiser.net, original, 1.0)),
        "adapted": (member, fusing(member.denoiser.net, files[cell["control"]], 1.0)),
        "pupil": (perfect(member, source, on, cfg.ahead), nullcontext),
    }
    return {side: shares.seen(*drawn[side]) for side in SIDES}


def preserved(shares: Shares, before: Features, after: Features) -> dict[str, float]:
    """How much of what should not change is as before, by evaluator, 1 = all, as analysis.transfer has it."""
    return {
        name: float(cosine(shares.rest(name, before[name]), shares.rest(name, after[name])).mean())
        for name in before
    }


def obeyed(shares: Shares, features: Features) -> list[float]:
    """The share of the prompts' claims that the probe sees, and its standard error."""
    return with_error(held(shares.texts, features["probe"]))


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
