"""How much of a control's effect survives on other members of the family: python -m analysis.transfer
[config=FILE] [key=value ...]

Without arguments: shipped controls of every kind, trained on tiny/base, on every member of `tiny`; some
minutes on a CPU. --dry-run says what it will cost and what it can see, and draws nothing. Any LoRA:
controls=[my.safetensors] family=sdxl positive="…" negative="…".
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from analysis import model_cards, results, wandb_log
from analysis.images.cache import Drawings, Job, in_turn, one_by_one, plan_of
from analysis.images.readings import Measurement, Subject, Words, floor_of, is_reference
from analysis.measures import agreement
from analysis.pages import words
from analysis.session import Drawing, Session
from configs import UserError, entry, list_of, releases
from configs.screen import show_table
from controls import formats, intervals, retention
from controls.lora import Card, Control, fits, random_like
from controls.picture_grid import picture_grid, scale_heads
from models import budget
from models.evaluators import load_evaluators
from models.families import Family, FamilyCard
from models.loading import skeleton
from models.plans import PLANS

# of a retention, between prompts and between seeds: root mean squares over all shipped controls on the
# embedded family (LOG.md)
TYPICAL = {"prompts": 0.07, "seeds": 0.33}
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
class Config(Drawing):
    name: str = "default"  # of the run folder
    controls: list[str] = list_of(*SHIPPED)  # control files of any layout, or hub:owner/name/file
    # what becomes of text encoders' layers in a file: refuse it, or ignore them and say how many
    encoders: str = "refuse"
    # the member that controls without a card of ours were trained on; empty = the family's base
    source: str = ""
    # members, or plans: dmd:hybrid(1), hybrid(1) for every student; empty = all members
    targets: list[str] = list_of()
    # measure floor, ceiling, wrong control, a second drawing and the base in few steps beside
    references: bool = True
    seeds: int = 4  # images per prompt
    seed: int = 1000  # of the first image
    scales: list[float] = list_of(-2.0, -1.0, 0.0, 0.5, 1.0, 2.0)  # of sliders; must hold 0 and reach 1
    lora_scales: list[float] = list_of(0.0, 0.5, 1.0, 1.5)  # of LoRAs; likewise
    direction_scales: list[float] = list_of(-1.0, 0.0, 1.0)  # of SliderSpace's directions; likewise
    # controls act only at noise levels with sigma / alpha below this, which preserves structure; null = at
    # all
    below: float | None = None
    # of the family's card: clip, siglip, probe, …; empty = all that read words
    evaluators: list[str] = list_of()
    positive: str = ""  # what a control makes; empty = what its card says
    negative: str = ""  # what it departs from; empty = what its card says
    write_card: bool = False  # write the measured scales into the header of each control file
    cache: str = "runs/cache"  # drawings are kept here and shared between runs
    out: str = "runs/transfer"  # the run is written to out/name


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    session = Session("analysis.transfer", cfg, FREE)
    check(cfg)
    drawings, subjects, targets = prepare(session)
    jobs = jobs_of(cfg, subjects, targets)
    if cfg.dry_run:
        return plan(session, drawings, subjects, targets, jobs)
    fit(cfg, drawings, subjects, jobs)
    session.claim()
    cost = draw(session, drawings, jobs)
    if not session.first:
        return session.folder / "report.html"
    measurement = Measurement(drawings, subjects, cfg.references)
    cells, leakage = measurement.cells(targets), measurement.leakage(targets)
    drawings.remember_words()
    pictures(drawings, subjects, targets, cells, session.folder)
    about = {"evaluators": list(drawings.evaluators), "margin": list(intervals.MARGIN), "cost": cost}
    about["agreement"] = agreement_of(cells)
    return publish(session, session.record(**about, cells=cells, leakage=leakage))


def publish(session: Session, results: dict) -> Path:
    """The record, its page, its table, its model cards."""
    cfg, cells, cost = session.cfg, results["cells"], results["cost"]
    files = dict(zip(formats.names(cfg.controls), map(formats.located, cfg.controls), strict=True))
    model_cards.write(results, session.folder)
    show(cells)
    print(words.agreement(results["agreement"]))
    print(f"{cost['drawn']} images drawn, {cost['cached']} known")
    says = words.tally(list(map(words.led, cells)))
    page = session.publish(results, says, partial(wandb_log.track, controls=files), "+".join(files))
    for path in files.values() if cfg.write_card else ():
        model_cards.into_header(results, path)  # last, so that W&B's input is the file that training logged
    return page


def agreement_of(cells: list[dict]) -> list[dict]:
    """How far evaluators agree in the verdicts of the cells that ask about transfer, pair by pair."""
    judged = [cell for cell in cells if words.is_verdict(cell)]
    verdicts = {name: [c["readings"][name]["verdict"] for c in judged] for name in cells[0]["readings"]}
    return agreement.pairs(verdicts, [cell["control"] for cell in judged])


def plan(
    session: Session, drawings: Drawings, subjects: list[Subject], targets: list[str], jobs: list[Job]
) -> Path:
    """Says the smallest difference of a retention from 1 that the design tells from none, and what it takes.

    The family is bare: it needs configs and no weights, and UserError says which one cannot be had.
    """
    todo, each, prompts, seeds = (
        drawings.missing(jobs),
        len(drawings.numbers),
        len(drawings.texts),
        drawings.seeds,
    )
    spread, whence = known_spread(session.folder)
    print(f"{len(subjects)} controls on {len(targets)} targets, {prompts} prompts x {seeds} seeds")
    for n, k in ((prompts, seeds), (2 * prompts, seeds), (prompts, 2 * seeds)):
        least = retention.detectable(n, k, spread)
        print(
            f"{n} prompts x {k} seeds: sees a retention that differs from 1 by {least:.2f}, in 80 % of "
            f"cases ({whence})"
        )
    calls = budget.nfe_by_member((drawings.plan(job.target), each) for job in todo)
    print(f"to draw: {len(todo) * each} images, {calls.total()} network evaluations; known already: the rest")
    if todo:
        controls = [control.tensors for control in drawings.controls.values()]
        session.forecast(todo, each, each, controls, apart=True)
    else:
        print("nothing to draw")
    return session.folder


def known_spread(folder: Path) -> tuple[dict, str]:
    """How far retentions vary: as in the run that stands in the folder, else as is typical."""
    try:
        cells = map(words.led, results.read(folder, "analysis.transfer")["cells"])
        spreads = [cell["spread"] for cell in cells if cell["spread"] and not cell["reference"]]
    except UserError:
        spreads = []
    if not spreads:
        return TYPICAL, "spread as on the embedded family"
    squares = {key: sum(spread[key] ** 2 for spread in spreads) / len(spreads) for key in TYPICAL}
    return {key: square**0.5 for key, square in squares.items()}, f"spread as in {folder}"


def prepare(session: Session) -> tuple[Drawings, list[Subject], list[str]]:
    """What is measured by what, and on which targets.

    Raises UserError for what cannot be, before anything is drawn.
    """
    cfg, family = session.cfg, session.family
    controls = read(cfg, family)
    subjects = [Subject(control, descriptions(cfg, control), scales_of(cfg, control)) for control in controls]
    prompts, targets = session.prompts(), resolve(cfg, family.card)
    evaluators = {}
    if not cfg.dry_run:
        evaluators = load_evaluators(family.card, family.device, cfg.evaluators, load_now=False)
    drawn = {(subject.name, False): subject.control for subject in subjects}
    if cfg.references:
        drawn |= {(subject.name, True): random_like(subject.control, cfg.seed) for subject in subjects}
    drawings = Drawings(family, drawn, evaluators, prompts, cfg.seeds, cfg.seed, cfg.below, Path(cfg.cache))
    for subject in subjects:
        for evaluator in evaluators.values() if subject.words else ():
            evaluator.direction(*subject.words)  # words that an evaluator cannot tell apart are an error
    return drawings, subjects, targets


def draw(session: Session, drawings: Drawings, jobs: list[Job]) -> dict:
    """Makes what is missing, this process its share; returns images drawn by all, known, and seconds."""
    start, todo, family = time.time(), drawings.missing(jobs), drawings.family
    mine = session.share(in_turn(todo, family.card))
    if mine:
        family.encode_all(drawings.texts)
    for job in one_by_one(mine, family, "transfer", not session.first):
        drawings.make(job)
    session.accelerator.wait_for_everyone()
    each, different = len(drawings.numbers), len({drawings.key(job) for job in jobs})
    cost = {"drawn": len(todo) * each, "cached": (different - len(todo)) * each}
    return {**cost, "seconds": round(time.time() - start, 1)}


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
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
    """The targets, members and member:plan; sources are among them where all are meant. Raises UserError."""
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
        heads = scale_heads(subject.scales)
        rows = [(target, heads, list(sheet[:, 0])) for target, sheet in sheets.items()]
        picture_grid(rows, folder / f"images/{subject.name}/members.png", 2 * sheet.shape[-1])


def show(cells: list[dict]) -> None:
    """Prints the table in the shape of the paper's T1: controls in rows, members in columns."""
    targets = list(dict.fromkeys(cell["target"] for cell in cells))
    first, *others = cells[0]["readings"]
    title = (
        f"Retention [95 %] by {first}, verdict; then by {' and '.join(others)}; then matched scale, % "
        f"change of the CLIP score"
    )
    rows = []
    for name in dict.fromkeys(cell["control"] for cell in cells):
        mine = {cell["target"]: cell for cell in cells if cell["control"] == name}
        source = next(iter(mine.values()))["source"].partition("/")[2]
        columns = {f"-> {target.partition('/')[2]}": "\n".join(lines(mine[target])) for target in targets}
        rows.append({"control": f"{name}\nfrom {source}", **columns})
    show_table(title, rows, lines=True)


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
