"""Where variety is lost and how to get it back: python -m analysis.diversity [config=FILE] [key=value ...]

Without arguments: the base and the students of `tiny`, a few plans each, small; some minutes on a CPU. configs/diversity/full.yaml is
the whole table.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from analysis import diversity_page, record, sheets
from analysis.drawing import shown
from analysis.metrics import Spread, spanned
from analysis.quality import Judge, against
from analysis.report import number
from configs import UserError, command, entry, load, releases, replacing, tracking, versions
from controls import stats
from models import budget, devices, promptsets
from models.evaluators import UNIT, Evaluator, evaluators
from models.families import DTYPES, Family, Memory
from models.promptsets import PromptSet
from models.sample import Plan, draw_noise, named, sample

FEW = ["base", "base(4)", "student", "hybrid(1)", "hybrid(2)", "late(1)", "skip(1)", "renoised(1)", "guided(1)", "cads(0.2)", "delta(0.8)"]
SHOWN = 8  # images of a prompt that the picture shows
BLOCKS = 8  # groups of captions that the jackknife of the quality numbers leaves out
BLOCK_SIZE = 64  # captions drawn and held at once, at most
FREE = ("plans", "students", "labels", "neighbours", "draws", "batch", "memory", "plan", "wandb", "out")  # what a continued run may change
OF_THE_BASE = ("base", "interval")  # plans that no student takes part in


@dataclass
class Config:
    name: str = "default"  # of the run folder
    family: str = "tiny"  # a card in configs/families, or the path of one
    students: list[str] = field(default_factory=list)  # members to compare with the base; empty = all of the family
    plans: list[str] = field(default_factory=lambda: list(FEW))  # as models/sample.py writes them; base and student are always there
    prompts: list[str] = field(default_factory=list)  # texts, or files and datasets of them; empty = the family card's prompts
    seeds: int = 5  # images per prompt, at least 3
    seed: int = 2000  # the first image seed, and that of the bootstrap
    captions: int = 48  # images of the quality numbers (Fréchet, Inception-style, precision …), one per caption; 0 = none
    evaluators: list[str] = field(default_factory=list)  # of the family's card, clip among them; empty = all that read words
    captions_from: list[str] = field(default_factory=list)  # what those are told, as prompts; empty = the reference's own, else prompts
    reference: str = ""  # folder of pictures, captions in .txt files beside them; empty = the world's own where the family has one
    labels: list[str] = field(default_factory=list)  # classes of the Inception-style score, told apart by CLIP; empty = the card's prompts
    neighbours: int = 5  # k of precision, recall, density and coverage
    draws: int = 2000  # bootstrap draws of every interval
    batch: int = 48  # images sampled at once
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    memory: Memory = field(default_factory=Memory)  # what to do without, at the price of time; a continued run may change it
    plan: bool = False  # --plan: say what will be loaded and asked, and stop; needs no weights
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
    def file(self) -> str:
        return f"features/{self.student}/{self.plan}/{self.part}.safetensors"


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the report."""
    start, accelerator = time.time(), devices.start(cfg)
    check(cfg)
    family = Family(cfg.family, accelerator.device, DTYPES[cfg.dtype], cfg.memory, bare=cfg.plan)
    told = promptsets.read(cfg.prompts or family.card.prompts)
    cfg.prompts, cfg.labels, seeds = told.texts, cfg.labels or family.card.prompts, told.numbers(cfg.seeds, cfg.seed)
    plans = plans_of(cfg, family)
    if cfg.plan:
        images = len(cfg.prompts) * cfg.seeds + cfg.captions
        print(f"{len(plans)} ways to draw, {images} images each")
        print(budget.forecast(family.card, budget.asked((make(), images) for make in plans.values()), family.dtype, family.device))
        return Path(cfg.out) / cfg.name
    captions, real = against(family.card, cfg.reference, cfg.captions_from, cfg.prompts, cfg.captions, cfg.neighbours)
    texts = captions.texts
    eyes = evaluators(family.card, accelerator.device, cfg.evaluators)
    folder = devices.claim(accelerator, cfg, FREE)

    parts = [f"prompt-{p}" for p in range(len(cfg.prompts))] + [f"block-{b}" for b in range(blocks_of(texts))]
    jobs = [Job(student, plan, part) for student, plan in plans for part in parts]
    todo = [job for job in jobs if not (folder / job.file).exists()]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    for job in tqdm(mine, "diversity", unit="set", disable=not accelerator.is_main_process):
        kind, _, index = job.part.partition("-")
        plan, to, k = plans[job.student, job.plan](), folder / job.file, int(index)
        variety(cfg, family, plan, eyes, seeds, k, to) if kind == "prompt" else captioned(cfg, family, plan, eyes, captions, k, to)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return folder / "report.html"

    judge = Judge(eyes, cfg.labels, real, cfg.neighbours) if texts else None
    cells = cells_of(cfg, family.card.base, list(plans), list(eyes), judge, blocks_of(texts), folder)
    results = {"schema": 1, "recipe": "analysis.diversity", "command": command(), "versions": versions(),
               "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.time() - start, 1), "config": asdict(cfg),
               "evaluators": list(eyes), "base": family.card.base, "fronts": diversity_page.fronts(cells, family.card.base),
               "cells": cells}  # fmt: skip
    record.write(results, folder)
    pictures(seeds[: min(SHOWN, cfg.seeds)], cells, folder)
    page = diversity_page.build(folder)
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
        raise UserError(f"evaluators must hold clip, which judges prompt agreement; got {', '.join(cfg.evaluators)}")
    if cfg.captions and cfg.captions < BLOCKS * max(2, cfg.neighbours):
        raise UserError(f"captions must be 0 or at least {BLOCKS * max(2, cfg.neighbours)}; got {cfg.captions}")
    cfg.plans = list(dict.fromkeys(["base", "student", *(text.replace(" ", "") for text in cfg.plans)]))


def plans_of(cfg: Config, family: Family) -> dict[tuple[str, str], Callable[[], Plan]]:
    """(student, plan) to a function that makes the plan; plans of the base alone stand once, under the base's name.

    Made anew for each job, for a plan may hold weights. Raises UserError for a member of another family and for a plan that is none.
    """
    base, others = family.member(family.card.base), [name for name in family.card.members if name != family.card.base]
    found: dict[tuple[str, str], Callable[[], Plan]] = {}
    if family.card.base in cfg.students:
        raise UserError(f"{family.card.base} is the base itself; students are {', '.join(others)}")
    for text in cfg.plans:
        for name in cfg.students or others:
            make = partial(named, text, base, family.member(name))
            make()  # a mistake is said now, not after an hour of drawing
            found[family.card.base if text.split("(")[0] in OF_THE_BASE else name, text] = make
    return found


def images_of(family: Family, plan: Plan, texts: list[str], seeds: list[int], batch: int, steps: bool) -> Iterator[tuple[int, Tensor]]:
    """(step, pictures (B, 3, H, W)) batch by batch: x0 at each step and the finished image at the last, or without `steps` this alone."""
    for rows in torch.arange(len(texts)).split(batch):
        noise = draw_noise([seeds[r] for r in rows], family.latent_shape, plan.steps, family.device)
        for step in sample(plan, noise, family.encode([texts[r] for r in rows])):
            last = step.index + 1 == plan.steps
            if steps or last:
                yield step.index, family.decode(step.after if last else step.x0)


@torch.no_grad()
def variety(cfg: Config, family: Family, plan: Plan, eyes: dict[str, Evaluator], numbers: list[int], p: int, path: Path) -> None:
    """How far apart the seeds of one prompt are at each step, as one safetensors file of numbers and a few pictures."""
    spreads = {name: [Spread("cosine" if name in UNIT else "squared") for _ in range(plan.steps)] for name in eyes}
    agrees, pictures, word = np.zeros(plan.steps), torch.empty(0, dtype=torch.uint8), eyes["clip"].texts([cfg.prompts[p]])[0]
    seeds = numbers[p * cfg.seeds :][: cfg.seeds]
    for t, images in images_of(family, plan, [cfg.prompts[p]] * cfg.seeds, seeds, cfg.batch, steps=True):
        features = {name: eye.features(images) for name, eye in eyes.items()}
        for name, values in features.items():
            spreads[name][t].add(values)
        agrees[t] += (features["clip"] @ word).sum() / cfg.seeds
        if t + 1 == plan.steps:
            pictures = torch.cat([pictures, sheets.thumbs(images)])[:SHOWN]
    tensors = {name: torch.tensor([list(s.distance().values()) for s in spread], dtype=torch.float64) for name, spread in spreads.items()}
    tensors["vendi"] = torch.tensor([s.vendi() for s in spreads["clip"]], dtype=torch.float64)
    tensors["agreement"] = torch.from_numpy(100 * agrees)
    tensors["t"] = torch.tensor([level.t for stage in plan.stages for level in stage.levels], dtype=torch.float64)
    tensors["pictures"] = pictures.contiguous()
    with replacing(path) as new:
        save_file(tensors, new)


@torch.no_grad()
def captioned(cfg: Config, family: Family, plan: Plan, eyes: dict[str, Evaluator], captions: PromptSet, b: int, path: Path) -> None:
    """One block of the captions, an image each: features, and what it cost, from the words to the pixels, the base's steps included."""
    rows = slice(b, None, blocks_of(captions.texts))
    told, seeds = captions.texts[rows], captions.numbers(1, cfg.seed + 500_000)[rows]
    asked = {id(member.denoiser): member.denoiser for member in plan.members}.values()
    before, seconds, found, start = sum(denoiser.evaluations for denoiser in asked), 0.0, {name: [] for name in eyes}, time.perf_counter()
    for _, images in images_of(family, plan, told, seeds, cfg.batch, steps=False):
        seconds += time.perf_counter() - start
        for name, eye in eyes.items():
            found[name].append(torch.from_numpy(eye.features(images)).float())
        start = time.perf_counter()
    evaluations = (sum(denoiser.evaluations for denoiser in asked) - before) / len(found["clip"])
    words = torch.from_numpy(eyes["clip"].texts(told)).float()
    cost = torch.tensor([seconds / len(told), evaluations], dtype=torch.float64)
    with replacing(path) as new:
        save_file({**{name: torch.cat(parts) for name, parts in found.items()}, "words": words, "cost": cost}, new)


def blocks_of(texts: list[str]) -> int:
    """How many blocks the captions are drawn in: of at most BLOCK_SIZE, so that no block grows with their number."""
    return max(BLOCKS, -(-len(texts) // BLOCK_SIZE)) if texts else 0


def cells_of(cfg: Config, base: str, plans: list, evaluators: list[str], judge: Judge | None, blocks: int, folder: Path) -> list[dict]:
    """A cell per (student, plan)."""
    found = {key: gather(cfg, *key, evaluators, folder) for key in plans}
    cells = []
    for (student, plan), own in tqdm(found.items(), "numbers", unit="cell"):
        cell = {"student": student, "plan": plan, **summary(cfg, own, found[base, "base"], found.get((student, "student")), evaluators)}
        cells.append(cell | (scored(judge, student, plan, blocks, folder) if judge else {}))
    return cells


def gather(cfg: Config, student: str, plan: str, evaluators: list[str], folder: Path) -> dict:
    """All prompts of a plan: per evaluator (P, T, 3), vendi and agreement (P, T), t (T,)."""
    files = [load_file(folder / Job(student, plan, f"prompt-{p}").file) for p in range(len(cfg.prompts))]
    return {**{key: np.stack([f[key].numpy() for f in files]) for key in (*evaluators, "vendi", "agreement")}, "t": files[0]["t"].numpy()}


def summary(cfg: Config, own: dict, base: dict, student: dict | None, evaluators: list[str]) -> dict:
    """The numbers of one plan, beside those of the base and of its student alone."""
    value = lambda found, name, t=-1: found[name][:, t, 0]  # noqa: E731
    steps = len(own["t"])
    return {
        "steps": [{"t": float(t), "share": (i + 1) / steps} for i, t in enumerate(own["t"])],
        "diversity": {name: [mean(cfg, own[name][:, t, 0]) for t in range(steps)] for name in evaluators},
        "vendi": [mean(cfg, own["vendi"][:, t]) for t in range(steps)],
        "agreement": mean(cfg, own["agreement"][:, -1]),
        "per_prompt": [{"prompt": prompt, "vendi": float(own["vendi"][p, -1]),
                        **{name: dict(zip(("value", "low", "high"), own[name][p, -1].tolist(), strict=True)) for name in evaluators}}
                       for p, prompt in enumerate(cfg.prompts)],
        "of_base": {name: ratio(cfg, value(own, name), value(base, name)) for name in evaluators},
        "of_base_first": {name: ratio(cfg, value(own, name, 0), value(base, name, 0)) for name in evaluators},
        "gain": {name: mean(cfg, value(own, name) - value(student, name)) if student else None for name in evaluators},
        "recovery": {name: recovery(cfg, *(value(f, name) for f in (own, base, student))) if student else None for name in evaluators},
        "agreement_gain": mean(cfg, own["agreement"][:, -1] - student["agreement"][:, -1]) if student else None,
        "images": len(cfg.prompts) * cfg.seeds, "prompts": len(cfg.prompts), "seeds": cfg.seeds,
    }  # fmt: skip


def resampled(cfg: Config, *values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over prompts of per-prompt values, as they are (K,) and in each bootstrap draw of prompts (n, K), the same draws for all."""
    table = np.stack(values, -1)[:, None]                                                        # (P, 1, K)
    return table.mean((0, 1)), stats.curves(table, cfg.draws, cfg.seed)


def mean(cfg: Config, values: np.ndarray) -> dict:
    """The mean over prompts (P,) with its interval."""
    value, draws = resampled(cfg, values)
    return spanned(value[0], draws[:, 0])


def ratio(cfg: Config, above: np.ndarray, below: np.ndarray) -> dict:
    """The ratio of two means over the same prompts."""
    (a, b), draws = resampled(cfg, above, below)
    return spanned(a / b, draws[:, 0] / draws[:, 1])


def recovery(cfg: Config, own: np.ndarray, base: np.ndarray, student: np.ndarray) -> dict:
    """(plan - student) / (base - student): 0 at the student, 1 at the base; undefined where no loss of the student can be told."""
    (gained, lost), draws = resampled(cfg, own - student, base - student)
    if stats.interval(draws[:, 1])[0] <= 0:
        return dict(stats.UNDEFINED)
    return spanned(gained / lost, draws[:, 0] / draws[:, 1])


def scored(judge: Judge, student: str, plan: str, blocks: int, folder: Path) -> dict:
    """Quality with intervals, and the cost of an image; one block is held at a time."""
    tallies, costs, images = [judge.tally() for _ in range(BLOCKS)], [], 0
    for b in range(blocks):
        block = {key: value.double().numpy() for key, value in load_file(folder / Job(student, plan, f"block-{b}").file).items()}
        judge.add(tallies[b % BLOCKS], block)
        costs.append(block["cost"])
        images += len(block["words"])
    seconds, evaluations = np.median(costs, 0).tolist()
    return {"quality": judge.jackknife(tallies), "seconds": seconds, "evaluations": evaluations, "captions": images}


def pictures(seeds: list[int], cells: list[dict], folder: Path) -> None:
    """One sheet per student: its plans in rows, the seeds of the first prompt in columns."""
    for student in dict.fromkeys(c["student"] for c in cells):
        plans = [c["plan"] for c in cells if c["student"] == student]
        rows = [(plan, list(load_file(folder / Job(student, plan, "prompt-0").file)["pictures"])) for plan in plans]
        sheets.sheet(rows, list(map(str, seeds)), folder / f"images/{student}.png")


def show(cells: list[dict]) -> None:
    """Prints a row per plan."""
    table = Table(title="Diversity (mean pairwise distance over seeds) [95 %], share of the loss that is recovered, cost")
    names = list(cells[0]["diversity"])
    heads = [head for name in names for head in (f"by {name}", "recovery")]
    for head in ("student", "plan", *heads, "agreement", "Fréchet", "evaluations", "ms"):
        table.add_column(head)
    for c in cells:
        by = [word for name in names for word in (shown(c["diversity"][name][-1]), shown(c["recovery"][name], 2))]
        frechet, milliseconds = c.get("quality", {}).get("frechet_clip"), 1000 * c["seconds"] if "seconds" in c else None
        table.add_row(c["student"], c["plan"], *by, number(c["agreement"]["value"], 1), number(frechet and frechet["value"], 3),
                      f"{c['evaluations']:g}" if "evaluations" in c else "", number(milliseconds, 0))  # fmt: skip
    Console(width=max(140, Console().width)).print(table)


def track(results: dict, folder: Path, tracker: tracking.Tracker) -> None:
    """Logs a table, the key figures, the sheets, and the record as an artifact of type results."""
    cells = results["cells"]
    columns = ["student", "plan", "diversity", "low", "high", "recovery", "agreement", "evaluations", "seconds"]
    rows = [[c["student"], c["plan"], *c["diversity"]["clip"][-1].values(), (c["recovery"]["clip"] or {}).get("value"),
             c["agreement"]["value"], c.get("evaluations"), c.get("seconds")] for c in cells]  # fmt: skip
    tracker.table("diversity/plans", columns, rows)
    tracker.log({f"diversity/clip/{c['student']}/{c['plan']}": c["diversity"]["clip"][-1]["value"] for c in cells})
    for student in dict.fromkeys(c["student"] for c in cells):
        tracker.image(f"diversity/pictures/{student}", folder / f"images/{student}.png", "plans in rows, seeds in columns")
    tracker.artifact(folder / "results.json", f"diversity-{folder.name}", "results")


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
