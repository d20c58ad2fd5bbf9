"""What every page of the project is made of: a frame that needs no network, numbers in words, picture sheets
with a dial, charts as SVG.

Imports no torch. The frame is page.html, its style page.css, its script page.js; a page's own part is its
body.
"""

import base64
import io
import json
import math
import struct
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

from PIL import Image

from configs import UserError
from configs.errors import cut

FRAME, STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}") for kind in ("html", "css", "js"))
COLOURS = 7  # --c0 … --c6 of page.css: Okabe and Ito's, darkened or lightened to be read as text
DASH = "–"
KINDS = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".jpg": "image/jpeg"}
TILE_PX = 256  # a page is mailed: wider tiles of a sheet are embedded at this width
TINY_PX = 200  # below this a tile is shown as pixels, not smoothed


def whole(title: str, lead: str, body: str) -> str:
    """A body (HTML) as a whole page with style and script; a browser that opens it asks the network for
    nothing.

    title, lead: plain text.
    """
    frame, style, script = (path.read_text(encoding="utf-8") for path in (FRAME, STYLE, SCRIPT))
    return Template(frame).substitute(
        title=escape(title), lead=escape(lead), style=style, script=script, body=body
    )


def short(member: str, beside: str | None = None) -> str:
    """A member without its family, unless it stands beside one of another family."""
    family, _, name = member.rpartition("/")
    return member if beside and beside.rpartition("/")[0] != family else name


def number(value: float | None, digits: int = 2) -> str:
    """A number in words: fixed digits, a true minus sign, a dash for None or what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


def ranged(interval: dict, digits: int = 2) -> str:
    """An interval as "0.93 [0.88, 0.98]"."""
    return f"{number(interval['value'], digits)} {brackets(interval, digits)}".removesuffix(
        f" [{DASH}, {DASH}]"
    )


def side(interval: dict, place: float) -> int:
    """On which side of a place an interval lies with both ends: -1 below, 1 above, 0 on neither, or where it
    has no ends.
    """
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return 0
    return (low > place) - (high < place)


def brackets(interval: dict, digits: int = 2) -> str:
    """The ends of an interval as "[0.88, 0.98]"."""
    return f"[{number(interval['low'], digits)}, {number(interval['high'], digits)}]"


def percent(value: float | None) -> str:
    """A signed percentage, "+17.8 %"."""
    return DASH if number(value) == DASH else f"{'+' if value > 0 else ''}{number(value, 1)} %"


def signed(value: float) -> str:
    """A scale as "+1", "0", "−0.5"."""
    return f"{'+' if value > 0 else ''}{value:g}".replace("-", "−")


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header. Raises UserError for another format."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise UserError("a picture of the run is not a PNG file; draw it again with overwrite=true")
    width, height = struct.unpack(">II", data[16:24])
    if not (width and height):
        raise UserError("a picture of the run has no pixels; draw it again with overwrite=true")
    return width, height


def embedded(path: Path, width_px: int | None = None) -> str:
    """A picture file as the text that an image's src holds; one wider than width_px is embedded smaller, as
    WebP. Raises UserError.
    """
    if path.suffix not in KINDS:
        raise UserError(f"{path} is no picture of a page; those are {', '.join(KINDS)}")
    data, kind = path.read_bytes(), KINDS[path.suffix]
    if width_px and png_size(data)[0] > width_px:
        try:
            with Image.open(io.BytesIO(data)) as picture:
                size = (width_px, max(1, round(picture.height * width_px / picture.width)))
                picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(
                    file := io.BytesIO(), "WEBP", quality=85
                )
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{path} is damaged ({cut(str(error), 100)}); draw it again with overwrite=true"
            ) from None
        data, kind = file.getvalue(), KINDS[".webp"]
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def sheet(path: Path, heads: list[str], caption: str, alt: str) -> str:
    """A PNG sheet of len(heads) columns as a figure; inside a [data-sheets] a dial shows one of its columns,
    without script all are shown.

    caption: HTML. heads, alt: plain text.
    """
    width, height = png_size(path.read_bytes())
    pixels = " pixels" if width < TINY_PX * len(heads) else ""
    names = "".join(f"<span>{escape(h)}</span>" for h in heads)
    return (
        f'<figure class="strip{pixels}" style="--count: {len(heads)}"><figcaption>{caption}</figcaption>'
        f'<div class="heads" aria-hidden="true">{names}</div><div class="view"><img alt="{escape(alt)}" width="{width}" height="{height}" '
        f'src="{embedded(path, TILE_PX * len(heads))}"></div></figure>'
    )


def dial(name: str, values: list[float], labels: list[str], start: int, whole: str) -> str:
    """A range input over the columns of the sheets beside it, and a box that shows whole sheets.

    name: what the input is called, "scale of smile". values: what the columns stand for; the page's own dial,
    which is outside of any [data-sheets], turns all others to their nearest value. labels: the same in words.
    whole: the box in words.
    """
    data = (
        f"data-values='{json.dumps(values)}' data-labels='{escape(json.dumps(labels, ensure_ascii=False))}'"
    )
    return (
        f'<div class="dial"><label class="turn"><span class="name">{escape(name)}</span>'
        f'<input type="range" min="0" max="{len(values) - 1}" step="1" value="{start}" aria-valuetext="{escape(labels[start])}" {data}>'
        f'<span class="says" aria-hidden="true">{escape(labels[start])}</span></label>'
        f'<label class="unfold"><input type="checkbox" data-whole> {escape(whole)}</label></div>'
    )


def scrolled(table: str, name: str) -> str:
    """A wide table in a frame that scrolls by itself, with the keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">\n{table}\n</div>'


def chart(
    scales: list[float],
    curves: dict[str, list[dict]],
    title: str,
    width: int = 380,
    height: int = 270,
    window: list[bool] | None = None,
    colours: list[int] | None = None,
    dashed: tuple[str, ...] = (),
) -> str:
    """Curves with interval bands as inline SVG, each labelled at its right end.

    curves: name -> one interval per scale. window: the scales to shade, from the first to the last of them.
    colours: of each curve, a number of page.css's palette; in its order unless given. dashed: the names of
    curves that are there for comparison.
    """
    left, right, top, bottom = 46, 98, 10, 36
    values = [v for points in curves.values() for p in points for v in p.values() if v is not None] + [0.0]
    pad = 0.04 * (max(values) - min(values)) or 1.0
    low, high = min(values) - pad, max(values) + pad

    def at(s: float, v: float) -> tuple[float, float]:
        x = left + (s - scales[0]) / (scales[-1] - scales[0]) * (width - left - right)
        return x, top + (high - v) / (high - low) * (height - top - bottom)

    paint = [
        f"c{i % COLOURS}{' dashed' * (name in dashed)}"
        for i, name in zip(colours or range(len(curves)), curves, strict=True)
    ]
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts += (
        [_shaded(at, [s for s, inside in zip(scales, window, strict=True) if inside], low, high)]
        if window
        else []
    )
    parts += [_horizontal(at, scales, v, left) for v in ticks(low, high)]
    parts += [_vertical(at, s, low, high, height - bottom) for s in scales]
    parts.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">scale</text>'
    )
    parts += [_band(at, scales, points, c) for points, c in zip(curves.values(), paint, strict=True)]
    parts += [_line(at, scales, points, c) for points, c in zip(curves.values(), paint, strict=True)]
    ends = spread(
        [at(scales[-1], points[-1]["value"])[1] for points in curves.values()], 16, top + 6, height - bottom
    )
    for name, colour, y in zip(curves, paint, ends, strict=True):
        fill = f"fill: var(--{colour.split()[0]})"
        parts.append(
            f'<text class="label" x="{width - right + 8}" y="{y + 4:.1f}" style="{fill}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """At most about `count` round numbers within [low, high], low < high; steps are 1, 2 or 5 times a power
    of ten.
    """
    raw = (high - low) / count
    if raw < 1e-200:  # too near to each other for numbers between them
        return []
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to at least `gap`, in their order, kept within [low, high] where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(50):
        for a, b in pairwise(range(len(moved))):
            short_by = gap - (moved[b] - moved[a])
            if short_by > 0:
                moved[a], moved[b] = moved[a] - short_by / 2, moved[b] + short_by / 2
        shift = max(low - moved[0], 0) or min(high - moved[-1], 0) if moved else 0
        moved = [m + shift for m in moved]
    return [moved[order.index(i)] for i in range(len(places))]


def _shaded(at, scales: list[float], low: float, high: float) -> str:
    (x0, y0), (x1, y1) = at(scales[0], high), at(scales[-1], low)
    return f'<rect class="window" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"/>'


def _horizontal(at, scales: list[float], value: float, left: float) -> str:
    (x0, y), (x1, _) = at(scales[0], value), at(scales[-1], value)
    kind = "axis" if value == 0 else "grid"
    line = f'<line class="{kind}" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    text = f"{value:.3g}".replace("-", "−")
    return line + f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _vertical(at, scale: float, low: float, high: float, foot: float) -> str:
    (x, y0), (_, y1) = at(scale, low), at(scale, high)
    line = f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/>' if scale == 0 else ""
    return line + f'<text x="{x:.1f}" y="{foot + 16}" text-anchor="middle">{signed(scale)}</text>'


def _band(at, scales: list[float], points: list[dict], colour: str) -> str:
    ends = [
        (at(s, p["low"]), at(s, p["high"]))
        for s, p in zip(scales, points, strict=True)
        if None not in p.values()
    ]
    outline = [low for low, _ in ends] + [high for _, high in reversed(ends)]
    return f'<polygon class="band {colour}" points="{_path(outline)}"/>'


def _line(at, scales: list[float], points: list[dict], colour: str) -> str:
    places = [at(s, p["value"]) for s, p in zip(scales, points, strict=True)]
    dots = "".join(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places)
    return f'<polyline class="curve {colour}" style="fill: none" points="{_path(places)}"/>{dots}'


def _path(places: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
