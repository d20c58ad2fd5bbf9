"""How much variety one plan has beside another: words with as much power for "as much" as for "less".

Variety is an array (P,), a number per prompt, of the same prompts and seeds for all plans: what is compared
are differences within prompts.
"""

from collections.abc import Sequence

import numpy as np

from controls import intervals
from controls.intervals import LEVEL

MARGIN = 0.1  # of the base's variety: a change that is shown to be smaller is none
MOST = 10_000  # prompts; where more would be needed, nothing will tell


def tests(own: np.ndarray, other: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """p that two plans differ, and p that they do not: that the means differ by less than MARGIN of the
    base's (two one-sided tests); (P,) each.
    """
    return {
        "difference": intervals.difference(own, other),
        "equivalence": intervals.equivalence(base + own - other, base, (1 - MARGIN, 1 + MARGIN)),
    }


def verdict(change: float, p: dict[str, float]) -> str:
    """One word for a change, by the p of `tests`, corrected for how many were made; the first that holds.

    | word      | when                                                      |
    |-----------|-----------------------------------------------------------|
    | same      | p <= .05 that it is smaller than MARGIN of the base's      |
    | less      | p <= .05 that there is one, and it is below 0             |
    | more      | p <= .05 that there is one, and it is above 0             |
    | undecided | otherwise: more prompts would help                        |
    """
    shown = {claim: value <= 1 - LEVEL + 1e-12 for claim, value in p.items()}
    if shown["equivalence"]:
        return "same"
    if shown["difference"]:
        return "more" if change > 0 else "less"
    return "undecided"


def judged(claims: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[dict]:
    """The verdicts of one table: for each (own, other, base) its word, its corrected p and, where it is
    undecided, how many prompts would tell. Each kind of test is corrected over the table (Holm).
    """
    tested = [tests(*claim) for claim in claims]
    corrected = {kind: intervals.holm([p[kind] for p in tested]) for kind in ("difference", "equivalence")}
    words = []
    for k, claim in enumerate(claims):
        p = {kind: values[k] for kind, values in corrected.items()}
        word = verdict(float(np.mean(claim[0] - claim[1])), p)
        would = needed(*claim, (1 - LEVEL) / len(claims)) if word == "undecided" else None
        words.append({"verdict": word, "p": p, "prompts_needed": would})
    return words


def needed(own: np.ndarray, other: np.ndarray, base: np.ndarray, error: float) -> int | None:
    """How many prompts like these would tell, if means and spreads stay: the fewest with which the interval
    leaves 0 or fits into the margin. None where no number does.
    """
    change, prompts = own - other, len(own)
    if prompts < 2:
        return None
    middle, margin = abs(change.mean()), MARGIN * base.mean()
    if not (room := max(middle, margin - middle)) > 0:
        return None
    n = prompts
    while n <= MOST:
        half = intervals.quantile(1 - error, n - 1) * change.std(ddof=1) / np.sqrt(n)
        if half < room:
            return max(n, prompts + 1)
        n = max(n + 1, int(n * min(4.0, (half / room) ** 2)))
    return None


def shares(base: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> dict[str, dict]:
    """What a student's loss is made of: guidance, which the base loses by itself at the guidance that was
    distilled in, and distillation, what the student loses beside that; (P,) each.

    As shares of the whole loss with Fieller's intervals; all None where no loss is shown.
    """
    return {
        "guidance": part(base, teacher, base, student),
        "distillation": part(teacher, student, base, student),
    }


def part(high: np.ndarray, low: np.ndarray, base: np.ndarray, student: np.ndarray) -> dict:
    """(high - low) / (base - student), where something is lost; (P,) each."""
    lost = intervals.mean(base - student)
    if lost["low"] is None or lost["low"] <= 0:
        return dict(intervals.UNDEFINED)
    return intervals.ratio(high - low, base - student)
