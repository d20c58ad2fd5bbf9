"""The pictures of the transfer report: dose-response curves, retentions on one axis, image sheets; and a
control's section of them.
"""

from html import escape
from itertools import count
from pathlib import Path

from analysis.pages.html import DASH, chart, dial, number, ranged, sheet, signed, ticks
from analysis.pages.tables import EMPTY, MARKS, numbers_table
from analysis.pages.words import evaluators_of, is_own, readings, references, where
from analysis.results import is_file

WIDTH, LEFT, RIGHT = 380, 92, 122  # of the retention axis, in units of its view box
REACH = (-1.0, 3.0)  # a retention beyond is drawn at the edge
# mark of a retention by the first evaluator, by the second, and of what it is compared with; a path around
# (0, 0)
SHAPES = {
    "first": "M-4.5-4.5h9v9h-9z",
    "second": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "floor": "M-5 4.5L0-4.5L5 4.5z",
    "ceiling": "M0-5.5L5 0L0 5.5L-5 0z",
    "wrong": "M-4-4L4 4M4-4L-4 4",
}


def control_section(
    group: list[dict], folder: Path, name: str, colours: dict[str, int], margin: list[float]
) -> str:
    """Curves by each evaluator, retentions, image sheets and every number of one control.

    name: the section's id. colours: of each target. margin: the retentions that count as the same.
    """
    control, source = group[0]["control"], group[0]["source"]
    about = f"{group[0].get('kind', 'control')}, trained on {source}" + _words(group[0])
    charts = "\n".join(
        [
            *(chart_figure(group, evaluator_name, colours) for evaluator_name in evaluators_of(group)),
            forest_figure(group, margin),
        ]
    )
    return (
        f'<section aria-labelledby="{name}">\n<h3 id="{name}">{escape(control)}</h3>\n<p class="note">{escape(about)}</p>\n'
        f'<div class="charts">\n{charts}\n</div>\n{sheets(group, folder)}\n'
        f"<details><summary>Every number of {escape(control)}</summary>\n{numbers_table(group)}\n</details>\n</section>"
    )


def _words(cell: dict) -> str:
    if not cell.get("positive"):
        return ""
    below = f", acting below σ/α = {cell['below']:g}" if cell.get("below") is not None else ""
    start = f"from “{cell['negative']}” to" if cell.get("negative") else "towards"
    return f"; {start} “{cell['positive']}”{below}"


def chart_figure(group: list[dict], evaluator: str, colours: dict[str, int]) -> str:
    """The dose-response curves of one control by one evaluator; shaded are the scales over which its slopes
    are taken.
    """
    cells = [c for c in group if evaluator in readings(c)]
    curves = {where(c): readings(c)[evaluator]["effect"] for c in cells}
    window = readings(cells[0])[evaluator].get("window")
    ends = "; ".join(f"{name} {ranged(effect[-1], 3)}" for name, effect in curves.items())
    title = f"{group[0]['control']} by {evaluator}, effect over scale; at the largest scale: {ends}"
    picture = chart(
        group[0]["scales"],
        curves,
        title,
        window=window,
        colours=[colours[c["target"]] for c in cells],
        dashed=tuple(where(c) for c in cells if c.get("reference")),
    )
    return (
        f"<figure><figcaption><b>Effect over scale</b> by {escape(evaluator)}</figcaption>{picture}</figure>"
    )


def forest_figure(group: list[dict], margin: list[float]) -> str:
    """The retentions of one control on one axis, with their references; empty where there is none."""
    cells = [c for c in group if not is_own(c) and c["retention"]["value"] is not None]
    if not cells:
        return ""
    kinds = [kind for kind in SHAPES if any(kind in line for cell in cells for line in forest_lines(cell))]
    first, second = [*evaluators_of(group), ""][:2]
    names = {
        "first": first,
        "second": second,
        "floor": "floor",
        "ceiling": "ceiling",
        "wrong": "wrong control",
    }
    legend = " ".join(f'<span class="key">{_mark(kind)} {escape(names[kind])}</span>' for kind in kinds)
    note = (
        f' <span class="key"><span class="swatch"></span> {number(margin[0])} to {number(margin[1])}</span>'
    )
    return f"<figure><figcaption><b>Retention</b> {legend}{note}</figcaption>{forest(cells, margin)}</figure>"


def _mark(kind: str) -> str:
    return f'<svg class="mark-key" viewBox="-7 -7 14 14" aria-hidden="true"><path class="{kind}" d="{SHAPES[kind]}"/></svg>'


def forest_lines(cell: dict) -> list[dict[str, dict]]:
    """What stands in a cell's rows of the axis: a retention by each of two evaluators, then its references.
    kind -> interval.
    """
    retentions = [reading["retention"] for reading in readings(cell).values()][:2]
    lines = [{kind: kept} for kind, kept in zip(("first", "second"), retentions, strict=False)]
    shares = {
        kind: found.get("share") or EMPTY
        for kind, found in references(cell).items()
        if kind in ("floor", "ceiling", "wrong")
    }
    return [{k: v for k, v in line.items() if v["value"] is not None} for line in [*lines, shares]]


def forest(cells: list[dict], margin: list[float], step: int = 15, gap: int = 12) -> str:
    """Retentions with intervals as inline SVG, the margin shaded, a line at 0 and at 1."""
    rows = [[line for line in forest_lines(cell) if line] for cell in cells]
    ends = [v for row in rows for line in row for i in line.values() for v in i.values() if v is not None]
    low, high = max(min([0.0, *ends]), REACH[0]) - 0.05, min(max([1.3, *ends]), REACH[1]) + 0.05
    foot = gap + sum(step * len(row) + gap for row in rows)

    def at(value: float) -> float:
        return LEFT + (min(max(value, low), high) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    said = f"{cells[0]['control']}, retention: " + "; ".join(
        f"{where(c)} {ranged(c['retention'])}" for c in cells
    )
    parts = [f'<svg viewBox="0 0 {WIDTH} {foot + 24}" role="img" aria-label="{escape(said)}">']
    parts.append(
        f'<rect class="margin" x="{at(margin[0]):.1f}" y="0" width="{at(margin[1]) - at(margin[0]):.1f}" height="{foot}"/>'
    )
    parts += [f'<line class="axis" x1="{at(v):.1f}" x2="{at(v):.1f}" y1="0" y2="{foot}"/>' for v in (0, 1)]
    parts += [
        f'<text x="{at(v):.1f}" y="{foot + 16}" text-anchor="middle">{number(v, 1)}</text>'
        for v in ticks(low, high, 5)
    ]
    y = gap
    for cell, row in zip(cells, rows, strict=True):
        parts += _forest_row(cell, row, at, y, step)
        y += step * len(row) + gap
    return "\n".join([*parts, "</svg>"])


def _forest_row(cell: dict, row: list[dict], at, y: float, step: int) -> list[str]:
    parts = [f'<text class="label" x="{LEFT - 8}" y="{y + 8}" text-anchor="end">{escape(where(cell))}</text>']
    parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 8}">{ranged(cell["retention"])}</text>')
    for line, place in zip(row, count(y + 4, step), strict=False):
        for kind, found in line.items():
            x, low, high = (
                None if found[end] is None else f"{at(found[end]):.1f}" for end in ("value", "low", "high")
            )
            if low and high:
                parts.append(f'<line class="ends {kind}" x1="{low}" x2="{high}" y1="{place}" y2="{place}"/>')
            parts.append(f'<path class="{kind}" transform="translate({x} {place})" d="{SHAPES[kind]}"/>')
    return parts


def sheets(group: list[dict], folder: Path) -> str:
    """The image sheets of one control, a member each, and the dial that moves them through the scales
    together.
    """
    scales = group[0]["scales"]
    labels = [f"scale {signed(s)}" for s in scales]
    start = scales.index(1) if 1 in scales else len(scales) - 1
    handle = dial(f"{group[0]['control']}:", scales, labels, start, "show all scales")
    figures = "\n".join(_sheet(cell, folder) for cell in group)
    return (
        f'<div data-sheets style="--at: {start}">\n{handle}\n<div class="strips">\n{figures}\n</div>\n</div>'
    )


def _sheet(cell: dict, folder: Path) -> str:
    member, scales = where(cell), list(map(signed, cell["scales"]))
    word = f"{MARKS.get(cell['verdict'], '')} {cell['verdict']} {number(cell['retention']['value'])}".removesuffix(
        f" {DASH}"
    )
    says = "source" if is_own(cell) else "for comparison" if cell.get("reference") else word
    caption = f"<b>{escape(member)}</b> <span>{escape(says)}</span>"
    path = is_file(folder, cell.get("picture"))
    if path is None:
        return f'<figure class="strip"><figcaption>{caption}</figcaption><p class="note">No pictures were kept.</p></figure>'
    alt = f"{cell['control']} on {member}: one row per prompt, scales {', '.join(scales)} from left to right"
    return sheet(path, scales, caption, alt)


def colours_of(members: list[str]) -> dict[str, int]:
    """Each member's colour, the same on the whole page."""
    return {member: i for i, member in enumerate(members)}


def page_dial(cells: list[dict]) -> str:
    """The dial that turns those of all controls."""
    scales = sorted({s for c in cells for s in c["scales"]})
    start = scales.index(1) if 1 in scales else len(scales) - 1
    return dial("All controls:", scales, [f"scale {signed(s)}" for s in scales], start, "show all scales")
