"""What the page of analysis.diversity shows; diversity.html says how. Reads files and imports no torch."""

import re
from pathlib import Path

from markupsafe import Markup

from analysis.pages import charts, html, words
from analysis.pages.words import number, shown
from analysis.results import is_file

# plan: what its argument x is, an argument at which it is another plan, and that plan; Fig 7 of the paper is
# the first three
SWEEPS = {
    "hybrid(1,x)": ("guidance of the base in step 1", 1, "hybrid(1)"),
    "hybrid(x)": ("steps given to the base, from the first on", 0, "student"),
    "schedule(x)": ("steps of the base's own schedule", None, ""),
    "late(x)": ("steps given to the base, from the last on", 0, "student"),
    "only(x)": ("the one step given to the base", None, ""),
    "skip(x)": ("steps left out", 0, "student"),
    "base(x)": ("steps of the base alone", None, ""),
    "alike(x)": ("share of the images with one first x0 in common", 0, "student"),
    "unprompted(x)": ("steps without the prompt, from the first on", 0, "student"),
    "adapted(x)": ("scale of the control", 0, "student"),
    "attenuate(x)": ("share of x0 kept in step 1", 1, "student"),
    "other(x)": ("share of x0 kept, the rest another seed's", 1, "student"),
    "blend(x)": ("share of x0 kept, the rest the base's", 1, "student"),
    "pink(x)": ("exponent of the initial noise", 0, "student"),
    "cads(x)": ("noise on the prompt", 0, "student"),
    "delta(x)": ("strength of the distillation delta", 1, "student"),
}
WORDS = {"less": "less than", "more": "more than", "same": "as much as"}  # verdicts, before whom
OBEYS = 0.95  # of the base's agreement with the prompt, below which variety is no gain
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
        findings=[line for student in students for line in findings(cells, student, base, names)],
        steps={f"{s}, by {name}": over_steps(cells, s, base, name) for s, name in each},
        losses=losses(cells, students, names),
        guided={f"by {name}": over_guidance(cells, students, base, name) for name in names},
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
    """The number that stands for the x of a kind."""
    match = re.fullmatch(re.escape(kind).replace("x", r"(-?\d{1,9}(?:\.\d*)?)"), plan)
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
    marks = [(last(c, "clip")["value"], c["agreement"]["value"], -c["nfe"]) for c in (a, b)]
    pairs = list(zip(*marks, strict=True))
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def findings(cells: list[dict], student: str, base: str, names: list[str]) -> list[str]:
    """What the numbers say of one student by these evaluators, in sentences."""
    alone, lines = pick(cells, student, "student"), []
    for name in names:
        share = shown(alone["of_base"][name], 2)
        lines.append(
            f"{student}, by {name}: {claim(alone, 'base', name)} {base}, {share} of its diversity; "
            f"after the first step {shown(alone['of_base_first'][name], 2)}."
        )
        part = (alone.get("shares") or {}).get(name)
        if part and part["guidance"]["value"] is not None:
            lines.append(
                f"Of {student}'s loss by {name} {shown(part['guidance'], 2)} is guidance that was "
                f"distilled in ({base} at {alone['teacher_guidance']:g}), {shown(part['distillation'], 2)} "
                f"distillation."
            )
    for cell in filter(None, (pick(cells, student, "hybrid(1)"), best(cells, student))):
        gains = "; ".join(
            f"by {name} {claim(cell, 'student', name)} {student}, {shown(cell['gain'][name])}, "
            f"{shown(cell['recovery'][name], 2)} of the loss"
            for name in names
        )
        most = cell is best(cells, student)
        why = " (brings most back at the student's cost)" if most else ""
        lines.append(f"{student}, {cell['plan']}{why}: {gains}.")
    return list(dict.fromkeys(lines))


def best(cells: list[dict], student: str) -> dict | None:
    """What brings most back at the student's cost, among what asks the student at all, is shown to bring some
    and obeys the prompts by 95 % of what the base does; None where nothing does.
    """
    alone = pick(cells, student, "student")
    name = next(iter(alone["diversity"]))
    able = [
        c
        for c in cells
        if c["student"] == student
        and c["nfe"] <= alone["nfe"]
        and c["plan"] != "student"
        and c["nfe_student"]
        and c["claims"]["student"][name]["verdict"] == "more"
        and (c["agreement_of_base"]["value"] or 0) >= OBEYS
    ]
    return max(able, key=lambda c: last(c, name)["value"], default=None)


def said(cell: dict, name: str, beside: str = "base") -> str:
    """The verdict on a plan beside the base or its student; none on itself."""
    return cell.get("claims", {}).get(beside, {}).get(name, {}).get("verdict", "")


def claim(cell: dict, beside: str, name: str) -> str:
    """A verdict in words that go before what a plan is compared with."""
    its = cell["claims"][beside][name]
    if its["verdict"] in WORDS:
        return WORDS[its["verdict"]]
    return f"undecided ({prompts_needed(its)}) beside"


def prompts_needed(its: dict) -> str:
    """How many prompts would tell."""
    if its["prompts_needed"] is None:
        return "no number of prompts would tell"
    return f"about {its['prompts_needed']} prompts would tell"


def losses(cells: list[dict], students: list[str], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """What each student has of the base's variety by each evaluator, and what its loss is made of."""
    rows = []
    for alone, name in ((pick(cells, student, "student"), name) for student in students for name in names):
        part = (alone.get("shares") or {}).get(name)
        made = [shown(part[key], 2) if part else "–" for key in ("guidance", "distillation")]
        share, guidance = f"{shown(alone['of_base'][name], 2)} {said(alone, name)}", alone["teacher_guidance"]
        rows.append([alone["student"], name, share, number(guidance, 1), *made])
    heads = ["student", "by", "of the base's variety", "guidance distilled in", "its share", "distillation's"]
    return heads, rows


def over_guidance(cells: list[dict], students: list[str], base: str, name: str) -> Markup | str:
    """Diversity over the guidance that was distilled in: of the base at it, of the students; where students
    differ in that.
    """
    own = pick(cells, base, "base")
    alone = {s: pick(cells, s, "student") for s in students}
    by = {cell["teacher_guidance"]: s for s, cell in alone.items() if cell.get("teacher_guidance")}
    if len(by) < 2 or len(by) < len(students):
        return ""
    at = {g: pick(cells, s, "teacher") or own for g, s in sorted(by.items())}
    lines = {
        f"{base} at it": [(g, last(cell, name)) for g, cell in at.items()],
        "students": [(g, last(alone[s], name)) for g, s in sorted(by.items())],
    }
    title = f"Diversity by {name} over the guidance that was distilled in"
    return charts.curves(lines, "guidance", title, f"diversity by {name}")


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
    largest = max(c["nfe"] for c in group)
    points, rows = [], []
    for cell in group:
        x, y, nfe = last(cell, "clip")["value"], cell["agreement"]["value"], cell["nfe"]
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
    (meaning, same, plan), lines = SWEEPS[kind], {}
    for student in (base, *students):
        runs = {argument(c["plan"], kind): c for c in cells if c["student"] == student}
        runs.pop(None, None)
        if runs and (other := pick(cells, student, plan)):
            runs.setdefault(same, other)
        if len(runs) > 1:
            lines[student] = [(x, last(runs[x], name)) for x in sorted(runs)]
    return charts.curves(lines, meaning, f"{kind}: diversity by {name}", f"diversity by {name}")


def everything(cells: list[dict], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every plan's diversity, share of the base's, recovery and agreement."""
    rows = []
    for c in cells:
        by = flat(
            (
                shown(last(c, n)),
                f"{shown(c['of_base'][n], 2)} {said(c, n)}",
                f"{shown(c['recovery'][n], 2)} {said(c, n, 'student')}",
            )
            for n in names
        )
        ends = (number(c["vendi"][-1]["value"], 1), shown(c["agreement"], 1), shown(c["agreement_gain"], 1))
        rows.append([f"{c['student']} {c['plan']}", *by, *ends])
    heads = flat((f"by {name}", "of base", "recovery") for name in names)
    return ["plan", *heads, "Vendi", "agreement", "gain in it"], rows
