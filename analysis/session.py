"""What a measurement will cost and what it can see, said before it starts."""

from collections.abc import Sequence
from pathlib import Path

from analysis import results
from analysis.images.cache import Drawings, Job, in_memory, in_turn
from analysis.images.readings import Subject
from analysis.pages.words import led
from configs import UserError
from controls import retention as stats
from models import budget, forecast

# of a retention, between prompts and between seeds: root mean squares over all shipped controls on the
# embedded family (LOG.md)
TYPICAL = {"prompts": 0.07, "seeds": 0.33}


def show(
    drawings: Drawings,
    subjects: list[Subject],
    targets: list[str],
    jobs: list[Job],
    evaluators: Sequence[str],
    folder: Path,
) -> None:
    """Prints the smallest difference of a retention from 1 that the design tells from none, then images,
    network evaluations, minutes.

    Then memory at its fullest. The drawings' family is bare: it needs configs and no weights, and UserError
    says which one cannot be had.
    """
    todo, family, each, prompts, seeds = (
        drawings.missing(jobs),
        drawings.family,
        len(drawings.numbers),
        len(drawings.texts),
        drawings.seeds,
    )
    spread, whence = known(folder)
    print(f"{len(subjects)} controls on {len(targets)} targets, {prompts} prompts x {seeds} seeds")
    for n, k in ((prompts, seeds), (2 * prompts, seeds), (prompts, 2 * seeds)):
        least = stats.detectable(n, k, spread)
        print(
            f"{n} prompts x {k} seeds: sees a retention that differs from 1 by {least:.2f}, in 80 % of "
            f"cases ({whence})"
        )
    calls = budget.nfe_by_member((drawings.plan(job.target), each) for job in todo)
    print(f"to draw: {len(todo) * each} images, {calls.total()} network evaluations; known already: the rest")
    if not todo:
        print("nothing to draw")
        return
    print(budget.forecast(family.card, calls, family.dtype, family.device, evaluators, family.quantize))
    controls, turns = (
        [control.tensors for control in drawings.controls.values()],
        in_memory(in_turn(todo, family.card), family.card),
    )
    print(forecast.said(lambda: forecast.drawing(family, turns, each, controls, evaluators, apart=True)))


def known(folder: Path) -> tuple[dict, str]:
    """How far retentions vary: as in the run that stands in the folder, else as is typical."""
    try:
        cells = map(led, results.read(folder, "analysis.transfer")["cells"])
        spreads = [cell["spread"] for cell in cells if cell.get("spread") and not cell.get("reference")]
    except UserError:
        spreads = []
    if not spreads:
        return TYPICAL, "spread as on the embedded family"

    def typical(key):
        return (sum(spread[key] ** 2 for spread in spreads) / len(spreads)) ** 0.5

    return {key: typical(key) for key in TYPICAL}, f"spread as in {folder}"
