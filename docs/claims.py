"""The paper's claims beside what was measured on the embedded family, from records: for docs/make.py."""

from collections import Counter
from collections.abc import Callable

from analysis.pages.words import WORDS, number, ranged

FULL, MEMBERS = "configs/diversity/full.yaml", "configs/diversity/members.yaml"
DIVERSITY, ALL = f"`python -m analysis.diversity config={MEMBERS}`", "configs/transfer/all.yaml"


def claims(record: Callable[[str], dict]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a claim, the paper's number on SDXL, ours on each student, the command.

    record: its name to what it holds.
    """
    drawn = {(c["student"], c["plan"]): c for c in record("diversity-members")["cells"]}
    students = [student for student, plan in drawn if plan == "student"]
    traced = {(c["student"], c["plan"]): c for c in record("trace-default")["cells"]}
    alone, hybrid, late = (
        {student: drawn[student, plan] for student in students}
        for plan in ("student", "hybrid(1)", "late(1)")
    )
    settled = {student: share(traced[student, "student"]) for student in students}
    of_controls = verdicts(record("transfer-all")["cells"])
    table = [
        (
            "controls of the base survive on it (T1)",
            "14 to 39 % change on students, 20 to 35 on the base",
            {student: of_controls[student] for student in students},
            f"`python -m analysis.transfer config={ALL}`",
        ),
        (
            "it is less varied than the base (T2)",
            ".78 of it on DMD2",
            {student: said(cell, "base", "of_base") for student, cell in alone.items()},
            DIVERSITY,
        ),
        (
            "the base in the first step brings variety back (T2)",
            "1.18 of the loss",
            {student: said(cell, "student", "recovery", "gain") for student, cell in hybrid.items()},
            DIVERSITY,
        ),
        (
            "the base in the last step does not (E.1)",
            "−.14 of the loss",
            {student: said(cell, "student", "recovery", "gain") for student, cell in late.items()},
            DIVERSITY,
        ),
        (
            "at its own cost (T3)",
            ".64 s both",
            {s: f"{hybrid[s]['nfe']:g} evaluations of {alone[s]['nfe']:g}" for s in students},
            DIVERSITY,
        ),
        (
            "with better pictures (T3, Fréchet distance)",
            "15.5 → 10.8",
            {s: " → ".join(frechet(cell[s]) for cell in (alone, hybrid)) for s in students},
            DIVERSITY,
        ),
        (
            "it settles in its first step, the base after 30 % (Fig 5)",
            "25 % of four",
            {student: f"{settled[student]} (base {share(traced['base', 'base'])})" for student in students},
            "`python -m analysis.trace`",
        ),
    ]
    rows = [[claim, paper, *(ours[s] for s in students), command] for claim, paper, ours, command in table]
    return ["of a distilled student: claim", "paper, SDXL", *students, "command"], rows


def said(cell: dict, beside: str, key: str, other: str = "") -> str:
    """A number by CLIP with its verdict, then by the probe; where there is none, the other one."""
    words = []
    for name in ("clip", "probe"):
        value = cell[key][name]
        if value["value"] is None:
            value = cell[other][name]
        shown = ranged(value) if name == "clip" else f"probe {number(value['value'])}"
        words.append(f"{shown} {cell['claims'][beside][name]['verdict']}")
    return "<br>".join(words)


def verdicts(cells: list[dict]) -> dict[str, str]:
    """How many controls of the base were kept, weaker … on each member, by the first evaluator."""
    counts: dict[str, Counter] = {}
    for cell in cells:
        if cell["source"] == "tiny/base" != cell["target"] and not cell["reference"]:
            reading = next(iter(cell["readings"].values()))
            counts.setdefault(cell["target"].partition("/")[2], Counter())[reading["verdict"]] += 1
    return {
        target: ", ".join(f"{of[word]} {word}" for word in WORDS if of[word]) for target, of in counts.items()
    }


def frechet(cell: dict) -> str:
    return number(cell["quality"]["frechet_clip"]["value"], 3)


def share(cell: dict) -> str:
    """Of the steps, after which x0 stays near the final image."""
    return ranged(next(iter(cell["commitment"].values()))["share"])
