"""How much of a control's effect survives on other members of the family: python -m analysis.transfer [config=FILE] [key=value ...]

Without arguments: the shipped controls, trained on tiny/base, on every member of `tiny`; some minutes on a CPU.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from analysis import record, report
from configs import ROOT, UserError, command, entry, load, replacing, run_folder, tracking, versions
from controls import formats, stats
from controls.effect import change, own_directions, percent_change, preservation
from controls.lora import Control, applied
from models.evaluators import Evaluator, evaluators
from models.families import DTYPES, Family

SHIPPED = [f"controls/tiny/{name}.safetensors" for name in ("smile", "age", "eyes", "watercolour")]
SHOWN = 4  # images of a cell that its picture shows


@dataclass
class Config:
    name: str = "default"  # of the run folder
    family: str = "tiny"  # a card in configs/families, or the path of one
    controls: list[str] = field(default_factory=lambda: SHIPPED)  # control files
    targets: list[str] = field(default_factory=list)  # members to test on; empty = all of the family
    prompts: list[str] = field(default_factory=list)  # what is drawn; empty = the family card's prompts
    seeds: int = 4  # images per prompt
    seed: int = 1000  # the first image seed, and that of the bootstrap
    scales: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])  # of sliders; must hold 0
    lora_scales: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # of other controls; must hold 0
    positive: str = ""  # what a control makes; empty = what its card says
    negative: str = ""  # what it departs from; empty = what its card says
    batch: int = 48  # images sampled at once
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    out: str = "runs/transfer"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled


@dataclass(frozen=True)
class Job:
    """One set of images: every prompt and seed on one member, under one control at one scale."""

    member: str
    control: str
    scale: float

    @property
    def file(self) -> str:
        return f"features/{self.member}/{'plain' if self.scale == 0 else f'{self.control}@{self.scale:g}'}.safetensors"


def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    start, accelerator = time.time(), Accelerator(cpu=not torch.accelerator.is_available())
    controls = {c.card.name: c for c in map(read, cfg.controls)}
    check(cfg, controls)
    family = Family(cfg.family, accelerator.device, DTYPES[cfg.dtype])
    cfg.prompts = cfg.prompts or family.card.prompts
    targets = cfg.targets or list(family.card.members)
    members = list(dict.fromkeys([*(c.card.member for c in controls.values()), *targets]))
    unknown = [name for name in members if name not in family.card.members]
    if unknown:
        raise UserError(f"no member {unknown[0]!r} in family {family.card.name}: there are {', '.join(family.card.members)}")
    eyes = evaluators(family.card, accelerator.device)
    for control in controls.values():  # a misfit is said now, not after an hour of drawing
        with applied(family.member(control.card.member).denoiser.net, control, 1.0, family.card.name):
            pass
    folder = Path(cfg.out) / cfg.name
    if accelerator.is_main_process:
        run_folder(cfg, folder, cfg.overwrite, free=("wandb", "out", "batch"))
    accelerator.wait_for_everyone()

    jobs = [Job(member, name, scale) for member in members for name, control in controls.items() for scale in scales_of(cfg, control)]
    todo = [job for job in {job.file: job for job in jobs}.values() if not (folder / job.file).exists()]  # scale 0 is shared
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    for job in tqdm(mine, "transfer", unit="set", disable=not accelerator.is_main_process):
        draw(cfg, family, controls, eyes, job, folder / job.file)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return folder / "report.html"

    cells = [cell(cfg, control, target, eyes, folder) for control in controls.values() for target in targets]
    for control in controls.values():
        rows = {target: gather(cfg, control, target, folder)["pictures"][:, 0] for target in targets}
        record.overview(rows, scales_of(cfg, control), folder / f"images/{control.card.name}/members.png")
    results = {"schema": 1, "command": command(), "versions": versions(), "created": datetime.now(UTC).isoformat(timespec="seconds"),
               "seconds": round(time.time() - start, 1), "config": asdict(cfg), "evaluators": list(eyes), "cells": cells}  # fmt: skip
    record.write(results, folder)
    page = report.build(folder)
    show(cells, targets)
    print(f"{time.time() - start:.0f} seconds; report: {page}")
    with tracking.start(folder, asdict(cfg), "analysis.transfer", "+".join(controls), cfg.wandb) as tracker:
        record.track(results, folder, tracker)
    return page


def read(path: str) -> Control:
    """A control file, as given or relative to the project."""
    return formats.load(path if Path(path).is_file() else ROOT / path)


def check(cfg: Config, controls: dict[str, Control]) -> None:
    """What can be wrong before anything is loaded."""
    if len(controls) < len(cfg.controls) or not controls:
        raise UserError(f"controls must be files of different names; got {', '.join(cfg.controls) or 'none'}")
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
    for key in ("scales", "lora_scales"):
        values = sorted(set(getattr(cfg, key)))
        if 0 not in values or max(values) < 1:
            raise UserError(f"{key} must hold 0 and reach 1; got {getattr(cfg, key)}")
        setattr(cfg, key, values)
    if cfg.seeds < 1:
        raise UserError(f"seeds must be at least 1; got {cfg.seeds}")
    for control in controls.values():
        words(cfg, control)


def words(cfg: Config, control: Control) -> tuple[str, str] | None:
    """The positive and negative descriptions by which a control is measured; None without words, as SliderSpace's directions are."""
    recipe = control.card.recipe
    pair = (cfg.positive or recipe.get("positive", ""), cfg.negative or recipe.get("negative", ""))
    if any(pair) and not all(pair):
        raise UserError(f"{control.card.name} has only one of its two descriptions: give positive=… and negative=…, or neither")
    return pair if all(pair) else None


def scales_of(cfg: Config, control: Control) -> list[float]:
    return cfg.lora_scales if control.card.kind == "lora" else cfg.scales


@torch.no_grad()
def draw(cfg: Config, family: Family, controls: dict[str, Control], eyes: dict[str, Evaluator], job: Job, path: Path) -> None:
    """Samples one job's images and stores their features, and the first few pictures, as one safetensors file."""
    member = family.member(job.member)
    texts = [prompt for prompt in cfg.prompts for _ in range(cfg.seeds)]
    seeds = [cfg.seed + i for i in range(len(texts))]
    with applied(member.denoiser.net, controls[job.control], job.scale, family.card.name):
        images = family.draw(member, texts, seeds, cfg.batch)
    shown = ((images[:: cfg.seeds][:SHOWN] + 1) * 127.5).round().to(torch.uint8)
    tensors = {name: torch.from_numpy(eye.features(images)) for name, eye in eyes.items()}
    with replacing(path) as new:
        save_file({**tensors, "pictures": shown.contiguous()}, new)


def gather(cfg: Config, control: Control, member: str, folder: Path) -> dict[str, Tensor]:
    """All scales of a control on a member: features (P, S, K, d) per evaluator, and pictures (K, n, 3, H, W)."""
    files = [load_file(folder / Job(member, control.card.name, scale).file) for scale in scales_of(cfg, control)]
    shape = (len(cfg.prompts), cfg.seeds, len(files), -1)
    found = {key: torch.stack([f[key] for f in files], 1).reshape(shape) for key in files[0] if key != "pictures"}
    return {**found, "pictures": torch.stack([f["pictures"] for f in files])}


def cell(cfg: Config, control: Control, target: str, eyes: dict[str, Evaluator], folder: Path) -> dict:
    """One control on one target: the record that DESIGN's contract describes."""
    pair, scales = words(cfg, control), np.array(scales_of(cfg, control))
    zero = int(np.flatnonzero(scales == 0)[0])
    there, here = gather(cfg, control, target, folder), gather(cfg, control, control.card.member, folder)
    readings = {name: reading(eye, here[name].numpy(), there[name].numpy(), pair, scales, zero, cfg) for name, eye in eyes.items()}
    first, *others = readings
    clip = there["clip"].numpy() @ eyes["clip"].texts([pair[0]])[0] if pair else None
    picture = f"images/{control.card.name}/{target}.png"
    record.picture(there["pictures"], folder / picture)
    return {
        "control": control.card.name, "kind": control.card.kind, "source": f"{control.card.family}/{control.card.member}",
        "target": f"{control.card.family}/{target}", "evaluator": first, "scales": scales.tolist(), **readings[first],
        "clip_change_percent": percent_change(clip[..., -1], clip[..., zero]) if pair else None,
        "images": len(cfg.prompts) * cfg.seeds * len(scales), "prompts": len(cfg.prompts), "seeds": cfg.seeds,
        "positive": pair[0] if pair else "", "negative": pair[1] if pair else "",
        "picture": picture, "second": {name: readings[name] for name in others},
    }  # fmt: skip


def reading(eye: Evaluator, here, there, pair: tuple[str, str] | None, scales, zero: int, cfg: Config) -> dict:
    """What one evaluator says of a cell; here, there: features (P, S, K, d) on the source and on the target.

    Without words the effect is the movement along the control's own direction on its source.
    """
    if pair:
        source, target, rest = eye.score(here, *pair), eye.score(there, *pair), eye.rest(there, *pair)
    else:
        directions = own_directions(here, zero)[:, None, None]
        source, target = ((features * directions).sum(-1) for features in (here, there))
        rest = there - target[..., None] * directions
    source, target = change(source, zero), change(target, zero)
    kept, (below, above) = stats.retention(source, target, scales), stats.slopes(source, target, scales)
    return {
        **stats.estimate(target, scales),
        "retention": kept,
        "matched_scale": stats.matched_scale(source, target, scales),
        "monotonicity": stats.monotonicity(target, scales),
        "preservation": preservation(rest, zero),
        "verdict": stats.verdict(kept, stats.equivalence(above, below), stats.difference(above, below)),
    }


def show(cells: list[dict], targets: list[str]) -> None:
    """Prints the table in the shape of the paper's T1: controls in rows, members in columns."""
    table = Table(title="Retention [95 %] by CLIP, verdict; second line: probe; third: % change of the CLIP score", show_lines=True)
    for head in ("control", *(f"-> {target}" for target in targets)):
        table.add_column(head)
    for name in dict.fromkeys(c["control"] for c in cells):
        table.add_row(name, *("\n".join(lines(c)) for c in cells if c["control"] == name))
    Console(width=max(100, Console().width)).print(table)


def lines(found: dict) -> Iterator[str]:
    """The lines of one printed cell."""
    yield f"{report.ranged(found['retention'])} {found['verdict']}"
    for name, second in found["second"].items():
        yield f"{report.ranged(second['retention'])} {name}"
    yield f"{report.percent(found['clip_change_percent'])}"


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
