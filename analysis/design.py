"""What a measurement will cost and what it can see, said before it starts."""

import time
from collections import Counter
from pathlib import Path

import torch

from analysis import report
from analysis.draw import Drawings, Job
from analysis.measure import Subject
from configs import UserError
from controls import stats
from models import budget

# of a retention, between prompts and between seeds: root mean squares over all shipped controls on the embedded family (LOG.md)
TYPICAL = {"prompts": 0.07, "seeds": 0.33}


def show(drawings: Drawings, subjects: list[Subject], targets: list[str], jobs: list[Job], folder: Path) -> None:
    """Prints images, network evaluations, minutes and the smallest difference of a retention from 1 that the design tells from none."""
    todo, each, prompts, seeds = drawings.missing(jobs), len(drawings.numbers), len(drawings.texts), drawings.seeds
    calls = sum(evaluations(drawings, job.target) for job in todo) * each
    spread, whence = known(folder)
    print(f"{len(subjects)} controls on {len(targets)} targets, {prompts} prompts x {seeds} seeds")
    print(f"to draw: {len(todo) * each} images, {calls} network evaluations; known already: the rest")
    members, calls = list(dict.fromkeys(target.partition(":")[0] for target in targets)), Counter()
    for job in todo:
        calls[job.target.partition(":")[0]] += evaluations(drawings, job.target) * each
    print(memory(drawings, members))
    print(f"time: {minutes(drawings, todo) if here(drawings, members) else budget.duration(drawings.family.card, calls, *where(drawings))}")
    for n, k in ((prompts, seeds), (2 * prompts, seeds), (prompts, 2 * seeds)):
        least = stats.detectable(n, k, spread)
        print(f"{n} prompts x {k} seeds: sees a retention that differs from 1 by {least:.2f}, in 80 % of cases ({whence})")


def where(drawings: Drawings) -> tuple[torch.device, torch.dtype]:
    return drawings.family.device, drawings.family.dtype


def here(drawings: Drawings, members: list[str]) -> bool:
    """Whether all weights are on disk, so that a batch can be timed."""
    try:
        return not sum(need.download for need in budget.needs(drawings.family.card, members, drawings.family.dtype))
    except UserError:
        return False


def memory(drawings: Drawings, members: list[str]) -> str:
    """What is to be downloaded and held; words where not even the configs can be had."""
    try:
        return budget.table(budget.needs(drawings.family.card, members, drawings.family.dtype))
    except UserError as error:
        return f"download and memory: unknown ({error})"


def evaluations(drawings: Drawings, target: str) -> int:
    """Network evaluations of one image, from the family's card alone; of a plan with the base, those of its student."""
    member, _, plan = target.partition(":")
    its = drawings.family.card.members[member]
    if plan.startswith("few("):
        return int(plan[4:-1])
    return (len(its.timesteps) or its.steps) * (2 if its.guidance is not None else 1)


def known(folder: Path) -> tuple[dict, str]:
    """How far retentions vary: as in the run that stands in the folder, else as is typical."""
    try:
        spreads = [cell["spread"] for cell in report.read(folder)["cells"] if cell.get("spread") and not cell["reference"]]
    except UserError:
        spreads = []
    if not spreads:
        return TYPICAL, "spread as on the embedded family"
    typical = lambda key: (sum(spread[key] ** 2 for spread in spreads) / len(spreads)) ** 0.5  # noqa: E731
    return {key: typical(key) for key in TYPICAL}, f"spread as in {folder}"


def minutes(drawings: Drawings, todo: list[Job]) -> str:
    """How long the drawing will take, from one timed batch; words where the networks are not at hand."""
    if not todo:
        return "nothing to draw"
    few = min(todo, key=lambda job: evaluations(drawings, job.target))
    numbers, drawings.numbers = drawings.numbers, drawings.numbers[: drawings.batch]
    try:
        drawings.latents(few)
        start = time.time()
        drawings.latents(few)
        rate = (time.time() - start) / len(drawings.numbers) / evaluations(drawings, few.target)
    except UserError as error:
        return f"unknown, for the networks are not at hand ({error})"
    finally:
        drawings.numbers = numbers
    calls = sum(evaluations(drawings, job.target) for job in todo) * len(numbers)
    return f"{calls * rate / 60:.1f} minutes on one such process, at {1000 * rate:.1f} ms per evaluation"
