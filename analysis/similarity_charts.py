"""Drawings of the similarity page: coloured tables, curves over blocks, maps, scatters, as HTML and inline SVG. Numbers in, text out."""

import math
from collections.abc import Callable
from html import escape

from analysis.report import COLOURS, DASH, number, ranged, ticks

Interval = dict[str, float | None]


def map_cell(interval: Interval | None, shade: Callable[[float | None], str], digits: int = 2) -> str:
    """A value as a coloured cell, its interval on hovering."""
    if interval is None:
        return f"<td>{DASH}</td>"
    return f'<td style="{shade(interval["value"])}" title="{escape(ranged(interval))}">{number(interval["value"], digits)}</td>'


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
    return "" if value is None else f"--hue: var(--{'more' if value > 0 else 'less'}); --weight: {0.6 * min(abs(value), 1):.2f}"


def figure(caption: str, inside: str) -> str:
    return f"<figure><figcaption><b>{escape(caption)}</b></figcaption>{inside}</figure>"


def curves(cells: list[dict], inputs: str, value: Callable[[dict], Interval], title: str, null: bool, width=460, height=280) -> str:
    """One line per step over the blocks, with bands; dashed the null's 95th percentile of the first step, or the line at 1."""
    chosen = [c for c in cells if c["inputs"] == inputs]
    blocks, steps = list(dict.fromkeys(c["block"] for c in chosen)), sorted({c["step"] for c in chosen})
    lines = {s: [value(c) for b in blocks for c in chosen if c["block"] == b and c["step"] == s] for s in steps}
    dashed = [c["null"]["high"] if null else 1.0 for c in chosen if c["step"] == steps[0]]
    values = [v for line in lines.values() for p in line for v in p.values() if v is not None] + [v for v in dashed if v is not None]
    low, high = min(min(values), 0.0), max(max(values), 1.0)
    x = lambda i: 44 + i * (width - 110) / max(1, len(blocks) - 1)  # noqa: E731
    y = lambda v: 10 + (high - v) / (high - low) * (height - 46)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts += [f'<line class="grid" x1="44" x2="{width - 66}" y1="{y(v):.1f}" y2="{y(v):.1f}"/><text x="36" y="{y(v) + 4:.1f}" '
              f'text-anchor="end">{number(v, 1)}</text>' for v in ticks(low, high)]  # fmt: skip
    parts += [f'<text x="{x(i):.1f}" y="{height - 18}" text-anchor="middle">{i + 1}</text>' for i in range(0, len(blocks), 2)]
    parts.append(f'<text x="{(width - 22) / 2}" y="{height - 2}" text-anchor="middle">block</text>')
    parts += [band([(x(i), y(p["low"]), y(p["high"])) for i, p in enumerate(line) if None not in p.values()], f"c{n % COLOURS}")
              for n, line in enumerate(lines.values())]  # fmt: skip
    parts.append(polyline([(x(i), y(v)) for i, v in enumerate(dashed) if v is not None], "dashed c0"))
    for n, (step, line) in enumerate(lines.items()):
        parts.append(polyline([(x(i), y(p["value"])) for i, p in enumerate(line) if p["value"] is not None], f"curve c{n % COLOURS}"))
        parts.append(f'<text class="label" x="{width - 58}" y="{24 + 17 * n}" style="fill: var(--c{n % COLOURS})">step {step + 1}</text>')
    return "\n".join([*parts, "</svg>"])


def band(points: list[tuple[float, float, float]], kind: str) -> str:
    outline = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in reversed(points)]
    return f'<polygon class="band {kind}" points="{path(outline)}"/>'


def polyline(points: list[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" style="fill: none" points="{path(points)}"/>'


def path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def cross_map(cell: dict) -> str:
    """Every block of the first against every block of the second as squares."""
    size, n = 10, len(cell["blocks"])
    title = f"CKA of every block of {cell['first']} with every block of {cell['comparison']} at step {cell['step'] + 1}"
    squares = "".join(
        f'<rect class="cell" x="{c * size}" y="{r * size}" width="{size}" height="{size}" fill-opacity="{min(max(value or 0, 0), 1):.2f}"/>'
        for r, row in enumerate(cell["cka"]) for c, value in enumerate(row)
    )  # fmt: skip
    return f'<svg viewBox="0 0 {n * size} {n * size}" role="img" aria-label="{escape(title)}">{squares}</svg>'


def plain(heads: list[str], rows: list[list[str]]) -> str:
    """A table of words, the first column its rows' names."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "\n".join(f'<tr><th scope="row">{escape(r[0])}</th>{"".join(f"<td>{escape(v)}</td>" for v in r[1:])}</tr>' for r in rows)
    return f'<div class="wide"><table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def scatter(points: list[dict], predictor: str, width: int = 460, height: int = 300) -> str:
    """Retention over a predictor, one colour per target."""
    points = [p for p in points if p[predictor] is not None]
    spans = []
    for values in ([p[predictor] for p in points], [p["retention"] for p in points]):
        pad = 0.06 * (max(values) - min(values)) or 1.0
        spans.append((min(values) - pad, max(values) + pad))
    (x0, x1), (y0, y1) = spans
    x = lambda v: 44 + (v - x0) / (x1 - x0) * (width - 140)  # noqa: E731
    y = lambda v: 10 + (y1 - v) / (y1 - y0) * (height - 52)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="retention over {escape(predictor)}">']
    parts += [f'<line class="grid" x1="44" x2="{width - 96}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
              f'<text x="36" y="{y(v) + 4:.1f}" text-anchor="end">{number(v, 1)}</text>' for v in ticks(y0, y1)]  # fmt: skip
    parts += [f'<text x="{x(v):.1f}" y="{height - 24}" text-anchor="middle">{v:.3g}</text>' for v in ticks(x0, x1, 5)]
    parts.append(f'<text x="{(width - 52) / 2}" y="{height - 4}" text-anchor="middle">{escape(predictor)}</text>')
    for n, target in enumerate(dict.fromkeys(p["target"] for p in points)):
        parts += [f'<circle class="c{n % COLOURS}" cx="{x(p[predictor]):.1f}" cy="{y(p["retention"]):.1f}" r="3.4"><title>'
                  f"{escape(p['control'])}: {number(p['retention'])}</title></circle>" for p in points if p["target"] == target]  # fmt: skip
        parts.append(f'<text class="label" x="{width - 88}" y="{24 + 17 * n}" style="fill: var(--c{n % COLOURS})">'
                     f"{escape(target.rpartition('/')[2])}</text>")  # fmt: skip
    return "\n".join([*parts, "</svg>"])
