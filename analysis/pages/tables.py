"""A transfer's cells as table.csv and table.tex beside its record. Imports no torch."""

import csv
import re
from pathlib import Path

from analysis.pages import words
from configs import replacing

# columns of the table of cells, in threes: value, low, high; and where they stand in a reading
INTERVALS = {
    "retention": "retention",
    "retention below 0": "below_zero.retention",
    "slope retention": "slope_retention",
    "slope": "slope",
    "share of words": "of_words",
    "matched scale": "matched_scale",
    "floor": "references.floor.share",
    "ceiling": "references.ceiling.share",
    "wrong control": "references.wrong.share",
    "re-run": "references.rerun.effect",
    "normalised": "references.normalised",
}
NUMBERS = {
    "signs differ": "below_zero.differs",
    "most reached": "matched_scale.reach.share",
    "p of equivalence": "p.equivalence.p_holm",
    "p of a difference": "p.difference.p_holm",
    "p of dead": "p.dead.p_holm",
    "p of reversed": "p.reversed.p_holm",
    "monotonicity": "monotonicity",
    "saturation": "shape.saturation",
    "preservation": "preservation",
}
ABOUT = ("control", "kind", "source", "target", "reference")
COUNTS = ("images", "prompts", "seeds", "looks")


def look_up(value: object, path: str) -> object:
    """What stands in nested dicts at "outer.inner"; None where a part of the way is missing."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def ends(reading: dict, path: str) -> list:
    """Value, low and high of the interval at a path."""
    return [look_up(reading, f"{path}.{end}") for end in ("value", "low", "high")]


def of_cells(cells: list[dict]) -> tuple[list[str], list[list]]:
    """Columns and rows of plain values: one row per cell and evaluator."""
    threes = [f"{name}{end}" for name in (*INTERVALS, "% CLIP change") for end in ("", " low", " high")]
    columns = [*ABOUT, "evaluator", "verdict", *threes, *NUMBERS, *COUNTS]
    rows = [
        [
            *(cell[key] for key in ABOUT),
            evaluator_name,
            reading["verdict"],
            *(end for path in INTERVALS.values() for end in ends(reading, path)),
            *ends(cell, "clip_change_percent"),
            *(look_up(reading, path) for path in NUMBERS.values()),
            *(cell[key] for key in COUNTS),
        ]
        for cell in cells
        for evaluator_name, reading in words.readings(cell).items()
    ]
    return columns, rows


def write(record: dict, folder: Path) -> None:
    """table.csv with every number, table.tex with the retentions by the first evaluator."""
    columns, rows = of_cells(record["cells"])
    with replacing(Path(folder) / "table.csv") as new, new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    with replacing(Path(folder) / "table.tex") as new:
        new.write_text(latex(list(map(words.led, record["cells"]))), encoding="utf-8")


def latex(cells: list[dict]) -> str:
    """Retention with its interval, a row per control, a column per target; needs the package booktabs."""
    judged = [cell for cell in cells if words.is_verdict(cell)]
    targets = list(dict.fromkeys(cell["target"] for cell in judged))
    lines = [rf"\begin{{tabular}}{{ll{'r' * len(targets)}}}", r"\toprule"]
    lines.append(
        " & ".join(["control", "from", *(escaped(words.short(target)) for target in targets)]) + r" \\"
    )
    lines.append(r"\midrule")
    for (control, source), group in words.groups(judged).items():
        texts = [in_latex(words.on(group, target)) for target in targets]
        lines.append(" & ".join([escaped(control), escaped(words.short(source)), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def in_latex(cell: dict | None) -> str:
    if cell is None:
        return ""
    if cell["retention"]["value"] is None:
        return "--"
    value, low, high = (f"{end:.2f}" for end in cell["retention"].values())
    return rf"${value}$ {{\footnotesize $[{low}, {high}]$}} {cell['verdict']}"


def escaped(text: str) -> str:
    """A text in which LaTeX finds nothing of its own."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash ")).replace(
        "~", r"\textasciitilde "
    )
