"""A run folder of the transfer validator to one page, report.html, that needs nothing else.

    python -m analysis.report [FOLDER]        default: runs/transfer/default

Reads results.json and the picture sheets it names. Images are embedded, charts are inline SVG, and no network is loaded.
"""

import base64
import json
import math
import struct
import sys
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

import configs
from controls.stats import MARGIN

TEMPLATE = Path(__file__).with_name("report.html")
MARKS = {"kept": "✓", "weaker": "↓", "stronger": "↑", "dead": "✕", "reversed": "⇄", "unclear": "?", "undefined": "–"}
COLOURS = 7  # --c0 (the source) … --c6 of the template: Okabe and Ito's, darkened or lightened to be read as text
DASH = "–"
TINY_PX = 200  # below this an image is shown as pixels, not smoothed


def main() -> None:
    """`python -m analysis.report [FOLDER]`: writes the page and prints its path."""
    words = sys.argv[1:]
    if {"--help", "-h", "help"} & set(words):
        return print(__doc__)
    if len(words) > 1:
        raise configs.UserError("give one run folder: python -m analysis.report runs/transfer/default")
    print(build(Path(words[0] if words else "runs/transfer/default")))


def build(folder: Path) -> Path:
    """Writes report.html into a run folder from its results.json and images, and returns its path.

    Raises UserError where results.json is missing, broken or of another schema.
    """
    folder = Path(folder)
    page = render(read(folder), folder)
    with configs.replacing(folder / "report.html") as new:
        new.write_text(page, encoding="utf-8")
    return folder / "report.html"


def read(folder: Path) -> dict:
    """The results of a run folder, checked to be ours. Raises UserError."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise configs.UserError(f"no {path}; python -m analysis.transfer makes one") from None
    except ValueError as error:
        raise configs.UserError(f"{path} is not JSON ({error}); run analysis.transfer again") from None
    if not isinstance(results, dict) or results.get("schema") != 1 or not results.get("cells"):
        raise configs.UserError(f"{path} has no cells of schema 1; is it the record of analysis.transfer?")
    return results


def render(results: dict, folder: Path) -> str:
    """The page as text. folder: where the pictures' paths start."""
    cells = results["cells"]
    evaluators = evaluators_of(cells)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Which controls survive distillation",
        lead=escape(_lead(cells)),
        palette="\n".join(f".c{i} {{ stroke: var(--c{i}); fill: var(--c{i}); }}" for i in range(COLOURS)),
        verdicts="\n".join(verdict_list(group) for group in groups(cells).values()),
        second_note=escape(_second_note(evaluators)),
        heat=heat_map(cells),
        controls="\n".join(control_section(group, folder) for group in groups(cells).values()),
        command=escape(results.get("command", "")),
        stamp=escape(_stamp(results)),
        images=escape(_images(cells)),
        margin=f"[{MARGIN[0]:g}, {MARGIN[1]:g}]",
        config=escape(json.dumps(results.get("config", {}), indent=2, ensure_ascii=False)),
    )


def headline(cell: dict) -> str:
    """A cell in one sentence: "smile: kept on dmd at 0.93 [0.88, 0.98]; use scale 1.1"."""
    name, member, word = cell["control"], short(cell["target"], cell["source"]), cell["verdict"]
    if cell["source"] == cell["target"]:
        return f"{name}: trained on {member}, slope {ranged(cell['slope'], 3)} per unit of scale"
    if word == "undefined":
        return _no_effect(name, short(cell["source"]), f" on {member}")
    sentence = f"{name}: {word} on {member} at {ranged(cell['retention'])}; {_advice(cell)}"
    others = [f"by {who} {reading['verdict']}" for who, reading in cell.get("second", {}).items() if reading["verdict"] != word]
    return sentence + (f" ({', '.join(others)})" if others else "")


def groups(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The cells of each (control, source), in order of appearance, the source's own cell first."""
    found: dict[tuple[str, str], list[dict]] = {}
    for cell in sorted(cells, key=lambda c: c["source"] != c["target"]):
        found.setdefault((cell["control"], cell["source"]), []).append(cell)
    return found


def members_of(cells: list[dict]) -> list[str]:
    """The targets, sources first, in order of appearance."""
    return list(dict.fromkeys([c["target"] for c in cells if c["source"] == c["target"]] + [c["target"] for c in cells]))


def evaluators_of(cells: list[dict]) -> list[str]:
    """The evaluators, the primary one first."""
    return list(dict.fromkeys([cells[0]["evaluator"], *(name for c in cells for name in c.get("second", {}))]))


def readings(cell: dict) -> dict[str, dict]:
    """What each evaluator says of a cell: effect, slope, retention, verdict, monotonicity, matched_scale."""
    return {cell["evaluator"]: cell, **cell.get("second", {})}


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
    return f"{number(interval['value'], digits)} {brackets(interval, digits)}".removesuffix(f" [{DASH}, {DASH}]")


def brackets(interval: dict, digits: int = 2) -> str:
    """The ends of an interval as "[0.88, 0.98]"."""
    return f"[{number(interval['low'], digits)}, {number(interval['high'], digits)}]"


def percent(value: float | None) -> str:
    """A signed percentage, "+17.8 %"."""
    return DASH if number(value) == DASH else f"{'+' if value > 0 else ''}{number(value, 1)} %"


def verdict_list(group: list[dict]) -> str:
    """The sentences of one control, a mark before each."""
    targets = [c for c in group if c["source"] != c["target"]] or group
    if all(c["verdict"] == "undefined" for c in targets):
        return f'<ul>\n{_item("undefined", _no_effect(targets[0]["control"], short(targets[0]["source"])))}\n</ul>'
    items = [_item(c["verdict"], headline(c)) for c in targets]
    return f"<ul>\n{chr(10).join(items)}\n</ul>"


def heat_map(cells: list[dict]) -> str:
    """The table of the paper's T1: a row per control, a column per member, retention as colour."""
    members = members_of(cells)
    several = len({c["source"] for c in cells}) > 1
    head = "".join(f'<th scope="col">{escape(short(m, cells[0]["source"]))}</th>' for m in members)
    rows = []
    for (control, source), group in groups(cells).items():
        by_target = {c["target"]: c for c in group}
        under = " ".join(filter(None, [group[0].get("kind", ""), f"from {short(source)}" if several else ""]))
        columns = "".join(heat_cell(by_target[m]) if m in by_target else f"<td>{DASH}</td>" for m in members)
        rows.append(f'<tr><th scope="row">{escape(control)}<span class="from">{escape(under)}</span></th>{columns}</tr>')
    return f'<table class="heat">\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>'


def heat_cell(cell: dict) -> str:
    """One retention with its interval, verdicts and % CLIP change; the source's own cell is the 1 of its row."""
    clip = f"<small>CLIP {percent(cell['clip_change_percent'])}</small>"
    if cell["source"] == cell["target"]:
        return f"<td><strong>{DASH if cell['verdict'] == 'undefined' else 1}</strong><small>source</small>{clip}</td>"
    second = {who: f"{reading['verdict']} {number(reading['retention']['value'])}" for who, reading in cell.get("second", {}).items()}
    others = "".join(f"<small>{escape(who)}: {escape(says.removesuffix(f' {DASH}'))}</small>" for who, says in second.items())
    kept = cell["retention"]
    ends = f"<small>{brackets(kept)}</small>" if kept["value"] is not None else ""
    return (
        f'<td style="{_shade(kept["value"])}"><strong>{number(kept["value"])}</strong>{ends}'
        f"<small>{MARKS.get(cell['verdict'], '')} {escape(cell['verdict'])}</small>{others}{clip}</td>"
    )


def control_section(group: list[dict], folder: Path) -> str:
    """Curves by each evaluator, image strips of each member, and every number of one control."""
    control, source = group[0]["control"], group[0]["source"]
    charts = "\n".join(chart_figure(group, who) for who in evaluators_of(group))
    strips = "\n".join(strip(cell, folder) for cell in group)
    about = f"{group[0].get('kind', 'control')}, trained on {source}"
    return (
        f'<section>\n<h2>{escape(control)}</h2>\n<p class="note">{escape(about)}</p>\n'
        f'<h3>Effect over scale</h3>\n<div class="charts">\n{charts}\n</div>\n'
        f'<h3>Images</h3>\n<div class="strips">\n{strips}\n</div>\n'
        f"<details><summary>Every number of {escape(control)}</summary>\n{numbers_table(group)}\n</details>\n</section>"
    )


def strip(cell: dict, folder: Path) -> str:
    """The picture sheet of a cell, one column per scale, embedded."""
    member = short(cell["target"], cell["source"])
    says = "trained here" if cell["source"] == cell["target"] else f"{cell['verdict']} {ranged(cell['retention'])}".removesuffix(f" {DASH}")
    caption = f"<figcaption><b>{escape(member)}</b> · {escape(says)}</figcaption>"
    path = folder / cell["picture"] if cell.get("picture") else None
    if path is None or not path.is_file():
        return f'<figure class="strip">{caption}<p class="note">No pictures were kept.</p></figure>'
    data = path.read_bytes()
    width, height = png_size(data)
    pixels = " pixels" if width < TINY_PX * len(cell["scales"]) else ""
    heads = "".join(f"<span>{_scale(s)}</span>" for s in cell["scales"])
    alt = f"{cell['control']} on {member}: one row per prompt and seed, scales {', '.join(map(_scale, cell['scales']))} from left to right"
    source = base64.b64encode(data).decode()
    return (
        f'<figure class="strip{pixels}">{caption}<div class="heads" aria-hidden="true">{heads}</div>'
        f'<img alt="{escape(alt)}" width="{width}" height="{height}" loading="lazy" src="data:image/png;base64,{source}"></figure>'
    )


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header. Raises UserError for another format."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise configs.UserError("a picture of the run is not a PNG file; run analysis.transfer again with overwrite=true")
    return struct.unpack(">II", data[16:24])


def numbers_table(group: list[dict]) -> str:
    """All numbers of one control: a row per member and evaluator."""
    heads = ["member", "by", "slope", "retention", "verdict", "matched scale", "monotonicity", "preservation", "CLIP change"]
    heads += [f"at {_scale(s)}" for s in group[0]["scales"]]
    rows = [_numbers_row(cell, who, reading) for cell in group for who, reading in readings(cell).items()]
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "\n".join(rows)
    return f'<div class="wide"><table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def chart_figure(group: list[dict], evaluator: str) -> str:
    """The dose-response curves of one control by one evaluator, with a caption."""
    curves = {short(c["target"], c["source"]): readings(c)[evaluator]["effect"] for c in group if evaluator in readings(c)}
    alt = "; ".join(f"{name} {ranged(effect[-1], 3)}" for name, effect in curves.items())
    title = f"{group[0]['control']} by {evaluator}, effect over scale; at the largest scale: {alt}"
    caption = f"<figcaption><b>by {escape(evaluator)}</b></figcaption>"
    return f"<figure>{caption}{chart(group[0]['scales'], curves, title)}</figure>"


def chart(scales: list[float], curves: dict[str, list[dict]], title: str, width: int = 460, height: int = 300) -> str:
    """Curves with interval bands as inline SVG, each labelled at its right end.

    curves: name -> one interval per scale, in the order of the colours.
    """
    left, right, top, bottom = 60, 92, 10, 36
    values = [v for points in curves.values() for p in points for v in p.values() if v is not None] + [0.0]
    pad = 0.04 * (max(values) - min(values)) or 1.0
    low, high = min(values) - pad, max(values) + pad

    def at(s: float, v: float) -> tuple[float, float]:
        x = left + (s - scales[0]) / (scales[-1] - scales[0]) * (width - left - right)
        return x, top + (high - v) / (high - low) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts += [_horizontal(at, scales, v, left) for v in ticks(low, high)]
    parts += [_vertical(at, s, low, high, height - bottom) for s in scales]
    parts.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 2}" text-anchor="middle">scale</text>')
    colours = [f"c{i % COLOURS}" for i in range(len(curves))]
    parts += [_band(at, scales, points, c) for points, c in zip(curves.values(), colours, strict=True)]
    parts += [_line(at, scales, points, c) for points, c in zip(curves.values(), colours, strict=True)]
    ends = spread([at(scales[-1], points[-1]["value"])[1] for points in curves.values()], 16, top + 6, height - bottom)
    for name, colour, y in zip(curves, colours, ends, strict=True):
        parts.append(f'<text class="label" x="{width - right + 8}" y="{y + 4:.1f}" style="fill: var(--{colour})">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """At most about `count` round numbers within [low, high], low < high; steps are 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
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


def _horizontal(at, scales: list[float], value: float, left: float) -> str:
    (x0, y), (x1, _) = at(scales[0], value), at(scales[-1], value)
    kind = "axis" if value == 0 else "grid"
    line = f'<line class="{kind}" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    text = f"{value:.3g}".replace("-", "−")
    return line + f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _vertical(at, scale: float, low: float, high: float, foot: float) -> str:
    (x, y0), (_, y1) = at(scale, low), at(scale, high)
    line = f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/>' if scale == 0 else ""
    return line + f'<text x="{x:.1f}" y="{foot + 16}" text-anchor="middle">{_scale(scale)}</text>'


def _band(at, scales: list[float], points: list[dict], colour: str) -> str:
    ends = [(at(s, p["low"]), at(s, p["high"])) for s, p in zip(scales, points, strict=True) if None not in p.values()]
    outline = [low for low, _ in ends] + [high for _, high in reversed(ends)]
    return f'<polygon class="band {colour}" points="{_path(outline)}"/>'


def _line(at, scales: list[float], points: list[dict], colour: str) -> str:
    places = [at(s, p["value"]) for s, p in zip(scales, points, strict=True)]
    dots = "".join(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places)
    return f'<polyline class="curve {colour}" style="fill: none" points="{_path(places)}"/>{dots}'


def _path(places: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _numbers_row(cell: dict, who: str, reading: dict) -> str:
    own = cell["source"] == cell["target"]
    matched = reading["matched_scale"]
    fields = [
        ranged(reading["slope"], 3),
        ranged(reading["retention"]),
        "source" if own else reading["verdict"],
        ranged(matched),
        number(reading.get("monotonicity")),
        number(cell["preservation"]),
        percent(cell["clip_change_percent"]),
        *(ranged(point, 3) for point in reading["effect"]),
    ]
    columns = "".join(f"<td>{escape(f)}</td>" for f in fields)
    return f'<tr><th scope="row">{escape(short(cell["target"], cell["source"]))}</th><td>{escape(who)}</td>{columns}</tr>'


def _item(word: str, sentence: str) -> str:
    return f'<li><span class="mark" aria-hidden="true">{MARKS.get(word, "")}</span>{escape(sentence)}</li>'


def _no_effect(control: str, source: str, where: str = "") -> str:
    return f"{control}: undefined{where}; its effect on {source} itself cannot be told from none"


def _advice(cell: dict) -> str:
    value = cell["matched_scale"]["value"]
    return f"use scale {number(value, 1)}" if value is not None else f"no scale up to {_scale(cell['scales'][-1])} gives the same effect"


def _shade(value: float | None) -> str:
    """Hue and strength of a retention: none at 1, full at half or less and at double or more."""
    if value is None:
        return ""
    distance = min(abs(math.log2(value)) if value > 0 else 1.0, 1.0)
    return f"--hue: var(--{'less' if value < 1 else 'more'}); --weight: {0.04 + 0.46 * distance:.2f}"


def _scale(value: float) -> str:
    return f"{'+' if value > 0 else ''}{value:g}".replace("-", "−")


def _lead(cells: list[dict]) -> str:
    controls, members = len({c["control"] for c in cells}), len({c["target"] for c in cells if c["target"] != c["source"]})
    sources = ", ".join(dict.fromkeys(c["source"] for c in cells))
    ones = f"{controls} control{'s' * (controls != 1)} trained on {sources}, tried on {members} other model{'s' * (members != 1)}"
    return f"{ones} without retraining. {_images(cells)}"


def _second_note(evaluators: list[str]) -> str:
    return f"Measured by {evaluators[0]}; beneath it the verdict by {', '.join(evaluators[1:])}." if evaluators[1:] else ""


def _images(cells: list[dict]) -> str:
    counts = {(c["prompts"], c["seeds"], len(c["scales"])) for c in cells}
    each = " or ".join(f"{p} prompts × {s} seeds × {k} scales" for p, s, k in sorted(counts))
    return f"{each} per control and model, {sum(c['images'] for c in cells)} images in all."


def _stamp(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    return " · ".join(filter(None, [results.get("created"), f"{results.get('seconds', 0):.0f} s", versions]))


if __name__ == "__main__":
    configs.entry(main)
