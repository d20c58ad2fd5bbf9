"""Measures what controls leave of a prompt: python train/bench/obeys.py [key=value ...]

For controls that `analysis.transfer adapt=true` has taught to members: which share of what held-out captions
of the embedded world claim the probe sees in images of the source and of the member, without a control, with
the original and with the adapted one. Writes runs/bench-obeys/results.json.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from configs import UserError, entry, list_of
from configs.screen import show_table
from controls import formats
from controls.lora import Control, fused
from models.evaluators import Attributes
from models.families import Family, split
from models.tiny import world
from models.tiny.certificate import checks
from models.tiny.faces import claims
from train.bench.figures import read, write_cells

SEED = 555  # of the held-out captions, as in the family's certificate


@dataclass
class Config:
    results: str = "runs/transfer/all/results.json"  # of a run with adapt=true
    controls: list[str] = list_of()  # originals, by name; empty = all that were adapted
    images: int = 120  # one per held-out caption
    out: str = "runs/bench-obeys"  # results.json goes there


def main(cfg: Config) -> None:
    """Draws with every original and all that was made of it, prints the table."""
    cells, files = adapted(cfg.results, cfg.controls)
    family, rows = Family("tiny"), {}

    @cache
    def obeys(on: str, name: str = "") -> list[float]:
        return obeyed(family, cfg.images, on, files.get(name))

    for cell in cells:
        name = cell["adapted_from"]
        for on in (cell["source"], cell["target"]):
            row = {"bare": obeys(on), "original": obeys(on, name), "adapted": None}
            rows.setdefault((name, on), row)
        rows[name, cell["target"]]["adapted"] = obeys(cell["target"], cell["control"])
    write_cells(cfg, [{"control": name, "on": on, **row} for (name, on), row in rows.items()])
    shown = [
        {"control": name, "on": on, **{key: said(share) for key, share in row.items()}}
        for (name, on), row in rows.items()
    ]
    show_table("Share of a caption's claims that the probe sees, ± its standard error", shown)


def adapted(results: str, controls: list[str]) -> tuple[list[dict], dict[str, Control]]:
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


def obeyed(family: Family, images: int, target: str, control: Control | None = None) -> list[float]:
    """The share of claims that hold in images of a member, under a control at scale 1, and its error."""
    member, probe = family.member(split(target)[1]), Attributes(family.card.probe)
    texts = world.captions(world.faces(images, SEED), SEED)
    with fused(member.denoiser.net, control, 1.0, family.card.name) if control else nullcontext():
        seen = probe.features(family.draw(member, texts, list(range(images))))
    return with_error(held(texts, seen))


def held(texts: list[str], seen: np.ndarray) -> list[float]:
    """Of every text the share of its claims that the probe has seen; seen: (N, attributes)."""
    return [
        float(np.mean(list(checks(claims(text), its).values())))
        for text, its in zip(texts, seen, strict=True)
    ]


def with_error(values: list[float]) -> list[float]:
    """Mean and standard error."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)]


def said(share: list[float] | None) -> str:
    return "" if share is None else f"{share[0]:.3f} ± {share[1]:.3f}"


if __name__ == "__main__":
    entry(main, Config)
