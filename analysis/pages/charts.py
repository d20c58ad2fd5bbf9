"""What the pages of trace and diversity are drawn with: charts as inline SVG, tables, embedded pictures, in
the frame of every page.

Reads files and imports no torch. An interval is a dict {"value", "low", "high"}, as everywhere.
"""

import json
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from analysis.pages.html import COLOURS, embedded, number, ranged, spread, ticks, whole

Curve = list[tuple[float, dict]]  # (x, interval)


def page(title: str, lead: str, sections: Iterable[str], results: dict, extra: str = "") -> str:
    """A whole page that needs nothing else; `extra` is a style or a script of its own."""
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    stamp = f"{results.get('created', '')} · {results.get('seconds', 0):.0f} s · {versions}"
    config = json.dumps(results.get("config", {}), indent=2, ensure_ascii=False)
    return whole(
        title,
        lead,
        f"""{extra}
{"".join(sections)}
<section>
<h2>The command</h2>
<pre>{escape(results.get("command", ""))}</pre>
<p class="note">{escape(stamp)}</p>
<details><summary>Configuration</summary>
<pre>{escape(config)}</pre>
</details>
</section>""",
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A section under a heading; nothing where it has no parts."""
    if not any(parts):
        return ""
    about = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{about}" + "\n".join(filter(None, parts)) + "\n</section>\n"


def sentences(lines: list[str]) -> str:
    """Findings as a list."""
    return (
        '<section class="verdicts"><ul>'
        + "".join(f"<li>{escape(line)}</li>" for line in lines)
        + "</ul></section>\n"
    )


def table(
    head: list[str], rows: list[list[str]], bold: Callable[[list[str]], bool] = lambda row: False
) -> str:
    """A table of numbers; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{escape(word)}</th>' for word in head)
    body = []
    for row in rows:
        weight = ' style="font-weight: 600"' if bold(row) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr{weight}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    inside = f"<thead><tr>{top}</tr></thead>\n<tbody>\n{chr(10).join(body)}\n</tbody>"
    return f'<div class="wide"><table class="numbers">\n{inside}</table></div>'


def figures(*charts: str) -> str:
    """Charts beside each other."""
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{escape(caption)}</b></figcaption>{drawing}</figure>"


def picture(path: Path, alt: str, pixels: bool = False) -> str:
    """An image file, embedded."""
    image = f'<img alt="{escape(alt)}" loading="lazy" style="max-width:100%" src="{embedded(path)}">'
    return f'<div class="{"pixels " if pixels else ""}wide">{image}</div>'


class Axes:
    """A frame with round ticks that places values: `x(value)`, `y(value)` in the pixels of an SVG."""

    def __init__(
        self,
        xs: list[float],
        ys: list[float],
        size=(490, 300),
        right: int = 130,
        left: int = 60,
        falling: bool = False,
    ):
        self.falling = falling  # x from large to small
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = left, right, 22, 38
        (self.x0, self.x1), (self.y0, self.y1) = _padded(xs), _padded(ys)

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0)
        return self.left + (1 - share if self.falling else share) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return self.top + (self.y1 - value) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)

    def frame(self, x_name: str, y_name: str = "") -> list[str]:
        """Grid lines with their numbers, and the names of the axes."""
        right = self.width - self.right
        rows = [
            f'<line class="{"axis" if v == 0 else "grid"}" x1="{self.left}" x2="{right}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
            f'<text x="{self.left - 8}" y="{self.y(v) + 4:.1f}" text-anchor="end">{_short(v)}</text>'
            for v in ticks(self.y0, self.y1)
        ]
        return [
            *rows,
            *self.foot(x_name),
            f'<text x="{self.left}" y="12">{escape(y_name)}</text>' if y_name else "",
        ]

    def foot(self, x_name: str) -> list[str]:
        """The numbers along the x axis and its name."""
        y, middle = self.height - self.bottom + 16, (self.left + self.width - self.right) / 2
        columns = [
            f'<text x="{self.x(v):.1f}" y="{y}" text-anchor="middle">{_short(v)}</text>'
            for v in ticks(self.x0, self.x1, 6)
        ]
        return [
            *columns,
            f'<text x="{middle:.0f}" y="{self.height - 4}" text-anchor="middle">{escape(x_name)}</text>',
        ]

    def svg(self, title: str, parts: list[str]) -> str:
        inside = "\n".join(parts)
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">\n{inside}\n</svg>'


def lines(curves: dict[str, Curve], x_name: str, y_name: str, title: str, falling: bool = False) -> str:
    """Curves with interval bands, each on its own xs, labelled at their last points; `falling` draws large xs
    at the left.
    """
    points = [(x, p) for curve in curves.values() for x, p in curve if p["value"] is not None]
    if not points:
        return ""
    values = [v for _, p in points for v in p.values() if v is not None]
    axes = Axes([x for x, _ in points], values, falling=falling)
    parts = axes.frame(x_name, y_name)
    for i, curve in enumerate(curves.values()):
        known = [(x, p) for x, p in curve if p["value"] is not None]
        edge = [(axes.x(x), axes.y(p["low"])) for x, p in known if p["low"] is not None]
        edge += [(axes.x(x), axes.y(p["high"])) for x, p in reversed(known) if p["high"] is not None]
        places = [(axes.x(x), axes.y(p["value"])) for x, p in known]
        parts.append(f'<polygon class="band c{i % COLOURS}" points="{_path(edge)}"/>')
        parts.append(f'<polyline class="curve c{i % COLOURS}" style="fill: none" points="{_path(places)}"/>')
        parts += [f'<circle class="c{i % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    ends = spread(
        [axes.y(curve[-1][1]["value"] or 0) for curve in curves.values()],
        15,
        axes.top + 6,
        axes.height - axes.bottom,
    )
    parts += [
        _label(axes.width - axes.right + 8, y + 4, name, i)
        for i, (name, y) in enumerate(zip(curves, ends, strict=True))
    ]
    return axes.svg(title, parts)


def forest(
    rows: list[tuple[str, dict, int]], x_name: str, title: str, marks: tuple[float, ...] = (0.0,)
) -> str:
    """Intervals beneath each other: (name, interval, colour) in rows, with vertical lines at `marks`."""
    rows = [row for row in rows if row[1]["value"] is not None]
    if not rows:
        return ""
    xs = [v for _, p, _ in rows for v in p.values() if v is not None] + list(marks)
    axes = Axes(xs, [0.0, 1.0], (460, 22 * len(rows) + 50), right=20, left=150)
    foot, parts = axes.height - axes.bottom, axes.foot(x_name)
    parts += [
        f'<line class="axis" x1="{axes.x(m):.1f}" x2="{axes.x(m):.1f}" y1="{axes.top}" y2="{foot}"/>'
        for m in marks
    ]
    for i, (name, p, colour) in enumerate(rows):
        y = axes.top + (i + 0.5) * (foot - axes.top) / len(rows)
        low, high = (axes.x(p[end] if p[end] is not None else p["value"]) for end in ("low", "high"))
        parts.append(
            f'<line class="c{colour}" stroke-width="2" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<circle class="c{colour}" cx="{axes.x(p["value"]):.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(f'<text x="{axes.left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
    return axes.svg(title, parts)


def scatter(points: list[tuple[str, float, float, float, int]], x_name: str, y_name: str, title: str) -> str:
    """(name, x, y, size, rank) as circles, area by size; those with a rank other than 0 are filled and bear
    it.
    """
    axes = Axes([p[1] for p in points], [p[2] for p in points], (490, 380), right=30)
    largest, parts = max(p[3] for p in points), axes.frame(x_name, y_name)
    for name, x, y, size, rank in sorted(points, key=lambda p: p[4] > 0):
        at, about = (axes.x(x), axes.y(y)), f"{name}: {number(x, 3)}, {number(y, 2)}, {size:g}"
        look = f'class="c{1 if rank else 0}" style="fill-opacity: {0.75 if rank else 0.12}"'
        parts.append(
            f'<circle {look} cx="{at[0]:.1f}" cy="{at[1]:.1f}" '
            f'r="{3 + 7 * (size / largest) ** 0.5:.1f}"><title>{escape(about)}</title></circle>'
        )
        if rank:
            parts.append(
                f'<text class="label" x="{at[0]:.1f}" y="{at[1] - 11:.1f}" text-anchor="middle">{rank}</text>'
            )
    return axes.svg(title, parts)


def shown(interval: dict | None, digits: int = 3) -> str:
    """An interval in a table; a dash where there is none."""
    return "–" if not interval or interval["value"] is None else ranged(interval, digits)


def _label(x: float, y: float, name: str, i: int) -> str:
    return (
        f'<text class="label" x="{x}" y="{y:.1f}" style="fill: var(--c{i % COLOURS})">{escape(name)}</text>'
    )


def _path(places: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _padded(values: list[float]) -> tuple[float, float]:
    pad = 0.05 * (max(values) - min(values)) or abs(values[0]) * 0.05 or 1.0
    return min(values) - pad, max(values) + pad


def _short(value: float) -> str:
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:g}").replace("-", "−")
