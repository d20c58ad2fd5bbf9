"""What the page of analysis.trace shows; trace.html says how. Reads files and imports no torch.

A scrubber over the steps moves all members together.
"""

from pathlib import Path

from markupsafe import Markup

from analysis.pages import charts, html, words
from analysis.pages.words import shown
from analysis.results import is_file


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    cells, names, control = results["cells"], results["evaluators"], results["control"]
    with_control = [cell for cell in cells if "control" in cell]
    prompts = [results["prompts"][k] for k in range(results["shown"])]
    readers = [name for name in names if with_control and name in with_control[0]["control"]]  # of words
    return html.render(
        "trace.html",
        title="What a model believes at every step",
        lead=lead(cells, control),
        results=results,
        cells=cells,
        names=names,
        label=label,
        findings=findings(cells, results["base"], results["config"]["tolerance"], control),
        films=[(prompt, films(cells, folder, k)) for k, prompt in enumerate(prompts)],
        distances={f"by {name}": distance(cells, name) for name in names},
        forests={f"by {name}": forest(cells, name) for name in names},
        strips={
            label(c): (c, path) for c in cells if (path := is_file(folder, c["abandoned"].get("picture")))
        },
        effects={f"by {name}": effect(with_control, name) for name in readers},
        bands={name: bands(with_control, name, results["config"]["bands"]) for name in readers},
        sheets=[(prompt, sheet(folder, k)) for k, prompt in enumerate(prompts)],
    )


def lead(cells: list[dict], control: str) -> str:
    also = f", and the control {control}" if control else ""
    return f"{len(cells)} ways to draw, {words.design(cells[0])} each, paired by seed{also}."


def label(cell: dict) -> str:
    """A plan by its student: "dmd", "dmd hybrid(1)", "base(4)"."""
    student, plan = cell["student"], cell["plan"]
    if plan in ("base", "student"):
        return student
    return plan if plan.startswith((f"{student}(", "interval")) else f"{student} {plan}"


def findings(cells: list[dict], base: str, tolerance: float, control: str) -> list[str]:
    """What the numbers say, in sentences."""
    lines = []
    for cell in (c for c in cells if c["plan"] in ("base", "student")):
        when = "; ".join(
            f"by {name} after {shown(w['share'], 2)} of the steps, at t {shown(w['t'], 0)}"
            for name, w in cell["commitment"].items()
        )
        lines.append(f"{label(cell)} commits (stays within {tolerance:g}) {when}.")
        if control and "control" in cell:
            half = "; ".join(
                f"by {name} at t {shown(e['half']['t'], 0)}" for name, e in cell["control"].items()
            )
            lines.append(f"{label(cell)}: half of the effect of {control} is there {half}.")
    return lines


def sheet(folder: Path, k: int) -> Path | None:
    """The sheet of the k-th image; None where it was not kept."""
    path = folder / f"images/sheet-{k}.png"
    return path if path.is_file() else None


def films(cells: list[dict], folder: Path, k: int) -> list[dict]:
    """The sprites of one image, a member each: the x_t and x0 of every step."""
    sprites = []
    for i, cell in enumerate(cells):
        path, levels = folder / f"images/sprite-{i}-{k}.webp", [step["t"] for step in cell["steps"]]
        if path.is_file():
            src = html.embedded(path)
            sprites.append({"label": label(cell), "levels": levels, "src": src, "small": len(src) < 100_000})
    return sprites


def over_steps(cell: dict, intervals: list[dict]) -> charts.Curve:
    return [(step["share"], interval) for step, interval in zip(cell["steps"], intervals, strict=True)]


def distance(cells: list[dict], name: str) -> Markup | str:
    """The paper's Fig 5: distance of x0 to the final image over the share of the steps."""
    lines = {label(cell): over_steps(cell, cell["distance"][name]) for cell in cells}
    return charts.curves(lines, "share of the steps", f"distance of x0 to the final image by {name}")


def forest(cells: list[dict], name: str) -> Markup | str:
    """The noise level of commitment, a row per plan."""
    rows = [(label(cell), [{"c1": cell["commitment"][name]["t"]}], "") for cell in cells]
    return charts.forest(rows, "t at commitment, high = early", f"t at commitment by {name}")


def effect(cells: list[dict], name: str) -> Markup | str:
    """The effect of a control over the steps."""
    lines = {label(cell): over_steps(cell, cell["control"][name]["effect"]) for cell in cells}
    return charts.curves(lines, "share of the steps", f"effect by {name}")


def bands(cells: list[dict], name: str, cuts: list[float]) -> tuple[list[str], list[list[str]]] | None:
    """Heads and rows of what a control does on a part of the noise levels alone; None where that was not
    asked.
    """
    rows = [(label(cell), parts) for cell in cells if (parts := cell["control"][name]["parts"])]
    if not rows:
        return None
    edges = [999.0, *cuts, 0.0]
    heads = [f"t {edges[part['bands'][0]]:g}–{edges[part['bands'][-1] + 1]:g}" for part in rows[0][1]]
    return ["on at", *heads], [[name, *(shown(part["share"], 2) for part in parts)] for name, parts in rows]
