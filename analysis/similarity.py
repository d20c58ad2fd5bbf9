"""Which blocks of a student still agree with its base, and whether anything foretells what a control keeps.

    python -m analysis.similarity [config=FILE] [key=value ...]

Without arguments: tiny/base against each of its students, and all shipped controls; some minutes on a CPU.
With control=FILE: members without against themselves with that control.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis import results, wandb_log
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
from analysis.images.directions import Start, concept, directions, overlaps
from analysis.images.stitching import stitch
from analysis.measures.prediction import points, predictors
from analysis.pages.similarity import (
    BASELINE,
    INPUTS,
    by_step,
    extent,
    findings,
    foretells,
    of,
    predictor_sentences,
    table,
)
from analysis.pages.words import number, ranged
from analysis.session import Drawing, Session
from configs import ROOT, UserError, entry, list_of, releases, tracking
from configs.screen import show_table
from controls import formats, lora
from controls.lora import Control
from models import budget, forecast
from models.evaluators import chosen, load_evaluators
from models.families import Family
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
class Task:
    """A file of the run folder, and what makes its tensors."""

    file: str
    make: Callable[[], dict[str, Tensor]]
    members: frozenset[str] = frozenset()  # whose networks it needs
    controls: tuple[Control, ...] = ()  # that are put into them, one at a time
    evaluators: tuple[str, ...] | None = None  # that look at its pictures; None = it makes none
    compared: str = ""  # the member whose blocks it sums up


@dataclass
class Config(Drawing):
    name: str = "default"  # of the run folder
    source: str = ""  # the member the others are compared with; empty = the family's base
    # members compared with it; empty = all others; with control: these with it
    targets: list[str] = list_of()
    # a control file: members without it against themselves with it, instead of member against member
    control: str = ""
    scale: float = 1.0  # of that control
    controls: list[str] = list_of(
        *SHIPPED
    )  # control files whose weights and directions are compared; [] = none
    transfer: str = "runs/transfer/all"  # a run of analysis.transfer, whose retentions are to be predicted
    seeds: int = 16  # images per prompt
    seed: int = 1000  # the first image seed, and that of permutations
    # parts (each resnet, attention, transformer block), blocks (whole down, mid, up blocks)
    blocks: str = "parts"
    # CKA: an activation is averaged to grid x grid positions; 1 = over all positions; memory grows as its 4th
    # power
    grid: int = 1
    spread_grid: int = 4  # variance over seeds: of maps of so many positions per side
    neighbours: int = 10  # k of the mutual nearest neighbours
    # samples kept for intervals, permutations, neighbours, maps between blocks; CKA itself keeps none
    kept: int = 512
    draws: int = 100  # permutations of the prompts for the null
    stitch_seeds: int = 2  # images per prompt of stitched networks; 0 = no stitching
    out: str = "runs/similarity"  # the run is written to out/name


@releases
def main(cfg: Config) -> Path:
    """Compares, prints the tables and returns the path of the page."""
    session = Session("analysis.similarity", cfg, ("wandb", "out", "memory", "transfer"))
    check(cfg)
    controls = [formats.load(path) for path in cfg.controls if not cfg.control]
    control = formats.load(cfg.control) if cfg.control else None
    transfer = retentions(cfg.transfer) if controls else []
    seeds = session.prompts().numbers(cfg.seeds, cfg.seed)
    pairs, measure = pairs_of(cfg, session.family, control), measure_of(cfg)
    sampling, measuring = tasks_of(session, pairs, controls, seeds, measure)
    if cfg.dry_run:
        return plan(session, pairs, controls, len(seeds), measure, in_turn(sampling) + in_turn(measuring))
    fits(session.bare, pairs, controls, cfg.blocks)
    session.claim()
    work(session, sampling, "sampling")
    work(session, measuring, "measuring")
    if not session.first:
        return session.folder / "report.html"
    cells = [cell for task in measuring for cell in left(session.folder, task)]
    return publish(session, cells + predicted(cells, transfer, controls, cfg.seed), control)


def firsts_of(family: Family, pairs: list[Pair], controls: list[Control]) -> list[str]:
    """The members whose own runs others are compared with."""
    return list(dict.fromkeys([*(pair.first for pair in pairs), *([family.card.base] if controls else [])]))


def tasks_of(
    session: Session, pairs: list[Pair], controls: list[Control], seeds: list[int], measure: Measure
) -> tuple[list[Task], list[Task]]:
    """What is sampled, and what is measured then."""
    family, todo = session.family, chunks(session.cfg.prompts, seeds, session.family.drawing.size)
    sampling = walks(family, firsts_of(family, pairs, controls), todo)
    return sampling, measurements(session, pairs, controls, todo, measure)


def plan(
    session: Session,
    pairs: list[Pair],
    controls: list[Control],
    images: int,
    measure: Measure,
    tasks: list[Task],
) -> Path:
    """Says what will be compared, and what that takes."""
    family = session.family
    print(f"{len(pairs)} pairs, {images} images each; the directions of {len(controls)} controls come on top")
    calls = nfe(family, pairs, firsts_of(family, pairs, controls), images)
    names = chosen(family.card) if session.cfg.stitch_seeds else ()
    session.say(calls, names, lambda: moments(session.cfg, family, measure, tasks))
    return session.folder


def predicted(cells: list[dict], transfer: list[dict], controls: list[Control], seed: int) -> list[dict]:
    """Retentions beside what may foretell them, and how well that does."""
    concepts = {control.card.name: concept(control.card) for control in controls}
    beside = []
    for evaluator, rows in points(cells, transfer, concepts).items():
        beside += [{"what": "point", "evaluator": evaluator, **row} for row in rows]
        beside += predictors(rows, evaluator, seed=seed)
    return beside


def publish(session: Session, cells: list[dict], control: Control | None) -> Path:
    """The record, its page, its tables."""
    show(cells)
    says = (predictor_sentences(cells) or findings(cells))[0]
    group = control.card.name if control else session.family.card.name
    return session.publish(session.record(cells=cells), says, track, group)


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
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
    targets = cfg.targets or [name for name in family.card.usual if name != source]
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
            f"no {path}, so nothing to foretell; python -m analysis.transfer "
            f"config=configs/transfer/all.yaml makes it"
        )
        return []
    cells = results.loaded(Path(folder), "analysis.transfer")["cells"]
    results.check(cells, [RETENTION], f"{path}: cells")
    return cells


def work(session: Session, tasks: list[Task], label: str) -> None:
    """Makes the files that are not there yet, this process its share of them, and waits for the others.

    The text encoders go before the first network comes, a network goes when no later task needs it.
    """
    family, folder, prompts = session.family, session.folder, session.cfg.prompts
    lost = store.missing(folder, [task.file for task in tasks])
    mine = in_turn(session.share([task for task in tasks if task.file in lost]))
    for text in prompts if mine else ():
        family.encode([text])  # by itself, as chunks ask for it: a batch of texts rounds in another way
    if mine:
        family.encode_all(prompts)
    for k, task in enumerate(tqdm(mine, label, unit="task", disable=not session.first)):
        family.keep(frozenset().union(*(later.members for later in mine[k:])))
        store.write(folder / task.file, task.make(), task.file)
    session.accelerator.wait_for_everyone()


def in_turn(tasks: list[Task]) -> list[Task]:
    """Jobs by the networks that they need, those with few first."""
    return sorted(tasks, key=lambda task: (len(task.members), sorted(task.members)))


def moments(cfg: Config, family: Family, measure: Measure, tasks: Sequence[Task]) -> Iterator[Moment]:
    """What is held together in each task; in those that compare, on a CPU, with the sums over activations."""
    held, images = set(), max(cfg.seeds, len(cfg.prompts) * max(cfg.stitch_seeds, PROMPT_SEEDS))
    for k, task in enumerate(tasks):
        held = held & set().union(*(later.members for later in tasks[k:])) | task.members
        aside = {"sums over activations": sums(family, task.compared, measure)} if task.compared else {}
        controls = [control.tensors for control in task.controls]
        for moment in forecast.drawing(
            family, [(held, {name}) for name in task.members], images, controls, task.evaluators
        ):
            # not yet while texts are encoded and networks packed
            summing = family.device.type == "cpu" and "draw" in moment.when
            yield Moment(moment.when, moment.held | (aside if summing else {}))


def walks(family: Family, members: list[str], todo: list[Chunk]) -> list[Task]:
    """The own runs of the members with which others are compared."""
    return [
        Task(walked(name, chunk), partial(walk, family, name, chunk), frozenset([name]))
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
    session: Session, pairs: list[Pair], controls: list[Control], todo: list[Chunk], measure: Measure
) -> list[Task]:
    """Comparisons, stitched networks, controls: a task and a file of cells each, in the record's order."""
    family, folder, starts = session.family, session.folder, []

    def comparison(pair: Pair) -> list[dict]:
        def walked_by_first(chunk: Chunk) -> dict[str, Tensor]:
            return store.load(folder / walked(pair.first, chunk), walked(pair.first, chunk))

        return compare(family, pair, todo, measure, walked_by_first, not session.first)

    def direction(control: Control) -> list[dict]:
        starts[:] = starts or [ground(family, todo, folder)]
        return directions(family, control, starts[0])

    def task(name: str, members: Iterable[str], make: Callable, *args, **about) -> Task:
        return Task(f"cells/{name}.safetensors", partial(packed, make, *args), frozenset(members), **about)

    tasks = []
    for pair in pairs:
        used = (pair.control,) if pair.control else ()
        about = {"controls": used, "compared": pair.second}
        tasks.append(task(f"compare/{pair.file}", {pair.first, pair.second}, comparison, pair, **about))
    for pair in pairs if session.cfg.stitch_seeds else ():
        if not pair.control:
            looking = {"evaluators": tuple(chosen(family.card))}
            members = {pair.first, pair.second}
            tasks.append(task(f"stitch/{pair.file}", members, stitches, session, todo, pair, **looking))
    for control in controls:
        about = {"controls": (control,)}
        tasks.append(task(f"control/{control.card.name}", family.card.members, direction, control, **about))
    return tasks + ([task("overlap", (), overlaps, controls)] if controls else [])


def stitches(session: Session, todo: list[Chunk], pair: Pair) -> list[dict]:
    """What stitched networks draw, and their pictures."""
    cfg, family = session.cfg, session.family
    texts = [prompt for prompt in cfg.prompts for _ in range(cfg.stitch_seeds)]
    every = [seed for chunk in todo for seed in chunk.seeds]
    seeds = [every[p * cfg.seeds + s] for p in range(len(cfg.prompts)) for s in range(cfg.stitch_seeds)]
    evaluators = load_evaluators(family.card, family.device)
    cells, pictures = stitch(family, pair.first, pair.second, texts, seeds, evaluators)
    wandb_log.picture(pictures, session.folder / f"images/stitch/{pair.file}.png")
    return cells


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


def packed(make: Callable[..., list[dict]], *args) -> dict[str, Tensor]:
    """Cells as a tensor, the bytes of their JSON, for `store`."""
    text = json.dumps(make(*args), allow_nan=False)
    return {"json": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def left(folder: Path, task: Task) -> list[dict]:
    """The cells that a task left."""
    return json.loads(bytes(store.load(folder / task.file, task.file)["json"].numpy()))


def show(cells: list[dict]) -> None:
    """Prints CKA and the variance over seeds per comparison and step, then what might foretell retention."""
    rows = [
        {
            "comparison": row["comparison"],
            "step": str(row["step"] + 1),
            "t": f"{row['t']:.0f}",
            "CKA, same inputs": number(row["forced"]),
            "lowest block": f"{row['lowest']} {number(row['lowest_cka'])}",
            "CKA, own": number(row["own"]),
            "seed variance, own": number(row["seed_variance"]),
            "seeds' share": " against ".join(number(row["shares"][side]) for side in (1, 0)),
        }
        for row in by_step(cells)
    ]
    show_table("Debiased CKA, same inputs and own trajectories; variance over seeds, second / first", rows)
    for c in of(cells, "prediction"):
        show_predictors(c, of(cells, "predictor", evaluator=c["evaluator"]))


def show_predictors(baseline: dict, predictors: list[dict]) -> None:
    """Prints the predictors of one evaluator's retentions, and the baseline, which knows the target alone."""
    rows = [
        {
            "predictor": c["predictor"],
            "Spearman [95 %]": ranged(c["spearman"]),
            "p": number(c["p_family_wise"], 3),
            "R²": number(c["r2_cross_validated"]),
            "R² of which student": number(c["r2_which_student"]),
            "foretells": "yes" if foretells(c) else "no",
        }
        for c in predictors
    ]
    rows.append({"predictor": BASELINE, "R²": number(baseline["r2_cross_validated"])})
    title = f"Retention by {baseline['evaluator']} and what was measured beforehand: {extent(baseline)}"
    show_table(f"{title}\np is family-wise, R² is on concepts left out", rows)


def track(results: dict, folder: Path, tracker: tracking.Tracker) -> None:
    """Logs every kind of cell as a table, CKA as tables blocks x steps, stitched pictures, the record."""
    cells = results["cells"]
    blocks = of(cells, "block")
    tracker.table(
        "similarity/blocks", list(block_row(blocks[0])), [list(block_row(c).values()) for c in blocks]
    )
    for name, inputs in dict.fromkeys((c["comparison"], c["inputs"]) for c in blocks):
        steps, rows = table(blocks, name, inputs, lambda c: c["cka"]["value"])
        heads = ["block", *(f"step {s + 1}" for s in steps)]
        tracker.table(
            f"similarity/cka/{name}/{inputs}", heads, [[block, *row] for block, row in rows.items()]
        )
    if of(cells, "prediction"):
        rows = [predictor_row(c) for c in cells if c["what"] in ("prediction", "predictor")]
        tracker.table("similarity/predictors", list(rows[0]), [list(row.values()) for row in rows])
    for row in by_step(cells):
        means = {
            f"similarity/mean/{row['comparison']}/{key}/step {row['step'] + 1}": row[key] for key in INPUTS
        }
        tracker.log({name: value for name, value in means.items() if value is not None})
    for path in sorted((folder / "images/stitch").glob("*.png")):
        caption = "in columns: first, second, first's down half with second's up half, the reverse"
        tracker.image(f"similarity/stitched/{path.stem}", path, caption)
    for name in dict.fromkeys(c["control"] for c in of(cells, "direction")):
        tracker.uses(name)
    tracker.artifact(folder / "results.json", f"similarity-{folder.name}", "results")


def predictor_row(c: dict) -> dict:
    """A predictor, or all of them and the baseline, as W&B's table has it."""
    none = {"predictor": BASELINE, "spearman": dict.fromkeys(("value", "low", "high"))}
    c = {**none, "r2_which_student": c["r2_cross_validated"], **c}
    return {
        **{key: c[key] for key in ("evaluator", "predictor", "points", "controls")},
        **dict(zip(("spearman", "low", "high"), c["spearman"].values(), strict=True)),
        **{key: c[key] for key in ("p_family_wise", "r2_cross_validated", "r2_which_student")},
    }


def block_row(c: dict) -> dict:
    """A block at a step as W&B's table has it."""
    return {
        **{key: c[key] for key in ("comparison", "inputs", "block", "step")},
        "cka": c["cka"]["value"],
        "null high": c["null"]["high"],
        **{key: c[key] for key in ("standardised", "procrustes", "neighbours")},
        "seed variance": c["seed_variance"]["value"],
    }


if __name__ == "__main__":
    entry(main, Config)
