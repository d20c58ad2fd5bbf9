"""The page of analysis.diversity, which needs nothing else; analysis.report writes it.

Reads files and imports no torch.
"""

import re
from html import escape
from pathlib import Path

from analysis.pages import charts
from analysis.pages.charts import figure, figures, forest, lines, scatter, section, shown, table
from analysis.pages.html import number, side
from analysis.results import is_file

# plan: what its argument is, and the argument at which the plan is the student; Fig 7 of the paper is the
# first three
SWEEPS = {
    "guided": ("guidance of the base in step 1", None),
    "hybrid": ("steps given to the base, from the first on", 0),
    "schedule": ("steps of the base's own schedule", None),
    "late": ("steps given to the base, from the last on", 0),
    "only": ("the one step given to the base", None),
    "skip": ("steps left out", 0),
    "base": ("steps of the base alone", None),
    "renoised": ("steps given to the base, with fresh noise", 0),
    "attenuate": ("share of x0 kept in step 1", 1),
    "other": ("share of x0 kept, the rest another seed's", 1),
    "blend": ("share of x0 kept, the rest the base's", 1),
    "pink": ("exponent of the initial noise", 0),
    "cads": ("noise on the prompt", 0),
    "delta": ("strength of the distillation delta", 1),
}
WORDS = {-1: "less", 0: "neither clearly less nor clearly more", 1: "more"}
NOTES = {
    "steps": "Mean distance between the x0 of different seeds at each step, over the noise level: high noise at the left.",
    "prompts": "In brackets the 95 % interval of a jackknife over seeds; for the average, Student's over prompts.",
    "located": "The base in some steps, the student in the others; the lines are the student's and the base's own diversity.",
    "recovered": "(plan − student) / (base − student): 0 is the student, 1 the base. Where no loss of the student can be told "
    "there is no such share, and the gain over the student is shown.",
    "pareto": "Filled and numbered: no other plan is better in one of the three and as good in the others. Area: evaluations per image.",
    "quality": "One image per caption, against real pictures. Milliseconds are measured from the words to the pixels, the base's steps "
    "included. Intervals: jackknife over blocks of captions.",
    "pictures": "Plans in rows, the seeds of the first prompt in columns.",
}
TRACED = ("student", "hybrid(1)")  # plans whose diversity is drawn over the steps, beside the base's


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    cells, base = results["cells"], results["base"]
    students = [s for s in dict.fromkeys(c["student"] for c in cells) if s != base]
    names = results["evaluators"]
    lead = (
        f"{len(cells)} ways to draw, {cells[0]['prompts']} prompts × {cells[0]['seeds']} seeds each, paired by seed. "
        "Diversity is the mean distance between two images of one prompt."
    )
    each = [(student, name) for student in students for name in names]
    parts = [
        charts.sentences([line for student in students for line in findings(cells, student, base)]),
        section(
            "Over the steps",
            figures(*(over_steps(cells, student, base, name) for student, name in each)),
            note=NOTES["steps"],
        ),
        section(
            "By prompt (the paper's T2)",
            *(by_prompt(cells, student, base) for student in students),
            note=NOTES["prompts"],
        ),
        section(
            "In which step? (E.1)",
            figures(*(located(cells, student, base, name) for student, name in each)),
            note=NOTES["located"],
        ),
        section(
            "What brings it back",
            figures(*(recovered(cells, student, name) for student, name in each)),
            note=NOTES["recovered"],
        ),
        section(
            "Diversity, agreement, cost",
            figures(*(pareto(results, student) for student in students)),
            note=NOTES["pareto"],
        ),
        section(
            "Sweeps (Fig 7 and beyond)",
            figures(*(sweep(cells, students, base, plan, names[0]) for plan in SWEEPS)),
        ),
        section(
            "Quality and cost (the paper's T3)",
            *(quality(cells, student, base) for student in students),
            note=NOTES["quality"],
        ),
        section("Every plan", everything(cells, names)),
        section(
            "Pictures", *(sheet(folder, student) for student in (base, *students)), note=NOTES["pictures"]
        ),
    ]
    return charts.page("Where variety is lost, and what brings it back", lead, parts, results)


def pick(cells: list[dict], student: str, plan: str) -> dict | None:
    """One cell, None where the plan was not run."""
    return next((c for c in cells if c["student"] == student and c["plan"] == plan), None)


def last(cell: dict, name: str) -> dict:
    """The diversity of a plan's finished images."""
    return cell["diversity"][name][-1]


def argument(plan: str, kind: str) -> float | None:
    """The one number of `kind(number)`."""
    found = re.fullmatch(rf"{kind}\((-?\d{{1,9}}(?:\.\d*)?)\)", plan)
    return float(found[1]) if found else None


def fronts(cells: list[dict], base: str) -> dict[str, list[str]]:
    """Per student the plans that no other one dominates: as diverse, as true to the prompt and as cheap, and
    better in one of the three.
    """
    found = {}
    for student in dict.fromkeys(c["student"] for c in cells if c["student"] != base):
        group = [c for c in cells if c["student"] in (base, student)]
        found[student] = [c["plan"] for c in group if not any(dominates(other, c) for other in group)]
    return found


def dominates(a: dict, b: dict) -> bool:
    """Whether plan a is nowhere worse than b and somewhere better."""

    def marks(c):
        return (c["diversity"]["clip"][-1]["value"], c["agreement"]["value"], -c.get("nfe", 0))

    pairs = list(zip(marks(a), marks(b), strict=True))
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def findings(cells: list[dict], student: str, base: str) -> list[str]:
    """What the numbers say of one student, in sentences."""
    own, hybrid, found = pick(cells, student, "student"), pick(cells, student, "hybrid(1)"), []
    for name, share in own["of_base"].items():
        word = WORDS[side(share, 1.0)]
        first = shown(own["of_base_first"][name], 2)
        found.append(
            f"{student}, by {name}: {word} diversity than {base}, {shown(share, 2)} of it; after the first step {first}."
        )
    if hybrid:
        shares = hybrid["recovery"]
        gains = "; ".join(
            f"by {name} {shown(gain)}, recovery {shown(shares[name], 2)}"
            for name, gain in hybrid["gain"].items()
        )
        found.append(f"{student}, hybrid(1): gains {gains}.")
    return found


def over_steps(cells: list[dict], student: str, base: str, name: str) -> str:
    """Diversity of x0 over the noise level: base, student, hybrid."""
    chosen = {base: pick(cells, base, "base"), **{plan: pick(cells, student, plan) for plan in TRACED}}
    curves = {
        label.replace("student", student): [
            (step["t"], p) for step, p in zip(cell["steps"], cell["diversity"][name], strict=True)
        ]
        for label, cell in chosen.items()
        if cell
    }
    title = f"{student}: diversity over the noise level by {name}"
    return figure(f"{student}, by {name}", lines(curves, "noise level t", "", title, falling=True))


def by_prompt(cells: list[dict], student: str, base: str) -> str:
    """The paper's T2: a row per prompt; base, student, hybrid."""
    columns = [pick(cells, base, "base"), pick(cells, student, "student"), pick(cells, student, "hybrid(1)")]
    columns = [cell for cell in columns if cell]
    name = next(iter(columns[0]["diversity"]))
    rows = []
    for i, prompt in enumerate(columns[0]["per_prompt"]):
        own = [c["per_prompt"][i] for c in columns]
        rows.append(
            [
                prompt["prompt"],
                *(text for found in own for text in (shown(found[name]), number(found["vendi"], 1))),
            ]
        )
    rows.append(
        [
            "average",
            *(text for c in columns for text in (shown(last(c, name)), number(c["vendi"][-1]["value"], 1))),
        ]
    )
    heads = [head for label in (base, student, "hybrid(1)")[: len(columns)] for head in (label, "Vendi")]
    return f"<h3>{escape(student)}</h3>" + table(
        ["prompt", *heads], rows, bold=lambda row: row[0] == "average"
    )


def located(cells: list[dict], student: str, base: str, name: str) -> str:
    """The diversity with the base in one single step, in the first ones, in the last ones."""
    plans = [c for c in cells if c["student"] == student and re.match(r"(only|hybrid|late)\(", c["plan"])]
    ends = [
        (student, last(pick(cells, student, "student"), name), 0),
        (base, last(pick(cells, base, "base"), name), 1),
    ]
    rows = [
        (c["plan"], last(c, name), 2 + ("only", "hybrid", "late").index(c["plan"].split("(")[0]))
        for c in plans
    ]
    drawn = forest(
        [*ends, *rows],
        "diversity",
        f"{student}: the base in single steps, by {name}",
        tuple(p["value"] for _, p, _ in ends),
    )
    return figure(f"{student}, by {name}", drawn) if plans else ""


def recovered(cells: list[dict], student: str, name: str) -> str:
    """The recovery of every plan of a student, or its gain where nothing is lost."""
    own = [c for c in cells if c["student"] == student and c["plan"] != "student"]
    kind = "recovery" if any(c["recovery"][name]["value"] is not None for c in own) else "gain"
    rows = sorted(
        ((c["plan"], c[kind][name], 1) for c in own if c[kind][name]["value"] is not None),
        key=lambda row: -row[1]["value"],
    )
    marks = (0.0, 1.0) if kind == "recovery" else (0.0,)
    return (
        figure(f"{student}, by {name}: {kind}", forest(rows, kind, f"{student}: {kind} by {name}", marks))
        if rows
        else ""
    )


def pareto(results: dict, student: str) -> str:
    """All plans of a student and of the base: diversity, agreement with the prompt, evaluations."""
    group = [c for c in results["cells"] if c["student"] in (results["base"], student)]
    group.sort(key=lambda c: -last(c, "clip")["value"])
    front = [c for c in group if c["plan"] in results["fronts"][student]]
    ranks = [front.index(c) + 1 if c in front else 0 for c in group]
    points = [
        (c["plan"], last(c, "clip")["value"], c["agreement"]["value"], c.get("nfe", 1), rank)
        for c, rank in zip(group, ranks, strict=True)
    ]
    drawn = figure(
        student,
        scatter(
            points, "diversity by clip", "agreement with the prompt", f"{student}: diversity and agreement"
        ),
    )
    rows = [
        [f"{rank} {name}", number(x, 3), number(y, 1), f"{cost:g}"]
        for name, x, y, cost, rank in points
        if rank
    ]
    return drawn + figure(f"{student}: the front", table(["plan", "diversity", "agreement", "nfe"], rows))


def sweep(cells: list[dict], students: list[str], base: str, kind: str, name: str) -> str:
    """Diversity over the argument of one kind of plan, a curve per student."""
    (meaning, same), curves = SWEEPS[kind], {}
    for student in (base, *students):
        own = [
            (argument(c["plan"], kind), c)
            for c in cells
            if c["student"] == student and argument(c["plan"], kind) is not None
        ]
        if own and student != base and same is not None and same not in [x for x, _ in own]:
            own.append((same, pick(cells, student, "student")))
        if len(own) > 1:
            curves[student] = [(x, last(c, name)) for x, c in sorted(own, key=lambda pair: pair[0])]
    return (
        figure(kind, lines(curves, meaning, f"diversity by {name}", f"{kind}: diversity by {name}"))
        if curves
        else ""
    )


def quality(cells: list[dict], student: str, base: str) -> str:
    """The paper's T3 for one student, with precision, recall, density and coverage."""
    group = [c for c in cells if c["student"] in (base, student) and "quality" in c]
    if not group:
        return ""
    keys = list(group[0]["quality"])

    def cost(c):
        return [f"{c['nfe']:g}", number(1000 * c["seconds"], 0)]

    rows = [[c["plan"], *(shown(c["quality"][key]) for key in keys), *cost(c)] for c in group]
    return f"<h3>{escape(student)}</h3>" + table(
        ["plan", *(key.replace("_", ", ") for key in keys), "nfe", "ms"], rows
    )


def everything(cells: list[dict], names: list[str]) -> str:
    """Every plan's diversity, share of the base's, recovery and agreement."""
    heads = [head for name in names for head in (f"by {name}", "of base", "recovery")]
    rows = [
        [
            f"{c['student']} {c['plan']}",
            *(
                text
                for name in names
                for text in (
                    shown(last(c, name)),
                    shown(c["of_base"][name], 2),
                    shown(c["recovery"][name], 2),
                )
            ),
            number(c["vendi"][-1]["value"], 1),
            shown(c["agreement"], 1),
            shown(c["agreement_gain"], 1),
        ]
        for c in cells
    ]
    return table(["plan", *heads, "Vendi", "agreement", "gain in it"], rows)


def sheet(folder: Path, student: str) -> str:
    """The sheet of a student, where there is one."""
    path = is_file(folder, f"images/{student}.png")
    return (
        f"<h3>{escape(student)}</h3>" + charts.picture(path, f"plans of {student} in rows, seeds in columns")
        if path
        else ""
    )
