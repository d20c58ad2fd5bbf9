"""Which blocks of a student still agree with its base, and what predicts that a control transfers.

    python -m analysis.similarity [config=FILE] [key=value ...]

Without arguments: tiny/base against each of its students, and all shipped controls; some minutes on a CPU.
With control=FILE: members without against themselves with that control.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from analysis import report, results, wandb_log
from analysis.images import store
from analysis.images.activations import (
    Chunk,
    Measure,
    Pair,
    chunks,
    compare,
    shared_blocks,
    spare_noise,
    sums,
    walk,
)
from analysis.images.directions import Start, directions, overlaps
from analysis.images.stitching import stitch
from analysis.measures.prediction import points, predictors
from analysis.pages import similarity as similarity_page
from analysis.pages.words import number, ranged
from configs import ROOT, UserError, entry, list_of, releases, replacing, tracking
from controls import formats, lora
from controls.lora import Control
from models import budget, devices, forecast, promptsets
from models.evaluators import chosen, load_evaluators
from models.families import DTYPES, Family, Memory
from models.forecast import Moment
from models.sampler import alone

SHIPPED = [
    path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "controls/tiny").glob("*.safetensors"))
]
PROMPT_SEEDS = 1  # images per prompt on which the directions of controls are measured
RETENTION = {
    "control": str,
    "source": str,
    "target": str,
    "readings": results.Each({"retention": {"value": results.NUMBER}}),
}


@dataclass(frozen=True)
class Job:
    """A file of the run folder, and what makes its cells or tensors."""

    file: str
    make: Callable[[], list[dict] | dict[str, Tensor]]
    members: frozenset[str] = frozenset()  # whose networks it needs
    controls: tuple[Control, ...] = ()  # that are put into them, one at a time
    evaluators: tuple[str, ...] | None = None  # that look at its pictures; None = it makes none
    compared: str = ""  # the member whose blocks it sums up


@dataclass
class Config:
    name: str = "default"  # of the run folder
    family: str = "tiny"  # a card in configs/families, or the path of one
    source: str = ""  # the member the others are compared with; empty = the family's base
    targets: list[str] = (
        list_of()
    )  # members compared with it; empty = all others; with control: these with it
    control: str = (
        ""  # a control file: members without it against themselves with it, instead of member against member
    )
    scale: float = 1.0  # of that control
    controls: list[str] = list_of(
        *SHIPPED
    )  # control files whose weights and directions are compared; [] = none
    transfer: str = "runs/transfer/all"  # a run of analysis.transfer, whose retentions are to be predicted
    prompts: list[str] = list_of()  # texts, or files and datasets of them; empty = the family card's prompts
    seeds: int = 16  # images per prompt
    seed: int = 1000  # the first image seed, and that of permutations
    blocks: str = (
        "parts"  # parts (each resnet, attention, transformer block), blocks (whole down, mid, up blocks)
    )
    # CKA: an activation is averaged to grid x grid positions; 1 = over all positions; memory grows as its 4th
    # power
    grid: int = 1
    spread_grid: int = 4  # variance over seeds: of maps of so many positions per side
    neighbours: int = 10  # k of the mutual nearest neighbours
    # samples kept for intervals, permutations, neighbours, maps between blocks; CKA itself keeps none
    kept: int = 512
    draws: int = 100  # permutations of the prompts for the null
    stitch_seeds: int = 2  # images per prompt of stitched networks; 0 = no stitching
    # images at once; 0 = as many as usual at their size (48; 4 at 1024 px); halved where memory does not
    # suffice
    batch_size: int = 0
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(
        default_factory=Memory
    )  # what to do without, at the price of time; a continued run may change it
    dry_run: bool = False  # --dry-run: say what will be loaded and asked, and stop; needs no weights
    out: str = "runs/similarity"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled


@releases
def main(cfg: Config) -> Path:
    """Compares, prints the tables and returns the path of the page."""
    start, accelerator = time.time(), devices.start(cfg)
    check(cfg)
    shown, control = (
        [formats.load(path) for path in cfg.controls if not cfg.control],
        formats.load(cfg.control) if cfg.control else None,
    )
    transfer = retentions(cfg.transfer) if shown else []
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
    cfg.prompts, seeds = prompts.texts, prompts.numbers(cfg.seeds, cfg.seed)
    pairs = pairs_of(cfg, family, control)
    measure, firsts = (
        measure_of(cfg),
        list(dict.fromkeys([*(pair.first for pair in pairs), *([family.card.base] if shown else [])])),
    )
    folder, todo, quiet = (
        Path(cfg.out) / cfg.name,
        chunks(cfg.prompts, seeds, family.drawing.size),
        not accelerator.is_main_process,
    )
    jobs = [
        walks(family, firsts, todo),
        measurements(cfg, family, pairs, shown, todo, measure, folder, quiet),
    ]
    if cfg.dry_run:
        print(
            f"{len(pairs)} pairs, {len(seeds)} images each; the directions of {len(shown)} controls come "
            f"on top"
        )
        calls, names = nfe(family, pairs, firsts, len(seeds)), chosen(family.card) if cfg.stitch_seeds else ()
        print(budget.forecast(family.card, calls, family.dtype, family.device, names, family.quantize))
        print(forecast.said(lambda: moments(cfg, family, measure, in_turn(jobs[0]) + in_turn(jobs[1]))))
        return folder
    fits(Family(cfg.family, bare=True), pairs, shown, cfg.blocks)
    devices.claim(accelerator, cfg, ("wandb", "out", "memory", "transfer"))

    for label, part in zip(("sampling", "measuring"), jobs, strict=True):
        work(part, family, cfg.prompts, folder, label, accelerator)
    if not accelerator.is_main_process:
        return folder / "report.html"

    cells = gather(folder, pairs, shown)
    for evaluator_name, rows in points(cells, transfer).items():
        cells += [{"what": "point", "evaluator": evaluator_name, **row} for row in rows] + predictors(
            rows, evaluator_name, seed=cfg.seed
        )
    wandb_log.write({**wandb_log.header("analysis.similarity", cfg, start), "cells": cells}, folder)
    page = report.build(folder)
    show(cells)
    print(f"{time.time() - start:.0f} seconds; report: {page}")
    with tracking.start(
        folder, asdict(cfg), "analysis.similarity", control.card.name if control else cfg.family, cfg.wandb
    ) as tracker:
        track(cells, folder, tracker)
    return page


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
    if cfg.seeds < 2:
        raise UserError(f"seeds must be at least 2, for the variance over seeds; got {cfg.seeds}")
    if cfg.spread_grid < cfg.grid or cfg.spread_grid % cfg.grid:
        raise UserError(f"spread_grid must be a multiple of grid; got {cfg.spread_grid} and {cfg.grid}")
    if not 0 <= cfg.stitch_seeds <= cfg.seeds:
        raise UserError(
            f"stitch_seeds must be 0 … {cfg.seeds}, the seeds of a prompt; got {cfg.stitch_seeds}"
        )


def pairs_of(cfg: Config, family: Family, control: Control | None) -> list[Pair]:
    """What is compared with what. Raises UserError for a member that the family does not have."""
    source = cfg.source or family.card.base
    named = [name for name in (source, *cfg.targets) if name not in family.card.members]
    if named:
        raise UserError(
            f"no member {named[0]!r} in family {family.card.name}: there are {', '.join(family.card.members)}"
        )
    if control:
        return [Pair(name, name, control, cfg.scale) for name in cfg.targets or [source]]
    targets = cfg.targets or [name for name in family.card.members if name != source]
    if source in targets:
        raise UserError(f"{source} against itself says nothing; give other targets, or control=FILE")
    return [Pair(source, name) for name in targets]


def measure_of(cfg: Config) -> Measure:
    """How activations become numbers. Raises UserError where there are too few samples."""
    kept = min(cfg.seeds, max(2, cfg.kept // max(1, len(cfg.prompts))))
    samples = kept * len(cfg.prompts)
    if samples < 4:
        raise UserError(f"at least 4 samples are needed, prompts x seeds; got {samples}")
    if cfg.neighbours >= samples:
        raise UserError(f"neighbours must be below the {samples} samples that are kept; got {cfg.neighbours}")
    return Measure(cfg.blocks, cfg.grid, cfg.spread_grid, cfg.neighbours, kept, cfg.draws, cfg.seed)


def fits(family: Family, pairs: list[Pair], controls: list[Control], kind: str) -> None:
    """A misfit of members or controls is said now, not after minutes of sampling."""
    for pair in pairs:
        shared_blocks(family.member(pair.first), family.member(pair.second), kind)
    names = [control.card.name for control in controls]
    if len(set(names)) < len(names):
        raise UserError(f"controls must be files of different names; got {', '.join(names)}")
    for control in [*controls, *(pair.control for pair in pairs if pair.control)]:
        lora.fits(family.member(control.card.member).denoiser.net, control, family.card.name)


def retentions(folder: str) -> list[dict]:
    """The cells of a run of analysis.transfer; none, and a line that says how to make them, where there is no
    such run.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        print(
            f"no {path}, so nothing to predict; python -m analysis.transfer "
            f"config=configs/transfer/all.yaml makes it"
        )
        return []
    cells = results.loaded(Path(folder), "analysis.transfer")["cells"]
    results.check(cells, [RETENTION], f"{path}: cells")
    return cells


def work(
    jobs: list[Job], family: Family, prompts: list[str], folder: Path, label: str, accelerator: Accelerator
) -> None:
    """Makes the files that are not there yet, this process its share of them, and waits for the others.

    The text encoders go before the first network comes, a network goes when no later job needs it.
    """
    lost = store.missing(folder, [job.file for job in jobs], whole)
    accelerator.wait_for_everyone()  # all have seen the same before anyone adds to it
    todo = [job for job in jobs if job.file in lost]
    mine = in_turn(todo[accelerator.process_index :: accelerator.num_processes])
    for text in prompts if mine else ():
        family.encode([text])  # by itself, as chunks ask for it: a batch of texts rounds in another way
    if mine:
        family.encode_all(prompts)
    for k, job in enumerate(tqdm(mine, label, unit="job", disable=not accelerator.is_main_process)):
        family.keep(frozenset().union(*(later.members for later in mine[k:])))
        (keep if job.file.endswith(".json") else store.write)(folder / job.file, job.make(), job.file)
    accelerator.wait_for_everyone()


def in_turn(jobs: list[Job]) -> list[Job]:
    """Jobs by the networks that they need, those with few first."""
    return sorted(jobs, key=lambda job: (len(job.members), sorted(job.members)))


def moments(cfg: Config, family: Family, measure: Measure, jobs: Sequence[Job]) -> Iterator[Moment]:
    """What is held together in each job; in those that compare, on a CPU, with the sums over activations."""
    held, images = set(), max(cfg.seeds, len(cfg.prompts) * max(cfg.stitch_seeds, PROMPT_SEEDS))
    for k, job in enumerate(jobs):
        held = held & set().union(*(later.members for later in jobs[k:])) | job.members
        aside = {"sums over activations": sums(family, job.compared, measure)} if job.compared else {}
        controls = [control.tensors for control in job.controls]
        for moment in forecast.drawing(
            family, [(held, {name}) for name in job.members], images, controls, job.evaluators
        ):
            summing = (
                family.device.type == "cpu" and "draw" in moment.when
            )  # not yet while texts are encoded and networks packed
            yield Moment(moment.when, moment.held | (aside if summing else {}))


def whole(path: Path, file: str) -> list[dict] | dict[str, Tensor] | None:
    """The cells or tensors that a job left; None where they are not whole."""
    return (kept if file.endswith(".json") else store.read)(path, file)


def walks(family: Family, members: list[str], todo: list[Chunk]) -> list[Job]:
    """The own runs of the members with which others are compared."""
    return [
        Job(walked(name, chunk), partial(walk, family, name, chunk), frozenset([name]))
        for name in members
        for chunk in todo
    ]


def walked(member: str, chunk: Chunk) -> str:
    return f"trajectories/{member}/{chunk.file}"


def nfe(family: Family, pairs: list[Pair], firsts: list[str], images: int) -> Counter[str]:
    """Network evaluations by member: runs of the first ones and of all second ones, and each pair at the
    second one's levels.
    """
    calls = budget.nfe_by_member(
        (alone(family.member(name)), images) for name in [*firsts, *(pair.second for pair in pairs)]
    )
    for pair in pairs:
        steps = images * len(family.member(pair.second).levels)
        calls += Counter({pair.first: 2 * steps}) + Counter(
            {pair.second: steps}
        )  # on its own run, and on the same inputs
    return calls


def measurements(
    cfg: Config,
    family: Family,
    pairs: list[Pair],
    controls: list[Control],
    todo: list[Chunk],
    measure: Measure,
    folder: Path,
    quiet: bool,
) -> list[Job]:
    """Comparisons, stitched networks and controls: one job and one JSON file of cells each."""

    def comparison(pair: Pair) -> list[dict]:
        def own(chunk):
            return store.load(folder / walked(pair.first, chunk), walked(pair.first, chunk))

        return compare(family, pair, todo, measure, own, quiet)

    def stitches(pair: Pair) -> list[dict]:
        texts = [prompt for prompt in cfg.prompts for _ in range(cfg.stitch_seeds)]
        own = [seed for chunk in todo for seed in chunk.seeds]
        seeds = [own[p * cfg.seeds + s] for p in range(len(cfg.prompts)) for s in range(cfg.stitch_seeds)]
        evaluators = load_evaluators(family.card, family.device)
        cells, pictures = stitch(family, pair.first, pair.second, texts, seeds, evaluators)
        wandb_log.picture(pictures, folder / f"images/stitch/{pair.file}.png")
        return cells

    grounds: list[Start] = []

    def direction(control: Control) -> list[dict]:
        if not grounds:
            grounds.append(ground(family, todo, folder))
        return directions(family, control, grounds[0])

    files, evaluators = files_of(pairs, controls), tuple(chosen(family.card))
    jobs = []
    for pair in pairs:
        own, used = frozenset([pair.first, pair.second]), (pair.control,) if pair.control else ()
        jobs.append(
            Job(files[f"compare/{pair.file}"], partial(comparison, pair), own, used, compared=pair.second)
        )
    for pair in pairs if cfg.stitch_seeds else ():
        if not pair.control:
            own = frozenset([pair.first, pair.second])
            jobs.append(
                Job(files[f"stitch/{pair.file}"], partial(stitches, pair), own, evaluators=evaluators)
            )
    every = frozenset(family.card.members)
    for control in controls:
        jobs.append(
            Job(files[f"control/{control.card.name}"], partial(direction, control), every, (control,))
        )
    return jobs + ([Job(files["overlap"], partial(overlaps, controls))] if controls else [])


def files_of(pairs: list[Pair], controls: list[Control]) -> dict[str, str]:
    """Where in the run folder the cells of each job are, in the order of the record."""
    names = [f"{job}/{pair.file}" for job in ("compare", "stitch") for pair in pairs]
    return {
        name: f"cells/{name}.json"
        for name in [*names, *(f"control/{c.card.name}" for c in controls), "overlap"]
    }


@torch.no_grad()
def ground(family: Family, todo: list[Chunk], folder: Path) -> Start:
    """Finished latents of the base, the first seeds of every prompt, and the noise that is added to them."""
    base = family.member(family.card.base)
    firsts = [chunk for chunk in todo if chunk.first == 0]
    files = [walked(family.card.base, chunk) for chunk in firsts]
    x0 = torch.cat([store.load(folder / file, file)["x0"][:PROMPT_SEEDS] for file in files]).to(family.device)
    eps = torch.cat([spare_noise(family, base, chunk.seeds[:PROMPT_SEEDS]) for chunk in firsts])
    counts = [len(chunk.seeds[:PROMPT_SEEDS]) for chunk in firsts]
    prompts = family.encode(
        [chunk.text for chunk, count in zip(firsts, counts, strict=True) for _ in range(count)]
    )
    return Start(prompts, x0, eps, np.repeat([chunk.prompt for chunk in firsts], counts), family.drawing)


def keep(path: Path, cells: list[dict], what: str) -> None:
    """Writes cells as JSON that knows what it is of and whether it is whole, as `store` does with tensors."""
    text = json.dumps(cells, allow_nan=False)
    with replacing(path) as new:
        new.write_text(
            json.dumps({"what": what, "sha256": hashlib.sha256(text.encode()).hexdigest(), "cells": text})
        )


def kept(path: Path, what: str) -> list[dict] | None:
    """The cells of a file; None where there is none, or where it is not whole or of something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        text, about = found["cells"], (found["what"], found["sha256"])
        return json.loads(text) if about == (what, hashlib.sha256(text.encode()).hexdigest()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def gather(folder: Path, pairs: list[Pair], controls: list[Control]) -> list[dict]:
    """The cells of all jobs; those that were not asked for have none."""
    return [cell for file in files_of(pairs, controls).values() for cell in kept(folder / file, file) or ()]


def show(cells: list[dict]) -> None:
    """Prints CKA and the variance over seeds per comparison and step, then what predicts retention."""
    table = Table(
        title="Debiased CKA with the same inputs; on own trajectories; variance over seeds, second / first "
        "(means over blocks)"
    )
    for head in (
        "comparison",
        "step",
        "t",
        "CKA, same inputs",
        "lowest block",
        "CKA, own",
        "seed variance, own",
        "seeds' share",
    ):
        table.add_column(head)
    for row in similarity_page.by_step(cells):
        table.add_row(
            row["comparison"],
            str(row["step"] + 1),
            f"{row['t']:.0f}",
            number(row["forced"]),
            f"{row['lowest']} {number(row['lowest_cka'])}",
            number(row["own"]),
            number(row["seed_variance"]),
            " against ".join(number(row["shares"][side]) for side in (1, 0)),
        )
    Console(width=max(120, Console().width)).print(table)
    found = [c for c in cells if c["what"] == "predictor"]
    if found:
        table = Table(
            title=f"What predicts retention: {found[0]['points']} points of {found[0]['controls']} controls"
        )
        for head in (
            "evaluator",
            "predictor",
            "Spearman [95 %]",
            "one control left out",
            "cross-validated R²",
            "lowest without one",
        ):
            table.add_column(head)
        for c in found:
            left = f"{number(c['without_one']['low'])} … {number(c['without_one']['high'])}"
            table.add_row(
                c["evaluator"],
                c["predictor"],
                ranged(c["spearman"]),
                left,
                number(c["r2_cross_validated"]),
                number(c["r2_without_one"]["value"]),
            )
        Console(width=max(120, Console().width)).print(table)


def track(cells: list[dict], folder: Path, tracker: tracking.Tracker) -> None:
    """Logs every kind of cell as a table, the maps of CKA as tables blocks x steps, stitched pictures, the
    record as an artifact.
    """
    blocks = [c for c in cells if c["what"] == "block"]
    columns = [
        "comparison",
        "inputs",
        "block",
        "step",
        "cka",
        "null high",
        "standardised",
        "procrustes",
        "neighbours",
        "seed variance",
    ]
    tracker.table(
        "similarity/blocks",
        columns,
        [
            [
                c["comparison"],
                c["inputs"],
                c["block"],
                c["step"],
                c["cka"]["value"],
                c["null"]["high"],
                c["standardised"],
                c["procrustes"],
                c["neighbours"],
                c["seed_variance"]["value"],
            ]
            for c in blocks
        ],
    )
    for name, inputs in dict.fromkeys((c["comparison"], c["inputs"]) for c in blocks):
        steps, rows = similarity_page.table(blocks, name, inputs, lambda c: c["cka"]["value"])
        heads = ["block", *(f"step {s + 1}" for s in steps)]
        tracker.table(
            f"similarity/cka/{name}/{inputs}", heads, [[block, *row] for block, row in rows.items()]
        )
    found = [c for c in cells if c["what"] == "predictor"]
    if found:
        tracker.table(
            "similarity/predictors",
            ["evaluator", "predictor", "points", "spearman", "low", "high", "r2_cross_validated"],
            [
                [
                    c["evaluator"],
                    c["predictor"],
                    c["points"],
                    *c["spearman"].values(),
                    c["r2_cross_validated"],
                ]
                for c in found
            ],
        )
    for row in similarity_page.by_step(cells):
        means = {
            f"similarity/mean/{row['comparison']}/{key}/step {row['step'] + 1}": row[key]
            for key in similarity_page.INPUTS
        }
        tracker.log({name: value for name, value in means.items() if value is not None})
    for path in sorted((folder / "images/stitch").glob("*.png")):
        caption = "in columns: first, second, first's down half with second's up half, the reverse"
        tracker.image(f"similarity/stitched/{path.stem}", path, caption)
    for name in dict.fromkeys(c["control"] for c in cells if c["what"] == "direction"):
        tracker.uses(name)
    tracker.artifact(folder / "results.json", f"similarity-{folder.name}", "results")


if __name__ == "__main__":
    entry(main, Config)
