"""Charts as inline SVG, the only ones of the project: numbers in, safe markup out.

An interval is a dict {"value", "low", "high"}, as everywhere. A class c0 … c6 is a colour of page.css.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

from analysis.pages.words import number

COLOURS = 7  # --c0 … --c6 of page.css: Okabe and Ito's, darkened or lightened to be read as text
SHAPES = {  # marks around (0, 0): of the first and second evaluator, and of what a retention is compared with
    "first": "M-4.5-4.5h9v9h-9z",
    "second": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "floor": "M-5 4.5L0-4.5L5 4.5z",
    "ceiling": "M0-5.5L5 0L0 5.5L-5 0z",
    "wrong": "M-4-4L4 4M4-4L-4 4",
}
Curve = list[tuple[float, dict]]  # (x, interval)
Point = tuple[float, float]


def tag(name: str, css: str = "", text: str = "", **attributes: Any) -> Markup:
    """An SVG element; numbers get one digit after the point, an underscore in a name is a hyphen."""
    pairs = {"class": css, **attributes} if css else attributes
    words = [
        f' {key.replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else escape(value)}"'
        for key, value in pairs.items()
    ]
    return Markup(f"<{name}{''.join(words)}>{escape(text)}</{name}>")


def path(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


class Axes:
    """A frame that places values: `x(value)`, `y(value)` in the pixels of an SVG."""

    def __init__(self, xs: tuple, ys: tuple, size: Point, left: int, right: int, falling: bool = False):
        """xs, ys: least and largest values. left, right: margins. falling: x goes from large to small."""
        (self.x0, self.x1), (self.y0, self.y1), self.falling = xs, ys, falling
        (self.width, self.height), self.left, self.right = size, left, size[0] - right
        self.top, self.foot = 22, self.height - 38

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0)
        return self.left + (1 - share if self.falling else share) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.top + (self.y1 - value) / (self.y1 - self.y0) * (self.foot - self.top)

    def rows(self) -> list[Markup]:
        """Horizontal grid lines with their numbers."""
        lines = []
        for value in ticks(self.y0, self.y1):
            css, y = "axis" if value == 0 else "grid", self.y(value)
            lines += [tag("line", css, x1=self.left, x2=self.right, y1=y, y2=y)]
            lines += [tag("text", x=self.left - 8, y=y + 4, text=short(value), text_anchor="end")]
        return lines

    def columns(self, name: str, values: dict[float, str] | None = None) -> list[Markup]:
        """The numbers along the x axis, or these words at these values, and its name."""
        values = values or {value: short(value) for value in ticks(self.x0, self.x1, 6)}
        words = [
            tag("text", x=self.x(value), y=self.foot + 16, text=text, text_anchor="middle")
            for value, text in values.items()
        ]
        middle = (self.left + self.right) / 2
        return [*words, tag("text", x=middle, y=self.height - 4, text=name, text_anchor="middle")]

    def upright(self, value: float) -> Markup:
        x = self.x(value)
        return tag("line", "axis", x1=x, x2=x, y1=self.top, y2=self.foot)

    def svg(self, title: str, parts: list) -> Markup:
        return svg(title, self.width, self.height, parts)


def svg(title: str, width: int, height: int, parts: list) -> Markup:
    """title: what is heard in place of the picture."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)
    return Markup("\n").join([head, *parts, Markup("</svg>")])


def curves(
    lines: dict[str, Curve],
    x_name: str,
    title: str,
    y_name: str = "",
    falling: bool = False,
    include: tuple[float, ...] = (),
    columns: dict[float, str] | None = None,
    paint: list[str] | None = None,
    window: Point | None = None,
    dashed: list[Point] | None = None,
    frame: tuple = ((490, 300), 60, 145),
) -> Markup | str:
    """Lines with interval bands, each named at its end; nothing where no value is known.

    include: values that the y axis shows in any case. columns: words along the x axis, at its values. paint:
    a class for each line. window: the part of the x axis that is shaded. dashed: one more line beside them.
    frame: size, left and right margin.
    """
    known = {name: [(x, p) for x, p in line if p["value"] is not None] for name, line in lines.items()}
    points = [point for line in known.values() for point in line]
    if not points:
        return ""
    ys = [v for _, p in points for v in p.values() if v is not None]
    ys += [*include, *(y for _, y in dashed or ())]
    xs = (min(columns), max(columns)) if columns else padded([x for x, _ in points])
    axes = Axes(xs, padded(ys), *frame, falling)
    parts = [shaded(axes, *window)] if window else []
    parts += [*axes.rows(), *axes.columns(x_name, columns)]
    parts += [axes.upright(0)] if columns and 0 in columns and min(columns) < 0 else []
    parts += [tag("text", x=axes.left, y=12, text=y_name)] if y_name else []
    if dashed:
        parts.append(polyline([(axes.x(x), axes.y(y)) for x, y in dashed], "dashed c0"))
    paint = paint or [f"c{i % COLOURS}" for i in range(len(lines))]
    for css, line in zip(paint, known.values(), strict=True):
        parts += curve(axes, line, css)
    ends = [axes.y(line[-1][1]["value"] if line else 0) for line in known.values()]
    for name, css, y in zip(lines, paint, spread(ends, 15, axes.top + 6, axes.foot), strict=True):
        fill = f"fill: var(--{css.split()[0]})"
        parts.append(tag("text", "label", x=axes.right + 8, y=y + 4, style=fill, text=name))
    return axes.svg(title, parts)


def curve(axes: Axes, line: Curve, css: str) -> list[Markup]:
    """One line with its band and dots."""
    whole = [(x, p) for x, p in line if None not in p.values()]
    outline = [(axes.x(x), axes.y(p["low"])) for x, p in whole]
    outline += [(axes.x(x), axes.y(p["high"])) for x, p in reversed(whole)]
    places = [(axes.x(x), axes.y(p["value"])) for x, p in line]
    dots = [tag("circle", css, cx=x, cy=y, r=2.6) for x, y in places]
    band = [tag("polygon", f"band {css}", points=path(outline))] if outline else []
    return [*band, *([polyline(places, f"curve {css}")] if places else []), *dots]


def polyline(places: list[Point], css: str) -> Markup:
    return tag("polyline", css, style="fill: none", points=path(places))


def shaded(axes: Axes, low: float, high: float, css: str = "window") -> Markup:
    """A part of the x axis, from the top of the frame to its foot."""
    return tag(
        "rect", css, x=axes.x(low), y=axes.top, width=axes.x(high) - axes.x(low), height=axes.foot - axes.top
    )


def forest(
    rows: list[tuple[str, list[dict[str, dict]], str]],
    x_name: str,
    title: str,
    marks: tuple[float, ...] = (0.0,),
    margin: Point | None = None,
    reach: Point = (-math.inf, math.inf),
    frame: tuple[int, int] = (460, 150),
) -> Markup | str:
    """Intervals beneath each other, with vertical lines at `marks` and a shaded margin.

    rows: name, lines of intervals by class or shape, and what is written behind them. reach: values beyond
    are drawn at its ends. frame: width and left margin.
    """
    values = [
        v
        for _, lines, _ in rows
        for line in lines
        for p in line.values()
        for v in p.values()
        if v is not None
    ]
    if not values:
        return ""
    low, high = padded([min(max(v, reach[0]), reach[1]) for v in [*values, *marks, *(margin or ())]])
    right = 122 if any(says for *_, says in rows) else 20
    count = sum(len(lines) for _, lines, _ in rows)
    (width, left), height = frame, 16 * count + 10 * len(rows) + 60
    axes = Axes((low, high), (0.0, 1.0), (width, height), left, right)
    parts = [shaded(axes, *margin, css="margin")] if margin else []
    parts += [*axes.columns(x_name), *map(axes.upright, marks)]
    y = axes.top + 10.0
    for name, lines, says in rows:
        parts.append(tag("text", "label", x=axes.left - 10, y=y + 4, text=name, text_anchor="end"))
        parts += [tag("text", x=axes.right + 8, y=y + 4, text=says)] if says else []
        for line in lines:
            for css, interval in line.items():
                ends = {end: v if v is None else min(max(v, low), high) for end, v in interval.items()}
                parts += ranged(axes, ends, css, y)
            y += 16
        y += 10
    return axes.svg(title, parts)


def ranged(axes: Axes, interval: dict, css: str, y: float) -> list[Markup]:
    """One interval, its value marked by its shape or a dot."""
    if interval["value"] is None:
        return []
    x, parts = axes.x(interval["value"]), []
    if None not in interval.values():
        ends = {"x1": axes.x(interval["low"]), "x2": axes.x(interval["high"])}
        parts.append(tag("line", f"ends {css}", **ends, y1=y, y2=y))
    if css in SHAPES:
        return [*parts, tag("path", css, transform=f"translate({x:.1f} {y:.1f})", d=SHAPES[css])]
    return [*parts, tag("circle", css, cx=x, cy=y, r=4)]


def scatter(points: list[dict], x_name: str, y_name: str, title: str, right: int = 30) -> Markup:
    """Circles: x, y, css, r, and words on hovering (says) and above (label, where there is one)."""
    xs, ys = padded([point["x"] for point in points]), padded([point["y"] for point in points])
    axes = Axes(xs, ys, (490, 380), 60, right)
    parts = [*axes.rows(), *axes.columns(x_name), tag("text", x=axes.left, y=12, text=y_name)]
    for point in points:
        x, y = axes.x(point["x"]), axes.y(point["y"])
        hover = tag("title", text=f"{point['says']}: {number(point['x'], 3)}, {number(point['y'], 2)}")
        opacity = f"fill-opacity: {point.get('opacity', 0.75)}"
        parts.append(tag("circle", point["css"], cx=x, cy=y, r=float(point["r"]), style=opacity, text=hover))
        if point.get("label"):
            parts.append(tag("text", "label", x=x, y=y - 11, text=point["label"], text_anchor="middle"))
    groups = dict.fromkeys((point["group"], point["css"]) for point in points if point.get("group"))
    for k, (name, css) in enumerate(groups):
        fill = f"fill: var(--{css})"
        parts.append(tag("text", "label", x=axes.right + 10, y=24 + 17 * k, style=fill, text=name))
    return axes.svg(title, parts)


def squares(table: list[list[float | None]], title: str, size: int = 10) -> Markup:
    """A table of values in [0, 1] as squares, the stronger the nearer to 1."""
    cells = []
    for r, row in enumerate(table):
        for c, value in enumerate(row):
            place = {"x": c * size, "y": r * size, "width": size, "height": size}
            cells.append(tag("rect", "cell", **place, fill_opacity=f"{min(max(value or 0, 0), 1):.2f}"))
    return svg(title, size * len(table[0]), size * len(table), cells)


def padded(values: list[float]) -> Point:
    """The least and the largest, with some room around them."""
    pad = 0.05 * (max(values) - min(values)) or abs(values[0]) * 0.05 or 1.0
    return min(values) - pad, max(values) + pad


def short(value: float) -> str:
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:g}").replace("-", "−")


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """At most about `count` round numbers in [low, high], low < high; steps are 1, 2 or 5 times a power of
    ten.
    """
    raw = (high - low) / count
    if raw < 1e-200:  # too near to each other for numbers between them
        return []
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to at least `gap`, in their order, kept within [low, high] where there is room."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[i] for i in order]
    for _ in range(50):
        for a, b in pairwise(range(len(moved))):
            short_by = gap - (moved[b] - moved[a])
            if short_by > 0:
                moved[a], moved[b] = moved[a] - short_by / 2, moved[b] + short_by / 2
        shift = max(low - moved[0], 0) or min(high - moved[-1], 0) if moved else 0
        moved = [m + shift for m in moved]
    return [moved[order.index(i)] for i in range(len(places))]
