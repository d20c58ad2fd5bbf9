"""Where variety is lost and how to get it back: python -m analysis.diversity [config=FILE] [key=value ...]

Without arguments: the base and the students of `tiny`, a few plans each, small; some minutes on a CPU.
configs/diversity/full.yaml is the whole table.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.images import sheets, store
from analysis.images.cache import plan_of, ways
from analysis.images.quality import Judge, against
from analysis.measures.image_sets import Spread
from analysis.pages.diversity import findings, fronts
from analysis.pages.words import number, shown
from analysis.session import Drawing, Session, Way
from configs import UserError, entry, list_of, releases, tracking
from configs.screen import show_table
from controls import intervals
from controls.picture_grid import picture_grid
from models.evaluators import UNIT, Evaluator
from models.families import Family
from models.promptsets import PromptSet
from models.sampler import Plan, draw_noise, finish, sample

FEW = [
    "base",
    "base(4)",
    "student",
    "hybrid(1)",
    "hybrid(2)",
    "late(1)",
    "skip(1)",
    "renoised(1)",
    "guided(1)",
    "cads(0.2)",
    "delta(0.8)",
]
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
    plans: list[str] = list_of(*FEW)  # as models/sampler.py writes them; base and student are always there
    seeds: int = 5  # images per prompt, at least 3
    seed: int = 2000  # the first image seed
    # images of the quality numbers (Fréchet, Inception-style, precision …), one per caption; 0 = none
    captions: int = 48
    evaluators: list[str] = list_of()  # of the family's card, clip among them; empty = all that read words
    # what those are told, as prompts; empty = the reference's own, else prompts
    captions_from: list[str] = list_of()
    # folder of pictures, captions in .txt files beside them; empty = the world's own where the family has one
    reference: str = ""
    # classes of the Inception-style score, told apart by CLIP; empty = the card's prompts
    labels: list[str] = list_of()
    neighbours: int = 5  # k of precision, recall, density and coverage
    out: str = "runs/diversity"  # the run is written to out/name


@dataclass(frozen=True)
class Part(Way):
    """A part of what one plan draws: prompt-0, prompt-1, … or block-0, block-1, … of the captions."""

    part: str

    @property
    def file(self) -> str:
        return f"features/{self.student}/{self.plan}/{self.part}.safetensors"


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    session = Session("analysis.diversity", cfg, FREE)
    check(cfg)
    seeds = session.prompts().numbers(cfg.seeds, cfg.seed)
    cfg.labels = cfg.labels or session.family.card.prompts
    plans = ways(cfg.plans, cfg.students, session.bare)
    if cfg.dry_run:
        return plan(session, plans)
    captions, real = against(
        session.family.card, cfg.reference, cfg.captions_from, cfg.prompts, cfg.captions, cfg.neighbours
    )
    judge = Judge(session.evaluators, cfg.labels, real, cfg.neighbours) if captions.texts else None
    session.claim()
    parts = [Part(*way, name) for way in plans for name in names_of(cfg.prompts, captions.texts)]
    texts = [] if captions.texts else cfg.prompts  # captions are too many to be kept
    session.draw(parts, texts, partial(drawn, session, captions, seeds), "diversity")
    if not session.first:
        return session.folder / "report.html"
    return publish(session, cells_of(session, plans, judge, blocks_of(captions.texts)), seeds)


def plan(session: Session, plans: list[tuple[str, str]]) -> Path:
    """Says what will be drawn, and what that takes."""
    cfg, images = session.cfg, len(session.cfg.prompts) * session.cfg.seeds + session.cfg.captions
    print(f"{len(plans)} ways to draw, {images} images each")
    most = max(cfg.seeds, cfg.captions)
    ways = [Way(*way) for way in plans]
    session.forecast(ways, [images] * len(ways), most, [], reading=bool(cfg.captions))
    return session.folder


def publish(session: Session, cells: list[dict], seeds: list[int]) -> Path:
    """The record, its page, its table."""
    base, folder = session.family.card.base, session.folder
    pictures(seeds[: min(SHOWN, session.cfg.seeds)], cells, folder)
    results = session.record(
        evaluators=list(session.evaluators), base=base, fronts=fronts(cells, base), cells=cells
    )
    show(cells)
    students = [name for name in dict.fromkeys(cell["student"] for cell in cells) if name != base]
    says = findings(cells, students[0], base)[0] if students else f"{base} alone"
    return session.publish(results, says, track, session.family.card.name)


def drawn(session: Session, captions: PromptSet, seeds: list[int], part: Part) -> dict[str, Tensor]:
    """What one part holds."""
    kind, _, index = part.part.partition("-")
    make = partial(variety, numbers=seeds) if kind == "prompt" else partial(captioned, captions=captions)
    return make(
        session.cfg, session.family, plan_of(session.family, part.target), session.evaluators, int(index)
    )


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


@torch.no_grad()
def variety(
    cfg: Config, family: Family, plan: Plan, evaluators: dict[str, Evaluator], p: int, numbers: list[int]
) -> dict[str, Tensor]:
    """How far apart the seeds of one prompt are at each step: numbers and a few pictures."""
    word, seeds = evaluators["clip"].texts([cfg.prompts[p]])[0], numbers[p * cfg.seeds :][: cfg.seeds]

    def seen(rows: Tensor) -> tuple[list[dict[str, np.ndarray]], Tensor]:
        """Features of x0 at each step, of the finished image at the last, and the small finished pictures."""
        noise = draw_noise([seeds[row] for row in rows], family.latent_shape, plan.steps, family.device)
        features = []
        for step in sample(plan, noise, family.encode([cfg.prompts[p]] * len(rows))):
            images = family.decode(step.after if step.index + 1 == plan.steps else step.x0)
            features.append({name: evaluator.features(images) for name, evaluator in evaluators.items()})
        return features, sheets.thumbs(images)

    spreads = {
        name: [Spread("cosine" if name in UNIT else "squared") for _ in range(plan.steps)]
        for name in evaluators
    }
    agrees, pictures = np.zeros(plan.steps), []
    for batch, thumbs in family.drawing.of(seen, cfg.seeds):
        pictures.append(thumbs)
        for t, features in enumerate(batch):
            agrees[t] += (features["clip"] @ word).sum() / cfg.seeds
            for name, values in features.items():
                spreads[name][t].add(values)
    tensors = {
        name: torch.tensor([list(s.distance().values()) for s in spread], dtype=torch.float64)
        for name, spread in spreads.items()
    }
    tensors["vendi"] = torch.tensor([s.vendi() for s in spreads["clip"]], dtype=torch.float64)
    tensors["agreement"] = torch.from_numpy(100 * agrees)
    tensors["t"] = torch.tensor(
        [level.t for stage in plan.stages for level in stage.levels], dtype=torch.float64
    )
    tensors["pictures"] = torch.cat(pictures)[:SHOWN]
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
    denoisers = {id(member.denoiser): member.denoiser for member in plan.members}.values()

    def drawn(rows: Tensor) -> tuple[dict[str, Tensor], float, int]:
        """Features of a batch, its seconds and its evaluations per image."""
        start, before = time.perf_counter(), sum(denoiser.nfe for denoiser in denoisers)
        noise = draw_noise([seeds[row] for row in rows], family.latent_shape, plan.steps, family.device)
        images = family.decode(finish(plan, noise, family.encode([texts[row] for row in rows])))
        seconds = time.perf_counter() - start
        features = {
            name: torch.from_numpy(evaluator.features(images)).float()
            for name, evaluator in evaluators.items()
        }
        return features, seconds, sum(denoiser.nfe for denoiser in denoisers) - before

    features, seconds, nfe = zip(*family.drawing.of(drawn, len(texts)), strict=True)
    words = torch.from_numpy(evaluators["clip"].texts(texts)).float()
    cost = torch.tensor([sum(seconds) / len(texts), np.mean(nfe)], dtype=torch.float64)
    return {
        **{name: torch.cat([part[name] for part in features]) for name in evaluators},
        "words": words,
        "cost": cost,
    }


def names_of(prompts: list[str], captions: list[str]) -> list[str]:
    """What the parts of a plan are called."""
    return [f"prompt-{p}" for p in range(len(prompts))] + [f"block-{b}" for b in range(blocks_of(captions))]


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
        numbers = summary(cfg, values, base, read.get((student, "student")), names)
        quality = scored(judge, student, plan, blocks, folder) if judge else {}
        cells.append({"student": student, "plan": plan, **numbers, **quality})
    return cells


def kept(folder: Path, part: Part) -> dict[str, Tensor]:
    """What a part holds."""
    return store.load(folder / part.file, part.file)


def gather(cfg: Config, student: str, plan: str, evaluators: list[str], folder: Path) -> dict:
    """All prompts of a plan: per evaluator (P, T, 3), vendi and agreement (P, T), t (T,)."""
    files = [kept(folder, Part(student, plan, f"prompt-{p}")) for p in range(len(cfg.prompts))]
    return {
        **{key: np.stack([f[key].numpy() for f in files]) for key in (*evaluators, "vendi", "agreement")},
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
        last = [plan[name][:, -1, 0] for plan in (own, base, student) if plan]
        numbers["gain"][name] = intervals.mean(last[0] - last[2]) if student else None
        numbers["recovery"][name] = recovery(*last) if student else None
    gain = intervals.mean(own["agreement"][:, -1] - student["agreement"][:, -1]) if student else None
    return {**numbers, "agreement_gain": gain}


def recovery(own: np.ndarray, base: np.ndarray, student: np.ndarray) -> dict:
    """(plan - student) / (base - student) over the same prompts (P,): 0 at the student, 1 at the base;
    undefined without a loss.
    """
    lost = intervals.mean(base - student)
    if lost["low"] is None or lost["low"] <= 0:
        return dict(intervals.UNDEFINED)
    return intervals.ratio(own - student, base - student)


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
    seconds, nfe = np.median(costs, 0).tolist()
    return {"quality": judge.jackknife(tallies), "seconds": seconds, "nfe": nfe, "captions": images}


def pictures(seeds: list[int], cells: list[dict], folder: Path) -> None:
    """One sheet per student: its plans in rows, the seeds of the first prompt in columns."""
    for student in dict.fromkeys(c["student"] for c in cells):
        plans = [c["plan"] for c in cells if c["student"] == student]
        drawn = {plan: list(kept(folder, Part(student, plan, "prompt-0"))["pictures"]) for plan in plans}
        rows = [(plan, list(map(str, seeds)), row) for plan, row in drawn.items()]
        picture_grid(rows, folder / f"images/{student}.png", rows[0][2][0].shape[-1])


def show(cells: list[dict]) -> None:
    """Prints a row per plan."""
    title = "Diversity (mean pairwise distance over seeds) [95 %], share of the loss recovered, cost"
    show_table(title, list(map(row, cells)))


def row(cell: dict) -> dict[str, str]:
    """One plan's numbers by the head they stand under."""
    texts = {"student": cell["student"], "plan": cell["plan"]}
    for name, over_steps in cell["diversity"].items():
        texts[f"by {name}"] = shown(over_steps[-1])
        texts[f"recovery, {name}"] = shown(cell["recovery"][name], 2)
    frechet = cell.get("quality", {}).get("frechet_clip")
    texts["agreement"] = number(cell["agreement"]["value"], 1)
    texts["Fréchet"] = number(frechet and frechet["value"], 3)
    texts["nfe"] = f"{cell['nfe']:g}" if "nfe" in cell else ""
    texts["ms"] = number(1000 * cell["seconds"], 0) if "seconds" in cell else ""
    return texts


def track(results: dict, folder: Path, tracker: tracking.Tracker) -> None:
    """Logs a table, the key figures, the sheets, and the record as an artifact of type results."""
    cells = results["cells"]
    columns = ["student", "plan", "diversity", "low", "high", "recovery", "agreement", "nfe", "seconds"]
    rows, finals = [], {}
    for c in cells:
        final, recovered = c["diversity"]["clip"][-1], c["recovery"]["clip"] or {}
        cost = c["agreement"]["value"], c.get("nfe"), c.get("seconds")
        rows.append([c["student"], c["plan"], *final.values(), recovered.get("value"), *cost])
        finals[f"diversity/clip/{c['student']}/{c['plan']}"] = final["value"]
    tracker.table("diversity/plans", columns, rows)
    tracker.log(finals)
    for student in dict.fromkeys(c["student"] for c in cells):
        file = folder / f"images/{student}.png"
        tracker.image(f"diversity/pictures/{student}", file, "plans in rows, seeds in columns")
    tracker.artifact(folder / "results.json", f"diversity-{folder.name}", "results")


if __name__ == "__main__":
    entry(main, Config)
