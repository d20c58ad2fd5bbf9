"""How much of a control's effect survives on other members of the family: python -m analysis.transfer
[config=FILE] [key=value ...]

Without arguments: a shipped control of each kind, trained on tiny/base, on every member of `tiny`; two
minutes on a CPU. --dry-run says what it will cost and what it can see, and draws nothing. Any LoRA:
controls=[my.safetensors] family=sdxl positive="…" negative="…".

Prompts come in rounds: after each, cells whose verdict is decided are left, the others go on.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from analysis import adapting, model_cards, results, wandb_log
from analysis.images.cache import Drawings, Job, in_turn, make, one_by_one
from analysis.images.design import Design, Subject, Words, cycled, linked, looks_of
from analysis.images.readings import Measurement
from analysis.measures import agreement
from analysis.pages import figures, rows, tables, words
from analysis.pages import transfer as pages
from analysis.session import Drawing, Session
from configs import UserError, entry, list_of, note, releases
from controls import formats, intervals, retention
from controls.lora import Card, Control, fits, random_like
from controls.picture_grid import picture_grid, scale_heads
from models.evaluators import load_evaluators
from models.families import Family, FamilyCard
from models.loading import skeleton
from models.noise import Band
from models.plans import PLANS, plan_of

# of a retention, between prompts and between seeds: root mean squares over all shipped controls on the
# embedded family (LOG.md)
TYPICAL = {"prompts": 0.1, "seeds": 0.6}
NAMES = ["smile", "watercolour-kv", "space-1"]
SHIPPED = [f"controls/tiny/{name}.safetensors" for name in NAMES]
SCALES = {"lora": "lora_scales"}  # kind of control: the key that holds its scales; of others, scales
PILOT_PROMPTS = 12  # at the most
PILOT = 900_000  # added to image seeds of the pilot, on which nothing is measured
BASELINE = 10_000_000  # added to image seeds, once and more, for further images without a control
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
    "adapt",
    "adapt_prompts",
    "adapt_judged",
    "adapt_precision",
    "targets",
    "references",
    "evaluators",
    "scales",
    *SCALES.values(),
    "at",
    "max_prompts",
    "rounds",
    "curve_prompts",
    "precision",
    "minutes",
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
    at: float = 1.0  # the scale at which controls will be used: retention is the ratio of effects there
    max_prompts: int = 96  # prompts at the most; where there are fewer, they come again with other seeds
    rounds: int = 3  # each doubles the prompts, until max_prompts; 1 = all prompts at once, a fixed design
    curve_prompts: int = 6  # the first so many are drawn at every scale, for curves
    precision: float | None = None  # stop at a cell once its interval is within ± this; null = at its verdict
    minutes: float | None = None  # no new round that would end later than this; null = no limit
    seeds: int = 1  # images per prompt
    baselines: int = 4  # images per prompt without a control: what the others are adjusted by; shared by all
    seed: int = 1000  # of the first image
    scales: list[float] = list_of(-2.0, -1.0, 0.0, 0.5, 1.0, 2.0)  # of sliders and directions; must hold 0
    lora_scales: list[float] = list_of(0.0, 0.5, 1.0, 1.5)  # of LoRAs; likewise
    # controls act only at noise levels with sigma / alpha above this, which changes the layout; null = at all
    above: float | None = None
    below: float | None = None  # and below this, which preserves it
    # of the family's card: clip, siglip, probe, …; empty = all that read words
    evaluators: list[str] = list_of()
    positive: str = ""  # what a control makes; empty = what its card says
    negative: str = ""  # what it departs from; empty = what its card says
    # teach controls to the members on which they come out weaker, dead or reversed (train/adapt.py), and
    # measure them again beside
    adapt: bool = False
    # texts and files that they are taught on, with a LoRA's trigger word; empty = the family's more_prompts
    adapt_prompts: list[str] = list_of()
    adapt_judged: int = 192  # images that set the strength of each, see judged= of train/adapt.py
    adapt_precision: float | None = None  # and how exactly, see precision= there
    write_card: bool = False  # write the measured scales into the header of each control file
    cache: str = "runs/cache"  # drawings are kept here and shared between runs
    out: str = "runs/transfer"  # the run is written to out/name


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints a row per control and returns the path of the report."""
    session = Session("analysis.transfer", cfg, FREE)
    check(cfg)
    design = prepare(session)
    if cfg.dry_run:
        return plan(session, design)
    fit(session, design)
    session.claim()
    record = rounds(session, design)
    if cfg.adapt and adapting.adapt(session, record):
        record = rounds(session, prepare(session))
    return publish(session, record) if session.first else session.folder / "report.html"


def rounds(session: Session, design: Design) -> dict:
    """Draws and looks at what is undecided, round by round, and writes the page after each; returns the
    record, on the first process.
    """
    cfg, work, measurement = session.cfg, Work(session, design), Measurement(design)
    undecided, table = design.pairs, rows.Rows([target for _, target in design.pairs])
    fixed = len(design.looks.parts) == 1  # all at once, so that each network is loaded once
    work.do(design.all if fixed else design.start(), "transfer" if fixed else "start")
    for look in range(len(design.looks.parts)):
        todo = design.of_look(look, undecided)
        if look and not (undecided and session.accelerator.shared(work.ends_within(todo, cfg.minutes))):
            break
        work.do(todo, f"round {look + 1}")
        undecided = measurement.look(undecided, cfg.precision)
        going = {subject.name for subject, _ in undecided}
        finish(session, measurement, work, table, [s for s in design.subjects if s.name not in going])
    work.do(design.beside(), "references")
    measurement.beside = cfg.references
    record = finish(session, measurement, work, table, design.subjects)
    design.parts[0].remember_words()
    return record


def finish(
    session: Session, measurement: Measurement, work: "Work", table: rows.Rows, subjects: list[Subject]
) -> dict:
    """Draws curves of controls that are decided; says what was found of all that have them; the record."""
    work.do(measurement.design.curves(subjects), "curves")
    measurement.finish(subjects)
    if not (session.first and measurement.finished):
        return {}
    record = recorded(session, measurement, work)
    table.show(record["cells"])
    return record


class Task(NamedTuple):
    """A job to be done on some parts of the prompts."""

    parts: tuple[Drawings, ...]
    job: Job

    @property
    def target(self) -> str:
        return self.job.target

    @property
    def images(self) -> int:
        return sum(len(part.numbers) for part in self.parts)


def together(tasks: list[Task], most: int) -> list[Task]:
    """The same with parts of one job in one task, as long as all its images fit into a batch."""
    merged: list[Task] = []
    last: dict[Job, int] = {}  # where a job's last task stands
    for task in tasks:
        k = last.get(task.job)
        if k is not None and merged[k].images + task.images <= most:
            merged[k] = Task((*merged[k].parts, *task.parts), task.job)
        else:
            last[task.job] = len(merged)
            merged.append(task)
    return merged


class Work:
    """Makes drawings, each process its share, and counts them."""

    def __init__(self, session: Session, design: Design):
        self.session, self.texts = session, design.texts
        self.drawn = self.known = 0  # images
        self.asked: set[str] = set()  # keys of drawings
        self.evaluations, self.seconds = 0.0, 0.0

    def missing(self, todo: list[tuple[Drawings, list[Job]]]) -> list[Task]:
        tasks = [Task((part,), job) for part, jobs in todo for job in part.missing(jobs)]
        return list({task.parts[0].key(task.job): task for task in tasks}.values())

    def cost(self, task: Task) -> float:
        """Network evaluations."""
        return task.images * plan_of(self.session.bare, task.target).nfe

    def ends_within(self, todo: list[tuple[Drawings, list[Job]]], minutes: float | None) -> bool:
        """Whether these drawings will be there before the run is so old, at the pace until now."""
        if minutes is None or not self.evaluations:
            return True
        more = sum(map(self.cost, self.missing(todo)))
        return self.session.age + more * self.seconds / self.evaluations <= 60 * minutes

    def do(self, todo: list[tuple[Drawings, list[Job]]], label: str) -> None:
        """Makes what is missing of these."""
        start, family = time.time(), self.session.family
        tasks = in_turn(self.missing(todo), family.card)
        mine = together(self.session.share(tasks, self.cost), family.drawing.size)
        if mine:
            family.encode_all(self.texts)
        for task in one_by_one(mine, family, label, not (self.session.first and mine)):
            make(task.parts, task.job)
        self.session.accelerator.wait_for_everyone()
        new = {part.key(job): len(part.numbers) for part, jobs in todo for job in jobs}
        images = sum(task.images for task in tasks)
        self.known += sum(count for key, count in new.items() if key not in self.asked) - images
        self.asked |= new.keys()
        self.drawn += images
        self.evaluations += sum(map(self.cost, tasks))
        self.seconds += time.time() - start


def recorded(session: Session, measurement: Measurement, work: Work) -> dict:
    """The record and its page, as far as they are known."""
    design = measurement.design
    cells, leakage = measurement.cells(), measurement.leakage()
    pictures(measurement, cells, session.folder)
    cost = {"drawn": work.drawn, "cached": work.known, "seconds": round(work.seconds, 1)}
    record = session.record(
        evaluators=list(design.parts[0].evaluators),
        margin=list(intervals.MARGIN),
        agreement=agreement_of(cells),
        prompts=list(design.looks.prompts),
        cost=cost,
        cells=cells,
        leakage=leakage,
    )
    session.write(record)
    return record


def agreement_of(cells: list[dict]) -> list[dict]:
    """How far evaluators agree in the verdicts of the cells that ask about transfer, pair by pair."""
    judged = [cell for cell in cells if words.is_verdict(cell)]
    verdicts = {name: [c["readings"][name]["verdict"] for c in judged] for name in cells[0]["readings"]}
    return agreement.pairs(verdicts, [cell["control"] for cell in judged])


def publish(session: Session, record: dict) -> Path:
    """What goes with the record: tables, model cards, W&B."""
    cfg, cost = session.cfg, record["cost"]
    files = dict(zip(formats.names(cfg.controls), map(formats.located, cfg.controls), strict=True))
    model_cards.write(record, session.folder)
    tables.write(record, session.folder)
    figures.write(pages.charts_of(record), session.folder / "figures")
    print(rows.LEGEND)
    print(words.agreement(record["agreement"]))
    print(f"{cost['drawn']} images drawn, {cost['cached']} known")
    cells = list(map(words.led, record["cells"]))
    says = "\n".join([words.tally(cells), *words.adapted(cells)])
    page = session.publish(record, says, partial(wandb_log.track, controls=files), "+".join(files))
    for path in files.values() if cfg.write_card else ():
        model_cards.into_header(record, path)  # last, so that W&B's input is the file that training logged
    return page


def plan(session: Session, design: Design) -> Path:
    """Says the smallest difference of a retention from 1 that the design tells from none, and what it takes.

    The family is bare: it needs configs and no weights, and UserError says which one cannot be had.
    """
    looks, seeds, work = design.looks, session.cfg.seeds, Work(session, design)
    counts = " → ".join(map(str, looks.prompts))
    print(
        f"{len(design.subjects)} controls on {len(design.targets)} targets, {counts} prompts x {seeds} seeds"
    )
    spread, whence = known_spread(session.folder)
    error = (1 - intervals.LEVEL) * looks.shares[-1] / max(1, len(design.pairs))
    for prompts in (looks.prompts[-1], 2 * looks.prompts[-1]):
        least = retention.detectable(prompts, seeds, spread, error)
        print(
            f"{prompts} prompts x {seeds} seeds: sees a retention that differs from 1 by {least:.2f} in 80 % "
            f"of cases, corrected for {len(design.pairs)} cells and {len(looks.prompts)} looks ({whence})"
        )
    tasks, controls = work.missing(design.all), design.parts[0].controls.values()
    images, asked = sum(task.images for task in tasks), sum(map(work.cost, tasks))
    print(f"to draw: at most {images} images, {asked:.0f} network evaluations; known already: the rest")
    if tasks:
        tasks = in_turn(together(tasks, session.family.drawing.size), session.family.card)
        counts = [task.images for task in tasks]
        session.forecast(tasks, counts, max(counts), [c.tensors for c in controls], apart=True)
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


def prepare(session: Session) -> Design:
    """What is measured by what, and on which images.

    Raises UserError for what cannot be, before anything is drawn.
    """
    cfg, family = session.cfg, session.family
    controls = read(cfg, family)
    subjects = linked(
        [Subject(control, descriptions(cfg, control), scales_of(cfg, control)) for control in controls]
    )
    evaluators = {}
    if not cfg.dry_run:
        evaluators = load_evaluators(family.card, family.device, cfg.evaluators, load_now=False)
    drawn = {(subject.name, False): subject.control for subject in subjects}
    if cfg.references:
        drawn |= {(subject.name, True): random_like(subject.control, cfg.seed) for subject in subjects}
    looks, ends = looks_of(cfg.rounds, cfg.max_prompts, cfg.curve_prompts)
    texts, numbers = cycled(session.prompts(cfg.max_prompts), cfg.max_prompts, cfg.seeds, cfg.seed)

    band = Band.of(cfg.above, cfg.below)

    def part(first: int, end: int, aside: int = 0) -> Drawings:
        seeds = [number + aside for number in numbers[first * cfg.seeds : end * cfg.seeds]]
        return Drawings(family, drawn, evaluators, texts[first:end], seeds, band, Path(cfg.cache))

    def further(drawings: Drawings) -> Drawings:
        seeds = [number + BASELINE * k for number in drawings.numbers for k in range(1, more + 1)]
        return Drawings(family, drawn, evaluators, drawings.texts, seeds, band, Path(cfg.cache))

    more = max(0, -(-cfg.baselines // cfg.seeds) - 1)
    parts = [part(first, end) for first, end in pairwise([0, *ends])]
    for subject in subjects:
        for evaluator in evaluators.values() if subject.words else ():
            evaluator.direction(*subject.words)  # words that an evaluator cannot tell apart are an error
    targets = resolve(cfg, family.card)
    pilot = part(0, min(PILOT_PROMPTS, looks.prompts[0]), PILOT)
    plain = list(map(further, parts))
    return Design(subjects, targets, parts, plain, pilot, looks, cfg.at, cfg.references)


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
    for key in ("scales", *SCALES.values()):
        values = sorted(set(getattr(cfg, key)))
        if 0 not in values or max(values) < 1:
            raise UserError(f"{key} must hold 0 and reach 1; got {getattr(cfg, key)}")
        setattr(cfg, key, values)
    if cfg.at <= 0:
        raise UserError(f"at is the scale at which controls will be used, above 0; got {cfg.at:g}")
    if cfg.precision is not None and cfg.precision <= 0:
        raise UserError(
            f"precision is half the width of an interval, above 0, e.g. 0.1; got {cfg.precision:g}"
        )
    Band.of(cfg.above, cfg.below)
    if cfg.adapt and cfg.prompts and not cfg.adapt_prompts:
        note("taught on the family's more_prompts; a LoRA with a trigger word needs adapt_prompts=[…]")


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
    """The scales of a control's curve, the headline's among them; of one that is dialled below 0 also its
    opposite.
    """
    scales = getattr(cfg, SCALES.get(control.card.kind, "scales"))
    return sorted({*scales, cfg.at, *([-cfg.at] if scales[0] < 0 else [])})


def resolve(cfg: Config, family: FamilyCard) -> list[str]:
    """The targets, members and member:plan; sources are among them where all are meant. Raises UserError."""
    students = [name for name in family.usual if name != family.base]
    found = []
    for target in cfg.targets or family.usual:
        bare = target not in family.members and target.partition("(")[0] in PLANS
        found += [f"{student}:{target}" for student in students] if bare else [target]
    if cfg.references and students:
        cards = [family.members[name] for name in students]
        steps = {len(card.timesteps) or card.steps for card in cards}
        found.append(f"{family.base}:few({min(steps)})")
    unknown = [target for target in found if target.partition(":")[0] not in family.members]
    if unknown:
        raise UserError(
            f"no member {unknown[0]!r} in family {family.name}: there are {', '.join(family.members)}"
        )
    return list(dict.fromkeys(found))


def fit(session: Session, design: Design) -> None:
    """A control or a plan that does not fit is said now, by configs alone, not after an hour of drawing;
    nothing where all is drawn.
    """
    tasks = Work(session, design).missing(design.all)
    if not tasks:
        return
    for evaluator in design.parts[0].evaluators.values():
        evaluator.features(torch.zeros(1, 3, 64, 64))
    for subject in design.subjects:
        net = session.bare.member(subject.source).denoiser.net
        fits(net, subject.control, session.family.card.name)
    for target in dict.fromkeys(task.target for task in tasks):
        plan_of(session.bare, target)


def pictures(measurement: Measurement, cells: list[dict], folder: Path) -> None:
    """The sheets that cells name, and one overview per control, of the first part's images; what was adapted
    from it stands below.
    """
    cells, drawings = iter(cells), measurement.drawings
    overviews: dict[str, list] = {}
    for subject in measurement.finished:
        sheets = {
            target: torch.stack([drawings.pictures(job) for job in subject.jobs(target)])
            for target in measurement.of(subject)
        }
        for sheet in sheets.values():
            wandb_log.picture(sheet, folder / next(cells)["picture"])
        heads = scale_heads(subject.scales)
        if subject.origin:
            sheets.pop(subject.source, None)
        rows = [
            (f"{target}, adapted" if subject.origin else target, heads, list(sheet[:, 0]))
            for target, sheet in sheets.items()
        ]
        overviews.setdefault((subject.origin or subject).name, []).extend(rows)
    for name, rows in overviews.items():
        picture_grid(rows, folder / f"images/{name}/members.png", 2 * rows[0][2][0].shape[-1])


if __name__ == "__main__":
    entry(main, Config)
