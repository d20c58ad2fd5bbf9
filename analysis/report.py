"""A run folder of the transfer validator to one page, report.html, that needs nothing else.

    python -m analysis.report [FOLDER]        default: runs/transfer/default

Reads results.json and the picture sheets it names. Images are embedded, charts are inline SVG, and no network is loaded.
"""

import json
import math
import sys
from html import escape
from pathlib import Path
from string import Template

import configs
from analysis.page import DASH, brackets, chart, embedded, number, percent, png_size, ranged, short, signed, spread, ticks, whole  # noqa: F401
from controls.stats import MARGIN

BODY = Path(__file__).with_name("report.html")
MARKS = {"kept": "✓", "weaker": "↓", "stronger": "↑", "dead": "✕", "reversed": "⇄", "unclear": "?", "undefined": "–"}
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
    body = Template(BODY.read_text(encoding="utf-8")).substitute(
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
    return whole("Which controls survive distillation", _lead(cells), body)


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
    width, height = png_size(path.read_bytes())
    pixels = " pixels" if width < TINY_PX * len(cell["scales"]) else ""
    heads = "".join(f"<span>{signed(s)}</span>" for s in cell["scales"])
    alt = f"{cell['control']} on {member}: one row per prompt and seed, scales {', '.join(map(signed, cell['scales']))} from left to right"
    return (
        f'<figure class="strip{pixels}">{caption}<div class="heads" aria-hidden="true">{heads}</div>'
        f'<img alt="{escape(alt)}" width="{width}" height="{height}" loading="lazy" src="{embedded(path)}"></figure>'
    )


def numbers_table(group: list[dict]) -> str:
    """All numbers of one control: a row per member and evaluator."""
    heads = ["member", "by", "slope", "retention", "verdict", "matched scale", "monotonicity", "preservation", "CLIP change"]
    heads += [f"at {signed(s)}" for s in group[0]["scales"]]
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
    return f"use scale {number(value, 1)}" if value is not None else f"no scale up to {signed(cell['scales'][-1])} gives the same effect"


def _shade(value: float | None) -> str:
    """Hue and strength of a retention: none at 1, full at half or less and at double or more."""
    if value is None:
        return ""
    distance = min(abs(math.log2(value)) if value > 0 else 1.0, 1.0)
    return f"--hue: var(--{'less' if value < 1 else 'more'}); --weight: {0.04 + 0.46 * distance:.2f}"


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
