"""What the page of analysis.diversity shows; diversity.html says how. Reads files and imports no torch."""

import re
from pathlib import Path

from markupsafe import Markup

from analysis.pages import charts, html, words
from analysis.pages.words import number, shown, side
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
LESS_OR_MORE = {-1: "less", 0: "neither clearly less nor clearly more", 1: "more"}
TRACED = ("student", "hybrid(1)")  # plans whose diversity is drawn over the steps, beside the base's


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    cells, base, names = results["cells"], results["base"], results["evaluators"]
    students = [student for student in dict.fromkeys(c["student"] for c in cells) if student != base]
    each = [(student, name) for student in students for name in names]
    return html.render(
        "diversity.html",
        title="Where variety is lost, and what brings it back",
        lead=f"{len(cells)} ways to draw, {words.design(cells[0])} each, paired by seed. "
        "Diversity is the mean distance between two images of one prompt.",
        results=results,
        students=students,
        findings=[line for student in students for line in findings(cells, student, base)],
        steps={f"{s}, by {name}": over_steps(cells, s, base, name) for s, name in each},
        prompts={student: by_prompt(cells, student, base) for student in students},
        located={f"{s}, by {name}": located(cells, s, base, name) for s, name in each},
        recovered=dict(recovered(cells, s, name) for s, name in each),
        fronts={student: front(results, student) for student in students},
        sweeps={kind: sweep(cells, students, base, kind, names[0]) for kind in SWEEPS},
        qualities={s: [c for c in cells if c["student"] in (base, s) and "quality" in c] for s in students},
        everything=everything(cells, names),
        sheets={s: path for s in (base, *students) if (path := is_file(folder, f"images/{s}.png"))},
    )


def pick(cells: list[dict], student: str, plan: str) -> dict | None:
    """One cell, None where the plan was not run."""
    return next((c for c in cells if c["student"] == student and c["plan"] == plan), None)


def last(cell: dict, name: str) -> dict:
    """The diversity of a plan's finished images."""
    return cell["diversity"][name][-1]


def argument(plan: str, kind: str) -> float | None:
    """The one number of `kind(number)`."""
    match = re.fullmatch(rf"{kind}\((-?\d{{1,9}}(?:\.\d*)?)\)", plan)
    return float(match[1]) if match else None


def fronts(cells: list[dict], base: str) -> dict[str, list[str]]:
    """Per student the plans that no other one dominates in diversity, agreement with the prompt and cost."""
    plans = {}
    for student in dict.fromkeys(c["student"] for c in cells if c["student"] != base):
        group = [c for c in cells if c["student"] in (base, student)]
        plans[student] = [c["plan"] for c in group if not any(dominates(other, c) for other in group)]
    return plans


def dominates(a: dict, b: dict) -> bool:
    """Whether plan a is nowhere worse than b and somewhere better."""
    marks = [(last(c, "clip")["value"], c["agreement"]["value"], -c.get("nfe", 0)) for c in (a, b)]
    pairs = list(zip(*marks, strict=True))
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def findings(cells: list[dict], student: str, base: str) -> list[str]:
    """What the numbers say of one student, in sentences."""
    alone, hybrid, lines = pick(cells, student, "student"), pick(cells, student, "hybrid(1)"), []
    for name, share in alone["of_base"].items():
        word, first = LESS_OR_MORE[side(share, 1.0)], shown(alone["of_base_first"][name], 2)
        lines.append(
            f"{student}, by {name}: {word} diversity than {base}, {shown(share, 2)} of it; after the first "
            f"step {first}."
        )
    if hybrid:
        gains = "; ".join(
            f"by {name} {shown(gain)}, recovery {shown(hybrid['recovery'][name], 2)}"
            for name, gain in hybrid["gain"].items()
        )
        lines.append(f"{student}, hybrid(1): gains {gains}.")
    return lines


def over_steps(cells: list[dict], student: str, base: str, name: str) -> Markup | str:
    """Diversity of x0 over the noise level: base, student, hybrid."""
    chosen = {base: pick(cells, base, "base"), **{plan: pick(cells, student, plan) for plan in TRACED}}
    lines = {
        label.replace("student", student): [
            (step["t"], interval)
            for step, interval in zip(cell["steps"], cell["diversity"][name], strict=True)
        ]
        for label, cell in chosen.items()
        if cell
    }
    title = f"{student}: diversity over the noise level by {name}"
    return charts.curves(lines, "noise level t", title, falling=True)


def by_prompt(cells: list[dict], student: str, base: str) -> tuple[list[str], list[list[str]]]:
    """The paper's T2: heads and a row per prompt; base, student, hybrid."""
    plans = {base: (base, "base"), student: (student, "student"), "hybrid(1)": (student, "hybrid(1)")}
    columns = {label: cell for label, of in plans.items() if (cell := pick(cells, *of))}
    name = next(iter(next(iter(columns.values()))["diversity"]))
    rows = []
    for i, row in enumerate(next(iter(columns.values()))["per_prompt"]):
        each = [cell["per_prompt"][i] for cell in columns.values()]
        rows.append([row["prompt"], *flat((shown(part[name]), number(part["vendi"], 1)) for part in each)])
    means = ((shown(last(c, name)), number(c["vendi"][-1]["value"], 1)) for c in columns.values())
    return ["prompt", *flat((label, "Vendi") for label in columns)], [*rows, ["average", *flat(means)]]


def flat(parts) -> list:
    return [item for part in parts for item in part]


def located(cells: list[dict], student: str, base: str, name: str) -> Markup | str:
    """The diversity with the base in one single step, in the first ones, in the last ones."""
    colours = {"only": "c2", "hybrid": "c3", "late": "c4"}
    plans = [(c, c["plan"].partition("(")[0]) for c in cells if c["student"] == student]
    rows = [(c["plan"], [{colours[kind]: last(c, name)}], "") for c, kind in plans if kind in colours]
    ends = {student: last(pick(cells, student, "student"), name), base: last(pick(cells, base, "base"), name)}
    marks = tuple(interval["value"] for interval in ends.values())
    both = [(label, [{f"c{k}": interval}], "") for k, (label, interval) in enumerate(ends.items())]
    title = f"{student}: the base in single steps, by {name}"
    return charts.forest([*both, *rows], "diversity", title, marks) if rows else ""


def recovered(cells: list[dict], student: str, name: str) -> tuple[str, Markup | str]:
    """Caption and chart: the recovery of every plan of a student, or its gain where nothing is lost."""
    plans = [c for c in cells if c["student"] == student and c["plan"] != "student"]
    kind = "recovery" if any(c["recovery"][name]["value"] is not None for c in plans) else "gain"
    known = [(c["plan"], c[kind][name]) for c in plans if c[kind][name]["value"] is not None]
    rows = [
        (plan, [{"c1": interval}], "") for plan, interval in sorted(known, key=lambda row: -row[1]["value"])
    ]
    marks = (0.0, 1.0) if kind == "recovery" else (0.0,)
    return f"{student}, by {name}: {kind}", charts.forest(rows, kind, f"{student}: {kind} by {name}", marks)


def front(results: dict, student: str) -> tuple[Markup, list[list[str]]]:
    """All plans of a student and the base by diversity and agreement, and the rows of the front."""
    group = [c for c in results["cells"] if c["student"] in (results["base"], student)]
    group.sort(key=lambda c: -last(c, "clip")["value"])
    best = [c for c in group if c["plan"] in results["fronts"][student]]
    largest = max(c.get("nfe", 1) for c in group)
    points, rows = [], []
    for cell in group:
        x, y, nfe = last(cell, "clip")["value"], cell["agreement"]["value"], cell.get("nfe", 1)
        point = {"x": x, "y": y, "says": cell["plan"], "r": 3 + 7 * (nfe / largest) ** 0.5}
        if cell in best:
            rank = str(best.index(cell) + 1)
            rows.append([f"{rank} {cell['plan']}", number(x, 3), number(y, 1), f"{nfe:g}"])
            points.append({**point, "css": "c1", "label": rank})
        else:
            points.insert(0, {**point, "css": "c0", "opacity": 0.12})
    title = f"{student}: diversity and agreement"
    return charts.scatter(points, "diversity by clip", "agreement with the prompt", title), rows


def sweep(cells: list[dict], students: list[str], base: str, kind: str, name: str) -> Markup | str:
    """Diversity over the argument of one kind of plan, a curve per student."""
    (meaning, same), lines = SWEEPS[kind], {}
    for student in (base, *students):
        runs = {argument(c["plan"], kind): c for c in cells if c["student"] == student}
        runs.pop(None, None)
        if runs and student != base and same is not None:
            runs.setdefault(same, pick(cells, student, "student"))
        if len(runs) > 1:
            lines[student] = [(x, last(runs[x], name)) for x in sorted(runs)]
    return charts.curves(lines, meaning, f"{kind}: diversity by {name}", f"diversity by {name}")


def everything(cells: list[dict], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every plan's diversity, share of the base's, recovery and agreement."""
    rows = []
    for c in cells:
        by = flat((shown(last(c, n)), shown(c["of_base"][n], 2), shown(c["recovery"][n], 2)) for n in names)
        ends = (number(c["vendi"][-1]["value"], 1), shown(c["agreement"], 1), shown(c["agreement_gain"], 1))
        rows.append([f"{c['student']} {c['plan']}", *by, *ends])
    heads = flat((f"by {name}", "of base", "recovery") for name in names)
    return ["plan", *heads, "Vendi", "agreement", "gain in it"], rows
