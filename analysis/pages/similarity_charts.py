"""Drawings of the similarity page: coloured cells, curves over blocks, maps, scatters.

Numbers in, HTML and inline SVG out.
"""

import math
from collections.abc import Callable
from html import escape

from analysis.pages.html import COLOURS, DASH, number, ranged, ticks

Interval = dict[str, float | None]
LEFT, RIGHT, TOP, FOOT = 44, 88, 10, 40  # margins of a drawing in pixels


def less(value: float | None) -> str:
    """Orange for what 1 lacks."""
    return "" if value is None else f"--hue: var(--less); --weight: {0.6 * min(max(1 - value, 0), 1):.2f}"


def around_one(value: float | None) -> str:
    """Orange below 1, blue above, full at half and at double."""
    if value is None:
        return ""
    distance = min(abs(math.log2(value)), 1.0) if value > 0 else 1.0
    return f"--hue: var(--{'less' if value < 1 else 'more'}); --weight: {0.04 + 0.5 * distance:.2f}"


def signed(value: float | None) -> str:
    """Blue above 0, orange below, full at ±1."""
    return (
        ""
        if value is None
        else f"--hue: var(--{'more' if value > 0 else 'less'}); --weight: {0.6 * min(abs(value), 1):.2f}"
    )


def cell(value: float | None, shade: Callable[[float | None], str], digits: int = 2, hover: str = "") -> str:
    """A value as a coloured table cell."""
    return f'<td style="{shade(value)}" title="{escape(hover)}">{number(value, digits)}</td>'


def cells(intervals: list[Interval | None], shade: Callable[[float | None], str]) -> str:
    """Coloured cells, their intervals on hovering, and a gap after them."""
    there = [f"<td>{DASH}</td>" if i is None else cell(i["value"], shade, hover=ranged(i)) for i in intervals]
    return "".join(there) + '<td class="gap"></td>'


def heat(heads: list[str], rows: list[str], small: bool = False) -> str:
    """A compact heat table from rows of header cells and rows of the body."""
    head, body = "".join(f"<tr>{h}</tr>" for h in heads), "\n".join(f"<tr>{r}</tr>" for r in rows)
    kind = "map small" if small else "map"
    return f'<div class="wide"><table class="{kind}">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def plain(heads: list[str], rows: list[list[str]]) -> str:
    """A table of words, the first column its rows' names."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "\n".join(
        f'<tr><th scope="row">{escape(r[0])}</th>{"".join(f"<td>{escape(v)}</td>" for v in r[1:])}</tr>'
        for r in rows
    )
    return f'<div class="wide"><table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure(caption: str, inside: str) -> str:
    return f"<figure><figcaption><b>{escape(caption)}</b></figcaption>{inside}</figure>"


def curves(
    lines: dict[str, list[Interval]],
    dashed: list[float | None],
    title: str,
    width: int = 460,
    height: int = 280,
) -> str:
    """Lines with bands over numbered blocks, and one dashed beside them.

    lines: name -> one interval per block. dashed: one value per block.
    """
    blocks = len(dashed)
    values = [v for line in lines.values() for p in line for v in p.values() if v is not None] + [
        v for v in dashed if v is not None
    ]
    low, high = min([*values, 0.0]), max([*values, 1.0])

    def x(i):
        return LEFT + i * (width - LEFT - RIGHT) / max(1, blocks - 1)

    def y(v):
        return TOP + (high - v) / (high - low) * (height - TOP - FOOT)

    parts = [_opening(title, width, height), *_horizontals(ticks(low, high), y, width)]
    parts += [
        f'<text x="{x(i):.1f}" y="{height - 22}" text-anchor="middle">{i + 1}</text>'
        for i in range(0, blocks, 2)
    ]
    parts.append(f'<text x="{(LEFT + width - RIGHT) / 2}" y="{height - 4}" text-anchor="middle">block</text>')
    for n, line in enumerate(lines.values()):
        whole = [(i, p) for i, p in enumerate(line) if None not in p.values()]
        outline = [(x(i), y(p["low"])) for i, p in whole] + [(x(i), y(p["high"])) for i, p in reversed(whole)]
        parts.append(f'<polygon class="band c{n % COLOURS}" points="{_path(outline)}"/>')
    parts.append(_line([(x(i), y(v)) for i, v in enumerate(dashed) if v is not None], "dashed c0"))
    for n, (name, line) in enumerate(lines.items()):
        parts.append(
            _line(
                [(x(i), y(p["value"])) for i, p in enumerate(line) if p["value"] is not None],
                f"curve c{n % COLOURS}",
            )
        )
        parts.append(_label(name, n, width))
    return "\n".join([*parts, "</svg>"])


def squares(table: list[list[float | None]], title: str, size: int = 10) -> str:
    """A table of values in [0, 1] as squares, the stronger the nearer to 1."""
    rects = [
        f'<rect class="cell" x="{c * size}" y="{r * size}" width="{size}" height="{size}" fill-opacity="{min(max(value or 0, 0), 1):.2f}"/>'
        for r, row in enumerate(table)
        for c, value in enumerate(row)
    ]
    return "\n".join([_opening(title, size * len(table[0]), size * len(table)), *rects, "</svg>"])


def scatter(
    points: list[tuple[str, str, float, float]], x_name: str, title: str, width: int = 460, height: int = 300
) -> str:
    """Dots (name, colour group, x, y); the names on hovering."""
    (x0, x1), (y0, y1) = (_span([p[i] for p in points]) for i in (2, 3))

    def x(v):
        return LEFT + (v - x0) / (x1 - x0) * (width - LEFT - RIGHT)

    def y(v):
        return TOP + (y1 - v) / (y1 - y0) * (height - TOP - FOOT)

    parts = [_opening(title, width, height), *_horizontals(ticks(y0, y1), y, width)]
    parts += [
        f'<text x="{x(v):.1f}" y="{height - 22}" text-anchor="middle">{v:.3g}</text>'
        for v in ticks(x0, x1, 5)
    ]
    parts.append(
        f'<text x="{(LEFT + width - RIGHT) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_name)}</text>'
    )
    groups = list(dict.fromkeys(p[1] for p in points))
    for name, group, a, b in points:
        kind = f"c{groups.index(group) % COLOURS}"
        parts.append(
            f'<circle class="{kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.4"><title>{escape(name)}: {number(b)}</title></circle>'
        )
    return "\n".join([*parts, *(_label(group, n, width) for n, group in enumerate(groups)), "</svg>"])


def _opening(title: str, width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _horizontals(values: list[float], y: Callable[[float], float], width: int) -> list[str]:
    line = '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    return [
        line.format(
            "axis" if v == 0 else "grid", LEFT, width - RIGHT, y(v), y(v), LEFT - 8, y(v) + 4, number(v, 1)
        )
        for v in values
    ]


def _label(name: str, n: int, width: int) -> str:
    place = f'x="{width - RIGHT + 10}" y="{24 + 17 * n}"'
    return f'<text class="label" {place} style="fill: var(--c{n % COLOURS})">{escape(name)}</text>'


def _line(points: list[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" style="fill: none" points="{_path(points)}"/>'


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _span(values: list[float]) -> tuple[float, float]:
    pad = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - pad, max(values) + pad
