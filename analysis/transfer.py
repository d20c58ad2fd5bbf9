"""How much of a control's effect survives on other members of the family: python -m analysis.transfer
[config=FILE] [key=value ...]

Without arguments: shipped controls of every kind, trained on tiny/base, on every member of `tiny`; some
minutes on a CPU. --dry-run says what it will cost and what it can see, and draws nothing. Any LoRA:
controls=[my.safetensors] family=sdxl positive="…" negative="…".
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from analysis import model_cards, report, session, wandb_log
from analysis.images.cache import Drawings, Job, in_turn, one_by_one, plan_of
from analysis.images.readings import Measurement, Subject, Words, floor_of, is_reference
from analysis.pages import words
from configs import UserError, entry, list_of, releases, tracking
from controls import formats, intervals
from controls.lora import Card, Control, fits, random_like
from models import devices, promptsets
from models.evaluators import chosen, load_evaluators
from models.families import DTYPES, Family, FamilyCard, Memory
from models.loading import skeleton
from models.plans import PLANS

NAMES = ["smile", "age", "eyes-image", "watercolour", "crayon", *(f"space-{k + 1}" for k in range(8))]
SHIPPED = [f"controls/tiny/{name}.safetensors" for name in NAMES]
SCALES = {
    "lora": "lora_scales",
    "sliderspace": "direction_scales",
}  # kind of control: the key that holds its scales; of others, scales
FREE = (
    "wandb",
    "out",
    "batch_size",
    "memory",
    "cache",
    "dry_run",
    "write_card",
    "controls",
    "encoders",
    "targets",
    "references",
    "evaluators",
    "scales",
    *SCALES.values(),
)


@dataclass
class Config:
    name: str = "default"  # of the run folder
    family: str = "tiny"  # a card in configs/families, or the path of one
    controls: list[str] = list_of(*SHIPPED)  # control files of any layout, or hub:owner/name/file
    # what becomes of text encoders' layers in a file: refuse it, or ignore them and say how many
    encoders: str = "refuse"
    source: str = (
        ""  # the member that controls without a card of ours were trained on; empty = the family's base
    )
    targets: list[str] = (
        list_of()
    )  # members, or plans: dmd:hybrid(1), hybrid(1) for every student; empty = all members
    references: bool = (
        True  # measure floor, ceiling, wrong control, a second drawing and the base in few steps beside
    )
    prompts: list[str] = list_of()  # texts, or files and datasets of them; empty = the family card's prompts
    seeds: int = 4  # images per prompt
    seed: int = 1000  # of the first image
    scales: list[float] = list_of(-2.0, -1.0, 0.0, 0.5, 1.0, 2.0)  # of sliders; must hold 0 and reach 1
    lora_scales: list[float] = list_of(0.0, 0.5, 1.0, 1.5)  # of LoRAs; likewise
    direction_scales: list[float] = list_of(-1.0, 0.0, 1.0)  # of SliderSpace's directions; likewise
    below: float | None = (
        # controls act only at noise levels with sigma / alpha below this, which preserves structure; null =
        # at all
        None
    )
    evaluators: list[str] = (
        list_of()
    )  # of the family's card: clip, siglip, probe, …; empty = all that read words
    positive: str = ""  # what a control makes; empty = what its card says
    negative: str = ""  # what it departs from; empty = what its card says
    # images at once; 0 = as many as usual at their size (48; 4 at 1024 px); halved where memory does not
    # suffice
    batch_size: int = 0
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(
        default_factory=Memory
    )  # what to do without, at the price of time; a continued run may change it
    dry_run: bool = (
        False  # --dry-run: say images, minutes and the smallest difference that can be seen, and stop
    )
    write_card: bool = False  # write the measured scales into the header of each control file
    cache: str = "runs/cache"  # drawings are kept here and shared between runs
    out: str = "runs/transfer"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    start, accelerator, folder = time.time(), devices.start(cfg), Path(cfg.out) / cfg.name
    check(cfg)
    drawings, subjects, targets = prepare(cfg, accelerator.device)
    jobs = jobs_of(cfg, subjects, targets)
    if cfg.dry_run:
        session.show(drawings, subjects, targets, jobs, chosen(drawings.family.card, cfg.evaluators), folder)
        return folder
    fit(cfg, drawings, subjects, jobs)
    devices.claim(accelerator, cfg, FREE)
    cost = draw(drawings, jobs, accelerator)
    if accelerator.is_main_process:
        measurement = Measurement(drawings, subjects, cfg.references)
        cells, leakage = measurement.cells(targets), measurement.leakage(targets)
        drawings.remember_words()
        pictures(drawings, subjects, targets, cells, folder)
        about = {
            **wandb_log.header("analysis.transfer", cfg, start),
            "evaluators": list(drawings.evaluators),
            "margin": list(intervals.MARGIN),
        }
        publish(cfg, {**about, "cost": cost, "cells": cells, "leakage": leakage}, folder)
    return folder / "report.html"


def publish(cfg: Config, results: dict, folder: Path) -> None:
    """The record to its files, the screen and W&B."""
    wandb_log.write(results, folder)
    page, files = (
        report.build(folder),
        dict(zip(formats.names(cfg.controls), map(formats.located, cfg.controls), strict=True)),
    )
    model_cards.write(results, folder)
    show(results["cells"])
    cost = results["cost"]
    print(
        f"{results['seconds']:.0f} seconds, {cost['drawn']} images drawn, {cost['cached']} known; report: "
        f"{page}"
    )
    with tracking.start(folder, asdict(cfg), "analysis.transfer", "+".join(files), cfg.wandb) as tracker:
        wandb_log.track(results, folder, tracker, files)
    for path in files.values() if cfg.write_card else ():
        model_cards.into_header(results, path)  # last, so that W&B's input is the file that training logged


def prepare(cfg: Config, device: torch.device) -> tuple[Drawings, list[Subject], list[str]]:
    """What is measured by what, and on which targets.

    Raises UserError for what cannot be, before anything is drawn.
    """
    family = Family(
        cfg.family, device, DTYPES[cfg.dtype], cfg.memory, cfg.dry_run, cfg.batch_size, cfg.quantize
    )
    subjects = [
        Subject(control, descriptions(cfg, control), scales_of(cfg, control)) for control in read(cfg, family)
    ]
    prompts, targets = promptsets.read(cfg.prompts or family.card.prompts), resolve(cfg, family.card)
    cfg.prompts = prompts.texts
    evaluators = (
        load_evaluators(family.card, device, cfg.evaluators, load_now=False) if not cfg.dry_run else {}
    )
    controls = {(subject.name, False): subject.control for subject in subjects}
    if cfg.references:
        controls |= {(subject.name, True): random_like(subject.control, cfg.seed) for subject in subjects}
    drawings = Drawings(
        family, controls, evaluators, prompts, cfg.seeds, cfg.seed, cfg.below, Path(cfg.cache)
    )
    for subject in subjects:
        for evaluator in evaluators.values() if subject.words else ():
            evaluator.direction(*subject.words)  # words that an evaluator cannot tell apart are an error
    return drawings, subjects, targets


def draw(drawings: Drawings, jobs: list[Job], accelerator: Accelerator) -> dict:
    """Makes what is missing, this process its share; returns images drawn by all, images known before, and
    the seconds it took.
    """
    start, todo, family = time.time(), drawings.missing(jobs), drawings.family
    accelerator.wait_for_everyone()  # all have seen the same before anyone adds to it
    mine = in_turn(todo, family.card)[accelerator.process_index :: accelerator.num_processes]
    if mine:
        family.encode_all(drawings.texts)
    for job in one_by_one(mine, family, "transfer", not accelerator.is_main_process):
        drawings.make(job)
    accelerator.wait_for_everyone()
    each, different = len(drawings.numbers), len({drawings.key(job) for job in jobs})
    return {
        "drawn": len(todo) * each,
        "cached": (different - len(todo)) * each,
        "seconds": round(time.time() - start, 1),
    }


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
    for key in ("scales", *SCALES.values()):
        values = sorted(set(getattr(cfg, key)))
        if 0 not in values or max(values) < 1:
            raise UserError(f"{key} must hold 0 and reach 1; got {getattr(cfg, key)}")
        setattr(cfg, key, values)
    if cfg.below is not None and cfg.below <= 0:
        raise UserError(f"below is a noise level, sigma / alpha above 0, e.g. 2.0; got {cfg.below}")


def read(cfg: Config, family: Family) -> list[Control]:
    """The controls of the files; those of other tools are adopted for the source's network.

    Raises UserError for what does not match.
    """
    names = formats.names(cfg.controls)
    if len(set(names)) < len(names) or not names:
        how = "python -m controls.convert IN OUT name=… gives one another name"
        raise UserError(f"controls must be files of different names; got {', '.join(names) or 'none'}; {how}")
    controls = [adopted(path, name, cfg, family) for path, name in zip(cfg.controls, names, strict=True)]
    strange = [control.card for control in controls if control.card.family != family.card.name]
    if strange:
        raise UserError(
            f"{strange[0].name} was trained on family {strange[0].family!r}, this run is of family "
            f"{family.card.name!r}"
        )
    return controls


def adopted(path: str, name: str, cfg: Config, family: Family) -> Control:
    if formats.native(path):
        return formats.load(path)
    if cfg.write_card:
        model_cards.carded(path)
    source = cfg.source or family.card.base
    own = Card("lora", name, family.card.name, source, 0, 0.0, "full", "c3lier", {})
    return formats.adopt(path, skeleton(family.card, source), own, cfg.encoders)


def descriptions(cfg: Config, control: Control) -> Words:
    """The positive and negative descriptions by which a control is measured; None without words, as
    SliderSpace's directions are.

    A positive one alone measures similarity to it, as of a LoRA to its subject or style.
    """
    recipe = control.card.recipe
    positive, negative = (
        cfg.positive or recipe.get("positive", ""),
        cfg.negative or recipe.get("negative", ""),
    )
    if negative and not positive:
        raise UserError(
            f"{control.card.name} has a negative description and no positive one: give positive=… too"
        )
    return (positive, negative) if positive else None


def scales_of(cfg: Config, control: Control) -> list[float]:
    return getattr(cfg, SCALES.get(control.card.kind, "scales"))


def resolve(cfg: Config, family: FamilyCard) -> list[str]:
    """The targets, members and member:plan, each source's own among them where all are meant.

    Raises UserError for what does not exist.
    """
    students = [name for name in family.members if name != family.base]
    found = []
    for target in cfg.targets or family.members:
        bare = target not in family.members and target.partition("(")[0] in PLANS
        found += [f"{student}:{target}" for student in students] if bare else [target]
    if cfg.references and students:
        steps = {
            len(card.timesteps) or card.steps for name, card in family.members.items() if name != family.base
        }
        found.append(f"{family.base}:few({min(steps)})")
    unknown = [target for target in found if target.partition(":")[0] not in family.members]
    if unknown:
        raise UserError(
            f"no member {unknown[0]!r} in family {family.name}: there are {', '.join(family.members)}"
        )
    return list(dict.fromkeys(found))


def jobs_of(cfg: Config, subjects: list[Subject], targets: list[str]) -> list[Job]:
    """All that is to be drawn: subjects at their scales on their sources and on the targets, and the
    references.
    """
    found = [
        job for s in subjects for target in dict.fromkeys([s.source, *targets]) for job in s.jobs(target)
    ]
    if cfg.references:
        found += [floor_of(target, subject) for subject in subjects for target in targets]
        found += [Job(target, again=True) for target in targets if not is_reference(target)]
    return found


def fit(cfg: Config, drawings: Drawings, subjects: list[Subject], jobs: list[Job]) -> None:
    """A control or a plan that does not fit is said now, by configs alone, not after an hour of drawing;
    nothing where all is drawn.
    """
    todo = drawings.missing(jobs)
    if not todo:
        return
    for evaluator in drawings.evaluators.values():
        evaluator.features(torch.zeros(1, 3, 64, 64))
    outline = Family(cfg.family, drawings.family.device, drawings.family.dtype, bare=True)
    for subject in subjects:
        fits(outline.member(subject.source).denoiser.net, subject.control, outline.card.name)
    for target in dict.fromkeys(job.target for job in todo):
        plan_of(outline, target)


def pictures(
    drawings: Drawings, subjects: list[Subject], targets: list[str], cells: list[dict], folder: Path
) -> None:
    """The sheets that cells name, and one overview per control."""
    cells = iter(cells)
    for subject in subjects:
        sheets = {
            target: torch.stack([drawings.pictures(job) for job in subject.jobs(target)])
            for target in targets
        }
        for sheet in sheets.values():
            wandb_log.picture(sheet, folder / next(cells)["picture"])
        rows = {target: sheet[:, 0] for target, sheet in sheets.items()}
        wandb_log.overview(rows, subject.scales, folder / f"images/{subject.name}/members.png")


def show(cells: list[dict]) -> None:
    """Prints the table in the shape of the paper's T1: controls in rows, members in columns."""
    targets = list(dict.fromkeys(cell["target"] for cell in cells))
    first, *others = cells[0]["readings"]
    title = (
        f"Retention [95 %] by {first}, verdict; then by {' and '.join(others)}; then matched scale, % "
        f"change of the CLIP score"
    )
    table = Table(title=title, show_lines=True)
    for head in ("control", *(f"-> {target.partition('/')[2]}" for target in targets)):
        table.add_column(head)
    for name in dict.fromkeys(cell["control"] for cell in cells):
        mine = [cell for cell in cells if cell["control"] == name]
        table.add_row(
            f"{name}\nfrom {mine[0]['source'].partition('/')[2]}", *("\n".join(lines(cell)) for cell in mine)
        )
    Console(width=max(100, Console().width)).print(table)


def lines(cell: dict) -> Iterator[str]:
    """The lines of one printed cell."""
    (_, first), *others = cell["readings"].items()
    yield f"{words.ranged(first['retention'])} {'' if cell['reference'] else first['verdict']}"
    for name, reading in others:
        yield f"{words.ranged(reading['retention'])} {name}"
    yield (
        f"scale {words.number(first['matched_scale']['value'])}, CLIP "
        f"{words.percent(cell['clip_change_percent'])}"
    )


if __name__ == "__main__":
    entry(main, Config)
