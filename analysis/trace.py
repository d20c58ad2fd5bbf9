"""What a model believes at every step: python -m analysis.trace [config=FILE] [key=value ...]

Without arguments: the base and the students of `tiny`, alone and as hybrid(1), with the smile slider; some
minutes on a CPU. Makes sheets of x_t and x0 over the steps, an animation, and a page with a scrubber;
measures when a member commits to its image, what it begins and abandons, and at which steps a control acts.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.images import sheets, store
from analysis.images.cache import networks, ways
from analysis.measures.commitment import abandoned, apart, committed, concept, followed
from analysis.pages.trace import findings, label
from analysis.pages.words import shown
from analysis.session import Drawing, Session, Way
from configs import UserError, entry, list_of, releases, tracking
from configs.screen import show_table
from controls import formats
from controls.acting import acting
from controls.lora import Control, fits
from controls.picture_grid import picture_grid
from models.evaluators import READERS, Evaluator
from models.families import Family
from models.noise import ALL, Band, Noise
from models.plans import plan_of
from models.sampler import draw_noise, sample

NAMES = {"x": "x_t", "x0": "x0"}  # what a sheet shows of a step
FREE = (
    "wandb",
    "out",
    "batch_size",
    "memory",
    "dry_run",
    "tolerance",
    "threshold",
    "concepts",
)  # what a continued run may change
CONCEPTS = [
    f"{thing}: portrait of a person, {thing} | portrait of a person, no {thing}"
    for thing in ("glasses", "beard", "hat")
]


@dataclass
class Config(Drawing):
    name: str = "default"  # of the run folder
    students: list[str] = list_of()  # members to trace beside the base; empty = all of the family
    plans: list[str] = list_of(
        "base(4)", "hybrid(1)"
    )  # besides base and student, as models/sampler.py writes them
    seeds: int = 4  # images per prompt, at least 2
    seed: int = 3000  # the first image seed
    # x0 is committed once it stays this near to its end, as a share of the distance of two seeds of the base
    tolerance: float = 0.25
    concepts: list[str] = list_of(*CONCEPTS)  # what may be abandoned, name: positive | negative
    # how far a concept's score must fall, 0 = the negative description, 1 = the positive one
    threshold: float = 0.5
    control: str = "controls/tiny/smile.safetensors"  # a control file whose effect is followed; empty = none
    scale: float = 1.0  # of the control
    above: float | None = None  # the control acts only at noise levels with sigma / alpha above this
    below: float | None = None  # and below this
    # of the family's card: clip, siglip, probe, …; empty = all that read words
    evaluators: list[str] = list_of()
    positive: str = ""  # what the control makes; empty = what its card says
    negative: str = ""  # what it departs from; empty = what its card says
    bands: list[float] = list_of(
        875.0, 625.0, 375.0
    )  # t at which runs are cut to put a control on a part of them
    shown: int = 4  # prompts whose first image is in the sheets
    out: str = "runs/trace"  # the run is written to out/name


@dataclass(frozen=True)
class Trace(Way):
    """All prompts and seeds by one plan, with the control off, on, or on in some bands of the noise level."""

    bands: tuple[int, ...] | None  # where the control is on; () = nowhere, None = everywhere

    @property
    def file(self) -> str:
        state = "on" if self.bands is None else "-".join(map(str, self.bands)) or "off"
        return f"{self.place}/{state}.safetensors"


@releases
def main(cfg: Config) -> Path:
    """Draws, measures, prints the table and returns the path of the page."""
    session = Session("analysis.trace", cfg, FREE)
    check(cfg)
    control = formats.load(cfg.control) if cfg.control else None
    pair = descriptions(cfg, control) if control else ("", "")
    seeds = session.prompts().numbers(cfg.seeds, cfg.seed)
    traces = traces_of(cfg, ways(cfg.plans, cfg.students, session.bare), control is not None)
    if cfg.dry_run:
        return plan(session, traces, control)
    check_fit(session, control)
    evaluators = session.evaluators
    session.claim()
    session.draw(traces, cfg.prompts, partial(drawn, session, control, seeds), "trace")
    if not session.first:
        return session.folder / "report.html"
    cells = cells_of(cfg, session.family.card.base, traces, evaluators, pair, session.folder)
    pictures(cfg, cells, session.folder)
    strips(session.family, seeds, cells, session.folder)
    return publish(session, cells, control)


def check_fit(session: Session, control: Control | None) -> None:
    """Raises UserError for a member that the control misfits: now, not after an hour of drawing."""
    for name in session.bare.members if control else ():
        fits(session.bare.member(name).denoiser.net, control, session.family.card.name)


def plan(session: Session, traces: list[Trace], control: Control | None) -> Path:
    """Says what is left to draw, and what that takes."""
    cfg, folder = session.cfg, session.folder
    todo = [trace for trace in traces if cfg.overwrite or not (folder / trace.file).exists()]
    images, controls = len(cfg.prompts) * cfg.seeds, [control.tensors] if control else []
    print(f"{len(todo)} ways to draw, {images} images each; drawn already: {len(traces) - len(todo)}")
    session.forecast(todo, [images] * len(todo), images, controls)
    return folder


def publish(session: Session, cells: list[dict], control: Control | None) -> Path:
    """The record, its page, its table."""
    cfg, base, name = session.cfg, session.family.card.base, control.card.name if control else ""
    results = session.record(
        evaluators=list(session.evaluators),
        base=base,
        prompts=cfg.prompts,
        shown=min(cfg.shown, len(cfg.prompts)),
        control=name,
        cells=cells,
    )
    show(cells)
    says = findings(cells, base, cfg.tolerance, "")[0]
    return session.publish(results, says, track, name or session.family.card.name)


def check(cfg: Config) -> None:
    """What can be wrong before anything is loaded."""
    if cfg.seeds < 2:
        raise UserError(f"seeds must be at least 2, to tell how far two images are apart; got {cfg.seeds}")
    if cfg.shown < 1:
        raise UserError(f"shown must be at least 1; got {cfg.shown}")
    if sorted(cfg.bands, reverse=True) != cfg.bands or not cfg.bands:
        raise UserError(f"bands must be falling noise levels t, such as 875, 625, 375; got {cfg.bands}")
    for text in cfg.concepts:
        concept(text)
    Band.of(cfg.above, cfg.below)
    cfg.plans = list(dict.fromkeys(["base", "student", *(text.replace(" ", "") for text in cfg.plans)]))


def descriptions(cfg: Config, control: Control) -> tuple[str, str]:
    """The positive and negative descriptions by which a control is measured.

    Raises UserError for a control without them.
    """
    pair = tuple(
        given or control.card.recipe.get(key, "")
        for key, given in (("positive", cfg.positive), ("negative", cfg.negative))
    )
    if not all(pair):
        raise UserError(f"{control.card.name} does not say what it makes: give positive=… and negative=…")
    return pair


def traces_of(cfg: Config, plans: list[tuple[str, str]], controlled: bool) -> list[Trace]:
    """Every plan without and with the control; on the members alone also with the control in one band, the
    first ones, the last ones.
    """
    count = len(cfg.bands) + 1
    one, first, rest = (
        [tuple(range(*ends)) for ends in zip(a, b, strict=True)]
        for a, b in (
            (range(count), range(1, count + 1)),
            ([0] * (count - 1), range(1, count)),
            (range(1, count), [count] * (count - 1)),
        )
    )
    parts = dict.fromkeys([*one, *first, *rest])
    traces = [Trace(*key, bands) for key in plans for bands in ((), None)[: 1 + controlled]]
    return traces + [
        Trace(*key, bands) for key in plans if controlled and key[1] in ("base", "student") for bands in parts
    ]


def band(cfg: Config, level: Noise) -> int:
    """The part of a run that a noise level belongs to, 0 the noisiest."""
    return sum(level.t < edge for edge in cfg.bands)


@torch.no_grad()
def drawn(session: Session, control: Control | None, seeds: list[int], trace: Trace) -> dict[str, Tensor]:
    """Features at each step, (P·S, T, d) per evaluator (of a control on some bands at the end alone).

    And the shown pictures.
    """
    cfg, family, plan = session.cfg, session.family, plan_of(session.family, trace.target)
    texts = [prompt for prompt in cfg.prompts for _ in range(cfg.seeds)]
    whole, levels = not trace.bands, [level for stage in plan.stages for level in stage.levels]
    within = Band.of(cfg.above, cfg.below)

    def holds(level: Noise) -> bool:
        return level in within and (trace.bands is None or band(cfg, level) in trace.bands)

    def seen(rows: Tensor) -> dict[str, Tensor]:
        kept = [r for r, row in enumerate(rows) if row % cfg.seeds == 0 and row // cfg.seeds < cfg.shown]
        noise = draw_noise([seeds[row] for row in rows], family.latent_shape, plan.steps, family.device)
        steps = defaultdict(list)
        for step in sample(plan, noise, family.encode([texts[row] for row in rows])):
            last = step.index + 1 == plan.steps
            if not (whole or last):
                continue
            images = family.decode(step.after if last else step.x0)
            for name, evaluator in session.evaluators.items():
                steps[name].append(torch.from_numpy(evaluator.features(images)).float())
            if whole and kept:
                steps["x0"].append(sheets.thumbs(images[kept]))
                steps["x"].append(sheets.thumbs(family.decode(step.x[kept])))
        return {name: torch.stack(parts, 1) for name, parts in steps.items()}

    everywhere = trace.bands is None and within == ALL
    acts = control if trace.bands != () else None
    with acting(plan, acts, cfg.scale, family.card.name, None if everywhere else holds) as plan:
        batches = family.drawing.of(seen, len(texts))
    names = dict.fromkeys(name for batch in batches for name in batch)
    tensors = {name: torch.cat([batch[name] for batch in batches if name in batch]) for name in names}
    tensors["t"] = torch.tensor([level.t for level in levels], dtype=torch.float64)
    return tensors


def cells_of(
    cfg: Config,
    base: str,
    traces: list[Trace],
    evaluators: dict[str, Evaluator],
    pair: tuple[str, str],
    folder: Path,
) -> list[dict]:
    """A cell per student and plan."""
    features = {trace: gather(cfg, trace, evaluators, folder) for trace in traces}
    unit = {name: apart(name, features[Trace(base, "base", ())][name]) for name in evaluators}
    plain = [f for trace, f in features.items() if trace.bands == ()]
    ends = {
        name: np.concatenate([f[name][:, :, -1].reshape(-1, f[name].shape[-1]) for f in plain])
        for name in evaluators
    }
    cells = []
    for student, plan in dict.fromkeys((trace.student, trace.plan) for trace in traces):
        own = features[Trace(student, plan, ())]
        steps = [{"t": t, "share": (i + 1) / len(own["t"])} for i, t in enumerate(own["t"].tolist())]
        cell = {
            "student": student,
            "plan": plan,
            "steps": steps,
            **committed(cfg, own, unit),
            "abandoned": abandoned(cfg, own, evaluators, ends),
            "images": len(cfg.prompts) * cfg.seeds,
            "prompts": len(cfg.prompts),
            "seeds": cfg.seeds,
        }
        with_control = {
            trace.bands: f for trace, f in features.items() if (trace.student, trace.plan) == (student, plan)
        }
        if None in with_control:
            cell["control"] = {
                name: followed(evaluator, name, with_control, pair)
                for name, evaluator in evaluators.items()
                if name in READERS
            }
        cells.append(cell)
    return cells


def gather(cfg: Config, trace: Trace, evaluators: dict, folder: Path) -> dict[str, np.ndarray]:
    """A trace's features, (P, S, T, d) per evaluator, and its noise levels t (T,)."""
    file = store.load(folder / trace.file, trace.file)
    shape = (len(cfg.prompts), cfg.seeds)
    return {
        **{name: file[name].double().numpy().reshape(*shape, *file[name].shape[1:]) for name in evaluators},
        "t": file["t"].numpy(),
    }


def pictures(cfg: Config, cells: list[dict], folder: Path) -> None:
    """Sheets as the paper's Fig 4, sprites for the scrubber, an animation, strips of what was abandoned."""
    files = {label(c): Trace(c["student"], c["plan"], ()).file for c in cells}
    rows = {name: store.load(folder / file, file) for name, file in files.items()}
    most = max(row["x0"].shape[1] for row in rows.values())
    heads = [f"{100 * (c + 1) / most:.0f} %" for c in range(most)]
    count = next(iter(rows.values()))["x0"].shape[0]
    size_px = max(64, next(iter(rows.values()))["x0"].shape[-1])
    for k in range(count):
        lines = [
            (f"{name} {NAMES[key]}", heads, placed(row[key][k], most))
            for name, row in rows.items()
            for key in NAMES
        ]
        picture_grid(lines, folder / f"images/sheet-{k}.png", size_px)
        for i, row in enumerate(rows.values()):
            sheets.sprite(row["x"][k], row["x0"][k], folder / f"images/sprite-{i}-{k}.webp")
    frames = [
        [
            [row["x0"][k][sheets.reached(row["x0"].shape[1], (c + 1) / most)] for row in rows.values()]
            for k in range(count)
        ]
        for c in range(most)
    ]
    sheets.animation(frames, folder / "images/trace.gif")


@torch.no_grad()
def strips(family: Family, seeds: list[int], cells: list[dict], folder: Path) -> None:
    """The images that abandon most, drawn again: x0 at every step, a sheet per plan that has such images."""
    for i, c in enumerate(cells):
        examples = c["abandoned"]["examples"]
        if not examples:
            continue
        target = Trace(c["student"], c["plan"], ()).target
        family.keep(networks(target, family.card))
        plan = plan_of(family, target)
        numbers, prompts = (
            [seeds[e["image"]] for e in examples],
            family.encode([e["prompt"] for e in examples]),
        )
        noise = draw_noise(numbers, family.latent_shape, plan.steps, family.device)
        steps = [sheets.thumbs(family.decode(step.x0)) for step in sample(plan, noise, prompts)]
        heads = [f"t {step['t']:.0f}" for step in c["steps"]]
        rows = [(e["concept"], heads, [images[k] for images in steps]) for k, e in enumerate(examples)]
        c["abandoned"]["picture"] = f"images/abandoned-{i}.png"
        picture_grid(rows, folder / c["abandoned"]["picture"], steps[0].shape[-1])


def placed(pictures: Tensor, columns: int) -> list[Tensor | None]:
    """The pictures of a short run where they belong among more columns: at their share of the steps."""
    row: list[Tensor | None] = [None] * columns
    for i, one in enumerate(pictures):
        row[-(-(i + 1) * columns // len(pictures)) - 1] = one
    return row


def show(cells: list[dict]) -> None:
    """Prints a row per plan."""
    rows = []
    for cell in cells:
        row = {"student": cell["student"], "plan": cell["plan"]}
        for name, when in cell["commitment"].items():
            row |= {f"commits, {name}": shown(when["share"], 2), f"t, {name}": shown(when["t"], 0)}
        row["abandons"] = shown(cell["abandoned"]["falls"], 2)
        for name, effect in cell.get("control", {}).items():
            row[f"half effect t, {name}"] = shown(effect["half"]["t"], 0)
        rows.append(row)
    show_table(
        "From when on x0 stays the final image (share of steps, t); abandoned; half of a control's effect",
        rows,
    )


def track(results: dict, folder: Path, tracker: tracking.Tracker) -> None:
    """Logs a table, the sheets and the animation, and the record as an artifact of type results."""
    cells = results["cells"]
    rows = [
        [
            c["student"],
            c["plan"],
            name,
            *when["share"].values(),
            *(when[key]["value"] for key in ("t", "left")),
        ]
        for c in cells
        for name, when in c["commitment"].items()
    ]
    tracker.table(
        "trace/commitment",
        ["student", "plan", "evaluator", "commits at share", "low", "high", "t", "left"],
        rows,
    )
    for k in range(results["shown"]):
        tracker.image(f"trace/sheet-{k}", folder / f"images/sheet-{k}.png", results["prompts"][k])
    tracker.image("trace/animation", folder / "images/trace.gif", "x0 over the steps, members in columns")
    if results["control"]:
        tracker.uses(results["control"])
    tracker.artifact(folder / "results.json", f"trace-{folder.name}", "results")


if __name__ == "__main__":
    entry(main, Config)
