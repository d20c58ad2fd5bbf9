"""Where variety is lost and how to get it back: python -m analysis.diversity [config=FILE] [key=value ...]

Without arguments: the base and the students of `tiny`, a few plans each, small; some minutes on a CPU.
configs/diversity/full.yaml is the whole table.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from analysis import report, wandb_log
from analysis.images import sheets, store
from analysis.images.cache import in_memory, in_turn, one_by_one, plan_of, ways
from analysis.images.quality import Judge, against
from analysis.measures.image_sets import Spread
from analysis.pages import diversity as diversity_page
from analysis.pages.words import number, shown
from configs import UserError, entry, list_of, releases, tracking
from controls import intervals
from models import budget, devices, forecast, promptsets
from models.evaluators import UNIT, Evaluator, chosen, load_evaluators
from models.families import DTYPES, Family, Memory
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
class Config:
    name: str = "default"  # of the run folder
    family: str = "tiny"  # a card in configs/families, or the path of one
    students: list[str] = list_of()  # members to compare with the base; empty = all of the family
    plans: list[str] = list_of(*FEW)  # as models/sampler.py writes them; base and student are always there
    prompts: list[str] = list_of()  # texts, or files and datasets of them; empty = the family card's prompts
    seeds: int = 5  # images per prompt, at least 3
    seed: int = 2000  # the first image seed
    captions: int = (
        48  # images of the quality numbers (Fréchet, Inception-style, precision …), one per caption; 0 = none
    )
    evaluators: list[str] = list_of()  # of the family's card, clip among them; empty = all that read words
    captions_from: list[str] = (
        list_of()
    )  # what those are told, as prompts; empty = the reference's own, else prompts
    # folder of pictures, captions in .txt files beside them; empty = the world's own where the family has one
    reference: str = ""
    labels: list[str] = (
        list_of()
    )  # classes of the Inception-style score, told apart by CLIP; empty = the card's prompts
    neighbours: int = 5  # k of precision, recall, density and coverage
    # images at once; 0 = as many as usual at their size (48; 4 at 1024 px); halved where memory does not
    # suffice
    batch_size: int = 0
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(
        default_factory=Memory
    )  # what to do without, at the price of time; a continued run may change it
    dry_run: bool = False  # --dry-run: say what will be loaded and asked, and stop; needs no weights
    out: str = "runs/diversity"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled


@dataclass(frozen=True)
class Job:
    """One prompt's seeds, or one block of the captions, by one plan."""

    student: str  # the base's own name for plans that no student takes part in
    plan: str
    part: str  # prompt-0, prompt-1, … or block-0, block-1, …

    @property
    def target(self) -> str:
        """As analysis.images.cache names it."""
        return self.student if self.plan in ("base", "student") else f"{self.student}:{self.plan}"

    @property
    def file(self) -> str:
        return f"features/{self.student}/{self.plan}/{self.part}.safetensors"


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    start, accelerator = time.time(), devices.start(cfg)
    check(cfg)
    family = Family(
        cfg.family,
        accelerator.device,
        DTYPES[cfg.dtype],
        cfg.memory,
        cfg.dry_run,
        cfg.batch_size,
        cfg.quantize,
    )
    prompts = promptsets.read(cfg.prompts or family.card.prompts)
    cfg.prompts, cfg.labels, seeds = (
        prompts.texts,
        cfg.labels or family.card.prompts,
        prompts.numbers(cfg.seeds, cfg.seed),
    )
    plans = ways(cfg.plans, cfg.students, family if cfg.dry_run else Family(cfg.family, bare=True))
    if cfg.dry_run:
        images = len(cfg.prompts) * cfg.seeds + cfg.captions
        print(f"{len(plans)} ways to draw, {images} images each")
        calls = budget.nfe_by_member((plan_of(family, Job(*way, "").target), images) for way in plans)
        names, turns = (
            chosen(family.card, cfg.evaluators),
            in_memory(in_turn([Job(*way, "") for way in plans], family.card), family.card),
        )
        print(budget.forecast(family.card, calls, family.dtype, family.device, names, family.quantize))
        most, reading = max(cfg.seeds, cfg.captions), bool(cfg.captions)
        print(forecast.said(lambda: forecast.drawing(family, turns, most, [], names, reading=reading)))
        return Path(cfg.out) / cfg.name
    captions, real = against(
        family.card, cfg.reference, cfg.captions_from, cfg.prompts, cfg.captions, cfg.neighbours
    )
    texts = captions.texts
    evaluators = load_evaluators(family.card, accelerator.device, cfg.evaluators)
    folder = devices.claim(accelerator, cfg, FREE)

    parts = [f"prompt-{p}" for p in range(len(cfg.prompts))] + [f"block-{b}" for b in range(blocks_of(texts))]
    jobs = [Job(student, plan, part) for student, plan in plans for part in parts]
    lost = store.missing(folder, [job.file for job in jobs])
    accelerator.wait_for_everyone()  # all have seen the same before anyone adds to it
    todo = in_turn([job for job in jobs if job.file in lost], family.card)
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    if mine and not texts:  # captions are too many to be kept
        family.encode_all(cfg.prompts)
    for job in one_by_one(mine, family, "diversity", not accelerator.is_main_process):
        kind, _, index = job.part.partition("-")
        plan, k = plan_of(family, job.target), int(index)
        if kind == "prompt":
            tensors = variety(cfg, family, plan, evaluators, seeds, k)
        else:
            tensors = captioned(cfg, family, plan, evaluators, captions, k)
        store.write(folder / job.file, tensors, job.file)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return folder / "report.html"

    judge = Judge(evaluators, cfg.labels, real, cfg.neighbours) if texts else None
    cells = cells_of(cfg, family.card.base, plans, list(evaluators), judge, blocks_of(texts), folder)
    results = {
        **wandb_log.header("analysis.diversity", cfg, start),
        "evaluators": list(evaluators),
        "base": family.card.base,
        "fronts": diversity_page.fronts(cells, family.card.base),
        "cells": cells,
    }
    wandb_log.write(results, folder)
    pictures(seeds[: min(SHOWN, cfg.seeds)], cells, folder)
    page = report.build(folder)
    show(cells)
    print(f"{time.time() - start:.0f} seconds; report: {page}")
    with tracking.start(folder, asdict(cfg), "analysis.diversity", family.card.name, cfg.wandb) as tracker:
        track(results, folder, tracker)
    return page


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
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
    cfg: Config, family: Family, plan: Plan, evaluators: dict[str, Evaluator], numbers: list[int], p: int
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
    cfg: Config, family: Family, plan: Plan, evaluators: dict[str, Evaluator], captions: PromptSet, b: int
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


def blocks_of(texts: list[str]) -> int:
    """How many blocks the captions are drawn in: of at most BLOCK_SIZE, so that no block grows with their
    number.
    """
    return max(BLOCKS, -(-len(texts) // BLOCK_SIZE)) if texts else 0


def cells_of(
    cfg: Config, base: str, plans: list, evaluators: list[str], judge: Judge | None, blocks: int, folder: Path
) -> list[dict]:
    """A cell per (student, plan)."""
    found = {key: gather(cfg, *key, evaluators, folder) for key in plans}
    cells = []
    for (student, plan), own in tqdm(found.items(), "numbers", unit="cell"):
        cell = {
            "student": student,
            "plan": plan,
            **summary(cfg, own, found[base, "base"], found.get((student, "student")), evaluators),
        }
        cells.append(cell | (scored(judge, student, plan, blocks, folder) if judge else {}))
    return cells


def kept(folder: Path, job: Job) -> dict[str, Tensor]:
    """What a job found."""
    return store.load(folder / job.file, job.file)


def gather(cfg: Config, student: str, plan: str, evaluators: list[str], folder: Path) -> dict:
    """All prompts of a plan: per evaluator (P, T, 3), vendi and agreement (P, T), t (T,)."""
    files = [kept(folder, Job(student, plan, f"prompt-{p}")) for p in range(len(cfg.prompts))]
    return {
        **{key: np.stack([f[key].numpy() for f in files]) for key in (*evaluators, "vendi", "agreement")},
        "t": files[0]["t"].numpy(),
    }


def summary(cfg: Config, own: dict, base: dict, student: dict | None, evaluators: list[str]) -> dict:
    """The numbers of one plan, beside those of the base and of its student alone."""

    def value(found, name, t=-1):
        return found[name][:, t, 0]

    steps = len(own["t"])
    return {
        "steps": [{"t": float(t), "share": (i + 1) / steps} for i, t in enumerate(own["t"])],
        "diversity": {
            name: [intervals.mean(own[name][:, t, 0]) for t in range(steps)] for name in evaluators
        },
        "vendi": [intervals.mean(own["vendi"][:, t]) for t in range(steps)],
        "agreement": intervals.mean(own["agreement"][:, -1]),
        "per_prompt": [
            {
                "prompt": prompt,
                "vendi": float(own["vendi"][p, -1]),
                **{
                    name: dict(zip(("value", "low", "high"), own[name][p, -1].tolist(), strict=True))
                    for name in evaluators
                },
            }
            for p, prompt in enumerate(cfg.prompts)
        ],
        "of_base": {
            name: intervals.ratio(value(own, name), value(base, name), positive=True) for name in evaluators
        },
        "of_base_first": {
            name: intervals.ratio(value(own, name, 0), value(base, name, 0), positive=True)
            for name in evaluators
        },
        "gain": {
            name: intervals.mean(value(own, name) - value(student, name)) if student else None
            for name in evaluators
        },
        "recovery": {
            name: recovery(*(value(f, name) for f in (own, base, student))) if student else None
            for name in evaluators
        },
        "agreement_gain": intervals.mean(own["agreement"][:, -1] - student["agreement"][:, -1])
        if student
        else None,
        "images": len(cfg.prompts) * cfg.seeds,
        "prompts": len(cfg.prompts),
        "seeds": cfg.seeds,
    }


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
            for key, value in kept(folder, Job(student, plan, f"block-{b}")).items()
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
        rows = [(plan, list(kept(folder, Job(student, plan, "prompt-0"))["pictures"])) for plan in plans]
        sheets.sheet(rows, list(map(str, seeds)), folder / f"images/{student}.png")


def show(cells: list[dict]) -> None:
    """Prints a row per plan."""
    table = Table(
        title="Diversity (mean pairwise distance over seeds) [95 %], share of the loss that is recovered, "
        "cost"
    )
    names = list(cells[0]["diversity"])
    heads = [head for name in names for head in (f"by {name}", "recovery")]
    for head in ("student", "plan", *heads, "agreement", "Fréchet", "nfe", "ms"):
        table.add_column(head)
    for c in cells:
        by = [
            word
            for name in names
            for word in (shown(c["diversity"][name][-1]), shown(c["recovery"][name], 2))
        ]
        frechet, milliseconds = (
            c.get("quality", {}).get("frechet_clip"),
            1000 * c["seconds"] if "seconds" in c else None,
        )
        table.add_row(
            c["student"],
            c["plan"],
            *by,
            number(c["agreement"]["value"], 1),
            number(frechet and frechet["value"], 3),
            f"{c['nfe']:g}" if "nfe" in c else "",
            number(milliseconds, 0),
        )
    Console(width=max(140, Console().width)).print(table)


def track(results: dict, folder: Path, tracker: tracking.Tracker) -> None:
    """Logs a table, the key figures, the sheets, and the record as an artifact of type results."""
    cells = results["cells"]
    columns = ["student", "plan", "diversity", "low", "high", "recovery", "agreement", "nfe", "seconds"]
    rows = [
        [
            c["student"],
            c["plan"],
            *c["diversity"]["clip"][-1].values(),
            (c["recovery"]["clip"] or {}).get("value"),
            c["agreement"]["value"],
            c.get("nfe"),
            c.get("seconds"),
        ]
        for c in cells
    ]
    tracker.table("diversity/plans", columns, rows)
    tracker.log(
        {f"diversity/clip/{c['student']}/{c['plan']}": c["diversity"]["clip"][-1]["value"] for c in cells}
    )
    for student in dict.fromkeys(c["student"] for c in cells):
        tracker.image(
            f"diversity/pictures/{student}",
            folder / f"images/{student}.png",
            "plans in rows, seeds in columns",
        )
    tracker.artifact(folder / "results.json", f"diversity-{folder.name}", "results")


if __name__ == "__main__":
    entry(main, Config)
