"""Where variety is lost and how to get it back: python -m analysis.diversity [config=FILE] [key=value ...]

Without arguments: the base and the students of `tiny`, alone and as hybrids, 24 prompts x 8 seeds; two
minutes on a CPU. --dry-run says the smallest change that it can see. configs/diversity/full.yaml is the whole
table.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.images import sheets, store
from analysis.images.cache import ways
from analysis.images.quality import Judge, against
from analysis.measures import variety
from analysis.measures.image_sets import Spread
from analysis.pages.diversity import findings, fronts, pick, said
from analysis.pages.words import number, shown
from analysis.session import Drawing, Session, Way
from configs import UserError, entry, list_of, releases, tracking
from configs.screen import show_table
from controls import formats, intervals, retention
from controls.acting import acting
from controls.lora import Control, fits
from controls.picture_grid import picture_grid
from models.evaluators import UNIT, Evaluator
from models.families import Family
from models.noise import ALL
from models.plans import plan_of
from models.promptsets import PromptSet
from models.sampler import Plan, draw_noise, finish, sample

FEW = ["base", "student", "hybrid(1)", "hybrid(2)"]
# of a change, in shares of the base's variety, between prompts and between seeds: root mean squares over the
# plans of the default on the embedded family (LOG.md)
TYPICAL = {"prompts": 0.05, "seeds": 0.4}
TOGETHER = 48  # images that one file is of, so that a prompt's few seeds are not drawn alone
SHOWN = 8  # images of a prompt that the picture shows
BLOCKS = 8  # groups of captions that the jackknife of the quality numbers leaves out
BLOCK_SIZE = 64  # captions drawn and held at once, at most
FREE = (
    "plans",
    "students",
    "labels",
    "neighbours",
    "batch_size",
    "memory",
    "dry_run",
    "wandb",
    "out",
)  # what a continued run may change


@dataclass
class Config(Drawing):
    name: str = "default"  # of the run folder
    students: list[str] = list_of()  # members to compare with the base; empty = all of the family
    # as models/plans.py writes them; base and student are always there, so is teacher where a card says its
    # guidance
    plans: list[str] = list_of(*FEW)
    max_prompts: int = 24  # where no prompts are given: the card's and further ones of its, so many
    seeds: int = 8  # images per prompt, at least 3
    seed: int = 2000  # the first image seed
    # images of the quality numbers (Fréchet, Inception-style, precision …), one per caption; 0 = none
    captions: int = 0
    evaluators: list[str] = list_of()  # of the family's card, clip among them; empty = all that read words
    # what those are told, as prompts; empty = the reference's own, else prompts
    captions_from: list[str] = list_of()
    # folder of pictures, captions in .txt files beside them; empty = the world's own where the family has one
    reference: str = ""
    # classes of the Inception-style score, told apart by CLIP; empty = the card's prompts
    labels: list[str] = list_of()
    neighbours: int = 5  # k of precision, recall, density and coverage
    control: str = ""  # a control file that the plan adapted(scale[,above][,below]) puts on the student
    out: str = "runs/diversity"  # the run is written to out/name


@dataclass(frozen=True)
class Part(Way):
    """A part of what one plan draws: prompts-0, … a few prompts each; block-0, … of the captions."""

    part: str

    @property
    def file(self) -> str:
        return f"{self.place}/{self.part}.safetensors"


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    session = Session("analysis.diversity", cfg, FREE)
    check(cfg)
    seeds = session.prompts(cfg.max_prompts).numbers(cfg.seeds, cfg.seed)
    cfg.labels = cfg.labels or session.family.card.prompts
    plans = ways_of(cfg, session.bare)
    control = loaded(session, plans) if cfg.control else None
    if cfg.dry_run:
        return plan(session, plans, control)
    texts = cfg.captions_from, cfg.prompts, cfg.captions
    captions, real = against(session.family.card, cfg.reference, *texts, cfg.neighbours)
    judge = Judge(session.evaluators, cfg.labels, real, cfg.neighbours) if captions.texts else None
    session.claim()
    parts = [Part(*way, name) for way in plans for name in names_of(cfg, captions.texts)]
    texts = [] if captions.texts else cfg.prompts  # captions are too many to be kept
    session.draw(parts, texts, partial(drawn, session, control, captions, seeds), "diversity")
    if not session.first:
        return session.folder / "report.html"
    return publish(session, cells_of(session, plans, judge, blocks_of(captions.texts)), seeds)


def loaded(session: Session, plans: list[tuple[str, str]]) -> Control:
    """The run's control. Raises UserError for one that misfits a student."""
    control = formats.load(session.cfg.control)
    for student in dict.fromkeys(student for student, _ in plans):
        fits(session.bare.member(student).denoiser.net, control, session.family.card.name)
    return control


def ways_of(cfg: Config, family: Family) -> list[tuple[str, str]]:
    """Every (student, plan) that is drawn, among them the base at the guidance that was distilled into a
    student, where that is known and another than its own.
    """
    members, base = family.card.members, family.card.base
    drawn = []
    for student, plan in ways(cfg.plans, cfg.students, family):
        distilled = members[student].teacher_guidance
        if plan == "student" and distilled and members[base].guidance not in (None, distilled):
            drawn.append((student, "teacher"))
        drawn.append((student, plan))
    return sorted(dict.fromkeys(drawn), key=lambda way: list(members).index(way[0]))


def plan(session: Session, plans: list[tuple[str, str]], control: Control | None) -> Path:
    """Says what will be drawn, what that takes, and which change can be seen."""
    cfg, prompts = session.cfg, len(session.cfg.prompts)
    images, claims = prompts * cfg.seeds + cfg.captions, max(1, 2 * len(plans) - 2)
    print(f"{len(plans)} ways to draw, {images} images each")
    for count in (prompts, 2 * prompts):
        least = retention.detectable(count, cfg.seeds, TYPICAL, (1 - intervals.LEVEL) / claims)
        print(
            f"{count} prompts x {cfg.seeds} seeds: sees a change of {100 * least:.0f} % of the base's "
            f"variety in 80 % of cases, corrected for {claims} claims (spread as on the embedded family)"
        )
    most = max(group_size(cfg.seeds) * cfg.seeds, cfg.captions)
    ways, controls = [Way(*way) for way in plans], [control.tensors] if control else []
    session.forecast(ways, [images] * len(ways), most, controls, reading=bool(cfg.captions))
    return session.folder


def publish(session: Session, cells: list[dict], seeds: list[int]) -> Path:
    """The record, its page, its table."""
    base, folder = session.family.card.base, session.folder
    pictures(seeds[: min(SHOWN, session.cfg.seeds)], cells, base, folder)
    results = session.record(
        evaluators=list(session.evaluators),
        base=base,
        margin=variety.MARGIN,
        fronts=fronts(cells, base),
        cells=cells,
    )
    show(cells)
    students = [name for name in dict.fromkeys(cell["student"] for cell in cells) if name != base]
    first = list(session.evaluators)[:1]
    says = [line for student in students for line in findings(cells, student, base, first)]
    return session.publish(results, "\n".join(says or [f"{base} alone"]), track, session.family.card.name)


def drawn(
    session: Session, control: Control | None, captions: PromptSet, seeds: list[int], part: Part
) -> dict[str, Tensor]:
    """What one part holds."""
    kind, _, index = part.part.partition("-")
    make = partial(spread, numbers=seeds) if kind == "prompts" else partial(captioned, captions=captions)
    with adapted(session.family, plan_of(session.family, part.target), control) as plan:
        return make(session.cfg, session.family, plan, session.evaluators, int(index))


def adapted(family: Family, plan: Plan, control: Control | None) -> AbstractContextManager[Plan]:
    """The plan with the control that it asks for."""
    if plan.adapter is None:
        return nullcontext(plan)
    scale, band = plan.adapter.scale, plan.adapter.band
    return acting(plan, control, scale, family.card.name, None if band == ALL else band.__contains__)


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
    if cfg.seeds < 3:
        raise UserError(f"seeds must be at least 3, for a distance and its interval; got {cfg.seeds}")
    if cfg.evaluators and "clip" not in cfg.evaluators:
        raise UserError(
            f"evaluators must hold clip, which judges prompt agreement; got {', '.join(cfg.evaluators)}"
        )
    if cfg.captions and cfg.captions < BLOCKS * max(2, cfg.neighbours):
        raise UserError(
            f"captions must be 0 or at least {BLOCKS * max(2, cfg.neighbours)}; got {cfg.captions}"
        )
    cfg.plans = list(dict.fromkeys(["base", "student", *(text.replace(" ", "") for text in cfg.plans)]))
    if bool(cfg.control) != any(text.startswith("adapted(") for text in cfg.plans):
        raise UserError("a plan adapted(scale) goes with control=FILE, and a control with such a plan")


def group_size(seeds: int) -> int:
    """How many prompts' images are drawn together."""
    return max(1, TOGETHER // seeds)


@torch.no_grad()
def spread(
    cfg: Config, family: Family, plan: Plan, evaluators: dict[str, Evaluator], g: int, numbers: list[int]
) -> dict[str, Tensor]:
    """How far apart the seeds of each prompt of a group are at each step: (prompts, T, 3) per evaluator;
    vendi and agreement (prompts, T), t (T,); of the first group a few pictures.
    """
    size = group_size(cfg.seeds)
    prompts = cfg.prompts[g * size :][:size]
    texts = [prompt for prompt in prompts for _ in range(cfg.seeds)]
    seeds, words = numbers[g * size * cfg.seeds :][: len(texts)], evaluators["clip"].texts(prompts)

    def seen(rows: Tensor) -> tuple[Tensor, list[dict[str, np.ndarray]], Tensor]:
        """Features of x0 at each step, of the finished image at the last, and the small finished pictures."""
        noise = draw_noise([seeds[row] for row in rows], family.latent_shape, plan.steps, family.device)
        features = []
        for step in sample(plan, noise, family.encode([texts[row] for row in rows])):
            images = family.decode(step.after if step.index + 1 == plan.steps else step.x0)
            features.append({name: evaluator.features(images) for name, evaluator in evaluators.items()})
        return rows, features, sheets.thumbs(images)

    spreads = [
        {
            name: [Spread("cosine" if name in UNIT else "squared") for _ in range(plan.steps)]
            for name in evaluators
        }
        for _ in prompts
    ]
    agrees, pictures = np.zeros((len(prompts), plan.steps)), []
    for rows, batch, thumbs in family.drawing.of(seen, len(texts)):
        pictures.append(thumbs)
        of = rows.numpy() // cfg.seeds
        for p in np.unique(of):
            for t, features in enumerate(batch):
                agrees[p, t] += (features["clip"][of == p] @ words[p]).sum() / cfg.seeds
                for name, values in features.items():
                    spreads[p][name][t].add(values[of == p])
    tensors = {
        name: torch.tensor([[list(s.distance().values()) for s in each[name]] for each in spreads]).double()
        for name in evaluators
    }
    tensors["vendi"] = torch.tensor([[s.vendi() for s in each["clip"]] for each in spreads]).double()
    tensors["agreement"] = torch.from_numpy(100 * agrees)
    tensors["t"] = torch.tensor([level.t for stage in plan.stages for level in stage.levels]).double()
    if g == 0:
        tensors["pictures"] = torch.cat(pictures)[: min(SHOWN, cfg.seeds)]
    return tensors


@torch.no_grad()
def captioned(
    cfg: Config, family: Family, plan: Plan, evaluators: dict[str, Evaluator], b: int, captions: PromptSet
) -> dict[str, Tensor]:
    """One block of the captions, an image each: features, and what it cost, from the words to the pixels, the
    base's steps included.
    """
    rows = slice(b, None, blocks_of(captions.texts))
    texts, seeds = captions.texts[rows], captions.numbers(1, cfg.seed + 500_000)[rows]

    def drawn(rows: Tensor) -> tuple[dict[str, Tensor], float]:
        """Features of a batch, and its seconds."""
        start = time.perf_counter()
        noise = draw_noise([seeds[row] for row in rows], family.latent_shape, plan.steps, family.device)
        images = family.decode(finish(plan, noise, family.encode([texts[row] for row in rows])))
        seconds = time.perf_counter() - start
        features = {
            name: torch.from_numpy(evaluator.features(images)).float()
            for name, evaluator in evaluators.items()
        }
        return features, seconds

    features, seconds = zip(*family.drawing.of(drawn, len(texts)), strict=True)
    return {
        **{name: torch.cat([part[name] for part in features]) for name in evaluators},
        "words": torch.from_numpy(evaluators["clip"].texts(texts)).float(),
        "cost": torch.tensor(sum(seconds) / len(texts), dtype=torch.float64),
    }


def names_of(cfg: Config, captions: list[str]) -> list[str]:
    """What the parts of a plan are called."""
    groups = -(-len(cfg.prompts) // group_size(cfg.seeds))
    return [f"prompts-{g}" for g in range(groups)] + [f"block-{b}" for b in range(blocks_of(captions))]


def blocks_of(texts: list[str]) -> int:
    """How many blocks the captions are drawn in: of at most BLOCK_SIZE, so that no block grows with their
    number.
    """
    return max(BLOCKS, -(-len(texts) // BLOCK_SIZE)) if texts else 0


def cells_of(session: Session, plans: list, judge: Judge | None, blocks: int) -> list[dict]:
    """A cell per (student, plan)."""
    cfg, folder, names = session.cfg, session.folder, list(session.evaluators)
    read = {key: gather(cfg, *key, names, folder) for key in plans}
    cells, base = [], read[session.family.card.base, "base"]
    for (student, plan), values in tqdm(read.items(), "numbers", unit="cell"):
        alone, teacher = (read.get((student, name)) for name in ("student", "teacher"))
        numbers = summary(cfg, values, base, alone, names)
        quality = scored(judge, student, plan, blocks, folder) if judge else {}
        way = plan_of(session.bare, Way(student, plan).target)
        own = way.nfe_by_member[f"{session.family.card.name}/{student}"]
        cell = {"student": student, "plan": plan, "nfe": way.nfe, "nfe_student": own, **numbers, **quality}
        if plan == "student":
            cell["teacher_guidance"] = session.family.card.members[student].teacher_guidance
            cell["shares"] = shares(base, teacher, alone, names) if teacher else None
        cells.append(cell)
    for name in names:
        claims = list(claimed(cells, read, base, name))
        judged = variety.judged([of for *_, of in claims])
        for (cell, beside, _), verdict in zip(claims, judged, strict=True):
            cell.setdefault("claims", {}).setdefault(beside, {})[name] = verdict
    return cells


def shares(base: dict, teacher: dict, student: dict, names: list[str]) -> dict[str, dict]:
    """What a student's loss is made of, by evaluator."""
    return {name: variety.shares(*(final(of, name) for of in (base, teacher, student))) for name in names}


def claimed(cells: list[dict], read: dict, base: dict, name: str) -> Iterator[tuple[dict, str, tuple]]:
    """What is claimed of each plan beside the base, and of each of a student's plans beside the student."""
    for cell in cells:
        own = final(read[cell["student"], cell["plan"]], name)
        if cell["plan"] != "base":
            yield cell, "base", (own, final(base, name), final(base, name))
        student = read.get((cell["student"], "student"))
        if student and cell["plan"] != "student":
            yield cell, "student", (own, final(student, name), final(base, name))


def final(values: dict, name: str) -> np.ndarray:
    """The diversity of the finished images, (P,)."""
    return values[name][:, -1, 0]


def kept(folder: Path, part: Part) -> dict[str, Tensor]:
    """What a part holds."""
    return store.load(folder / part.file, part.file)


def gather(cfg: Config, student: str, plan: str, evaluators: list[str], folder: Path) -> dict:
    """All prompts of a plan: per evaluator (P, T, 3), vendi and agreement (P, T), t (T,)."""
    files = [kept(folder, Part(student, plan, name)) for name in names_of(cfg, [])]
    keys = (*evaluators, "vendi", "agreement")
    return {
        **{key: np.concatenate([file[key].numpy() for file in files]) for key in keys},
        "t": files[0]["t"].numpy(),
    }


def summary(cfg: Config, own: dict, base: dict, student: dict | None, evaluators: list[str]) -> dict:
    """The numbers of one plan, beside those of the base and of its student alone."""

    steps, prompts = len(own["t"]), len(cfg.prompts)
    per_step = {name: [intervals.mean(own[name][:, t, 0]) for t in range(steps)] for name in evaluators}
    return {
        "steps": [{"t": float(t), "share": (i + 1) / steps} for i, t in enumerate(own["t"])],
        "diversity": per_step,
        "vendi": [intervals.mean(own["vendi"][:, t]) for t in range(steps)],
        "agreement": intervals.mean(own["agreement"][:, -1]),
        "per_prompt": [of_prompt(own, p, prompt, evaluators) for p, prompt in enumerate(cfg.prompts)],
        **compared(own, base, student, evaluators),
        "images": prompts * cfg.seeds,
        "prompts": prompts,
        "seeds": cfg.seeds,
    }


def of_prompt(own: dict, p: int, prompt: str, evaluators: list[str]) -> dict:
    """One prompt's numbers at the last step, their intervals over seeds."""
    said = {"prompt": prompt, "vendi": float(own["vendi"][p, -1])}
    for name in evaluators:
        said[name] = dict(zip(("value", "low", "high"), own[name][p, -1].tolist(), strict=True))
    return said


def compared(own: dict, base: dict, student: dict | None, evaluators: list[str]) -> dict:
    """A plan's diversity against the base's, from the first step and the last, and against its student's."""
    against_base = {"of_base": -1, "of_base_first": 0}
    numbers = {key: {} for key in (*against_base, "gain", "recovery")}
    for name in evaluators:
        for key, t in against_base.items():
            numbers[key][name] = intervals.ratio(own[name][:, t, 0], base[name][:, t, 0], positive=True)
        last = [final(plan, name) for plan in (own, base, student) if plan]
        numbers["gain"][name] = intervals.mean(last[0] - last[2]) if student else None
        # 0 at the student, 1 at the base
        numbers["recovery"][name] = variety.part(last[0], last[2], *last[1:]) if student else None
    agrees = [plan["agreement"][:, -1] for plan in (own, base, student) if plan]
    return {
        **numbers,
        "agreement_gain": intervals.mean(agrees[0] - agrees[2]) if student else None,
        "agreement_of_base": intervals.ratio(agrees[0], agrees[1]),
    }


def scored(judge: Judge, student: str, plan: str, blocks: int, folder: Path) -> dict:
    """Quality with intervals, and the cost of an image; one block is held at a time."""
    tallies, costs, images = [judge.tally() for _ in range(BLOCKS)], [], 0
    for b in range(blocks):
        block = {
            key: value.double().numpy()
            for key, value in kept(folder, Part(student, plan, f"block-{b}")).items()
        }
        judge.add(tallies[b % BLOCKS], block)
        costs.append(block["cost"])
        images += len(block["words"])
    return {"quality": judge.jackknife(tallies), "seconds": float(np.median(costs)), "captions": images}


def pictures(seeds: list[int], cells: list[dict], base: str, folder: Path) -> None:
    """One sheet per member: the base and its plans in rows, the seeds of the first prompt in columns."""
    for student in dict.fromkeys(c["student"] for c in cells):
        own = [(student, c["plan"]) for c in cells if c["student"] == student]
        ways = {(base, "base"): base} | {way: way[1] for way in own if way[1] != "base"}
        if alone := pick(cells, student, "student"):
            guidance = alone["teacher_guidance"] or 0
            ways |= {(student, "student"): student}
            ways |= {way: f"{base} at guidance {guidance:g}" for way in own if way[1] == "teacher"}
        drawn = {way: list(kept(folder, Part(*way, "prompts-0"))["pictures"]) for way in ways}
        rows = [(ways[way], list(map(str, seeds)), row) for way, row in drawn.items()]
        picture_grid(rows, folder / f"images/{student}.png", rows[0][2][0].shape[-1])


def show(cells: list[dict]) -> None:
    """Prints a row per plan."""
    title = (
        "Diversity as a share of the base's (mean distance of two seeds) [95 %], and of the loss recovered"
    )
    show_table(title, list(map(row, cells)))


def row(cell: dict) -> dict[str, str]:
    """One plan's numbers by the head they stand under."""
    texts = {"student": cell["student"], "plan": cell["plan"]}
    for name, share in cell["of_base"].items():
        texts[f"by {name}"] = f"{shown(share, 2)} {said(cell, name)}" if said(cell, name) else "1"
    recovered = next(iter(cell["recovery"].values()))
    texts["recovered"] = shown(recovered, 2) if cell["plan"] not in ("base", "student") else ""
    texts["agreement"] = number(cell["agreement"]["value"], 1)
    if frechet := cell.get("quality", {}).get("frechet_clip"):
        texts |= {"Fréchet": number(frechet["value"], 3), "ms": number(1000 * cell["seconds"], 0)}
    return {**texts, "nfe": f"{cell['nfe']:g}"}


def track(results: dict, folder: Path, tracker: tracking.Tracker) -> None:
    """Logs a table, the key figures, the sheets, and the record as an artifact of type results."""
    cells = results["cells"]
    columns = ["student", "plan", "diversity", "low", "high", "of base", "verdict", "recovery", "agreement"]
    columns += ["nfe", "seconds"]
    rows, finals = [], {}
    for c in cells:
        final, recovered = c["diversity"]["clip"][-1], c["recovery"]["clip"] or {}
        share = c["of_base"]["clip"]["value"], said(c, "clip")
        cost = c["agreement"]["value"], c["nfe"], c.get("seconds")
        rows.append([c["student"], c["plan"], *final.values(), *share, recovered.get("value"), *cost])
        finals[f"diversity/clip/{c['student']}/{c['plan']}"] = final["value"]
    tracker.table("diversity/plans", columns, rows)
    tracker.log(finals)
    for student in dict.fromkeys(c["student"] for c in cells):
        file = folder / f"images/{student}.png"
        tracker.image(f"diversity/pictures/{student}", file, "plans in rows, seeds in columns")
    tracker.artifact(folder / "results.json", f"diversity-{folder.name}", "results")


if __name__ == "__main__":
    entry(main, Config)
