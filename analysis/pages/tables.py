"""The tables of the transfer report, as HTML: the heat map, leakage, references, and every number of a
control.
"""

import math
from html import escape

from analysis.pages.html import DASH, brackets, number, percent, ranged, scrolled, short, signed
from analysis.pages.words import groups, is_own, is_verdict, members_of, readings, references, where

MARKS = {
    "kept": "✓",
    "weaker": "↓",
    "stronger": "↑",
    "dead": "✕",
    "reversed": "⇄",
    "unclear": "?",
    "undefined": "–",
}
EMPTY = {"value": None, "low": None, "high": None}
# of a control's numbers: how each is read from a cell and an evaluator's reading of it; a column of dashes is
# left out
COLUMNS = {
    "slope": lambda cell, reading: ranged(reading["slope"], 3),
    "retention": lambda cell, reading: ranged(reading["retention"]),
    "verdict": lambda cell, reading: (
        reading["verdict"] if is_verdict(cell) else "source" if is_own(cell) else "for comparison"
    ),
    "p equivalent": lambda cell, reading: small(_deep(reading, "equivalence", "p_holm")),
    "p different": lambda cell, reading: small(_deep(reading, "difference", "p_holm")),
    "matched scale": lambda cell, reading: ranged(reading["matched_scale"]),
    "most reached": lambda cell, reading: _reach(reading["matched_scale"].get("reach")),
    "area": lambda cell, reading: ranged(_deep(reading, "shape", "area") or EMPTY, 3),
    "saturates at": lambda cell, reading: (
        _deep(reading, "shape", "saturation") and signed(reading["shape"]["saturation"])
    ),
    "monotonicity": lambda cell, reading: number(reading.get("monotonicity")),
    "right sign": lambda cell, reading: number(_deep(reading, "shape", "signs")),
    "smoothness": lambda cell, reading: number(_deep(reading, "shape", "smoothness")),
    "preservation": lambda cell, reading: number(reading.get("preservation", cell.get("preservation"))),
    "preservation at equal effect": lambda cell, reading: _matched(_deep(reading, "preservation_matched")),
    "CLIP change": lambda cell, reading: percent(cell.get("clip_change_percent")),
}


def small(p: float | None) -> str:
    """A p value, "0.032" or "< 0.001"."""
    return "< 0.001" if p is not None and p < 0.001 else number(p, 3)


def heat_map(cells: list[dict]) -> str:
    """The table of the paper's T1: a row per control, a column per member, retention as colour; comparisons
    stand apart.
    """
    members, home = members_of(cells), cells[0]["source"]
    apart = [m for m in members if any(c["target"] == m and c.get("reference") for c in cells)]
    first = apart[:1]
    over = f'<tr><td></td><th scope="colgroup" colspan="{len(members) - len(apart)}">tried on</th>'
    over += (
        f'<th scope="colgroup" colspan="{len(apart)}" class="apart">for comparison</th></tr>'
        if apart
        else "</tr>"
    )
    names = "".join(
        f'<th scope="col"{_class("apart" * (m in first))}>{escape(short(m, home))}</th>' for m in members
    )
    rows = "\n".join(_heat_row(group, members, first, home) for group in groups(cells).values())
    table = f'<table class="heat">\n<thead>{over}<tr><td></td>{names}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'
    return scrolled(table, "Retention of each control on each model")


def _heat_row(group: list[dict], members: list[str], first: list[str], home: str) -> str:
    by_target = {c["target"]: c for c in group}
    columns = "".join(heat_cell(by_target.get(m), "apart" * (m in first)) for m in members)
    away = (
        f' <span class="away">from {escape(short(group[0]["source"], home))}</span>'
        if group[0]["source"] != home
        else ""
    )
    kind = f'<span class="from">{escape(group[0].get("kind", ""))}</span>'
    return f'<tr><th scope="row">{escape(group[0]["control"])}{away}{kind}</th>{columns}</tr>'


def heat_cell(cell: dict | None, kind: str = "") -> str:
    """One retention with its interval, verdicts and % CLIP change; the source's own is the 1 of its row."""
    if cell is None:
        return f"<td{_class(kind)}>{DASH}</td>"
    clip = f"<small>CLIP {percent(cell.get('clip_change_percent'))}</small>"
    if is_own(cell):
        one = DASH if cell["verdict"] == "undefined" else 1
        return f"<td{_class(f'{kind} own')}><strong>{one}</strong><small>source</small>{clip}</td>"
    kept, verdict = cell["retention"], escape(cell["verdict"])
    ends = f"<small>{brackets(kept)}</small>" if kept["value"] is not None else ""
    word = f" {MARKS.get(verdict, '')} {verdict}" if is_verdict(cell) else ""
    others = "".join(
        f"<small>{escape(f'{evaluator_name} {_second(cell, reading)}')}</small>"
        for evaluator_name, reading in list(readings(cell).items())[1:]
    )
    style = f' style="{shade(kept["value"])}"'
    return f"<td{_class(kind)}{style}><strong>{number(kept['value'])}</strong>{word}{ends}{others}{clip}</td>"


def _second(cell: dict, reading: dict) -> str:
    """Another evaluator's retention, and its verdict."""
    word = reading["verdict"] if is_verdict(cell) else ""
    return " ".join(
        filter(
            None,
            [
                number(reading["retention"]["value"]) if reading["retention"]["value"] is not None else "",
                word,
            ],
        )
    )


def shade(value: float | None) -> str:
    """Hue and strength of a retention: none at 1, full at half or less and at double or more."""
    if value is None:
        return ""
    distance = min(abs(math.log2(value)) if value > 0 else 1.0, 1.0)
    return f"--hue: var(--{'less' if value < 1 else 'more'}); --weight: {0.04 + 0.46 * distance:.2f}"


def leakage(rows: list[dict], home: str) -> str:
    """Control × attribute matrices, one per target and evaluator, with the choice of one of them."""
    targets, evaluator_name = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("target", "evaluator")
    )
    select = _select("target", "on", {t: short(t, home) for t in targets}) + _select(
        "evaluator", "by", {w: w for w in evaluator_name}
    )
    parts = [
        matrix([r for r in rows if (r["target"], r["evaluator"]) == (t, w)], t, w, home)
        for w in evaluator_name
        for t in targets
    ]
    return f'<div data-choices>\n<p class="choose">{select}</p>\n{chr(10).join(parts)}\n</div>'


def _select(key: str, name: str, options: dict[str, str]) -> str:
    inner = "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items()
    )
    return f'<label for="choose-{key}">{name}</label> <select id="choose-{key}" data-choice="{key}">{inner}</select> '


def matrix(rows: list[dict], target: str, evaluator: str, home: str) -> str:
    """How far each control moves each attribute on one target, as a share of what the attribute's own control
    does.
    """
    if not rows:
        return ""
    found = {(r["control"], r["attribute"]): r["share"] or EMPTY for r in rows}
    controls, attributes = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    head = "".join(f'<th scope="col">{escape(a)}</th>' for a in attributes)
    lines = [
        f'<tr><th scope="row">{escape(c)}</th>{"".join(_leak(found.get((c, a), EMPTY), c == a) for a in attributes)}</tr>'
        for c in controls
    ]
    caption = f"<caption>on {escape(short(target, home))}, by {escape(evaluator)}</caption>"
    table = f'<table class="heat leak">{caption}\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody></table>'
    data = f'data-part data-target="{escape(target)}" data-evaluator="{escape(evaluator)}"'
    return f"<div {data}>{scrolled(table, f'Leakage on {target} by {evaluator}')}</div>"


def _leak(share: dict, own: bool) -> str:
    value, low, high = share["value"], share["low"], share["high"]
    sure = None not in (low, high) and not low <= 0 <= high
    weight = 0 if own or value is None else min(abs(value), 1.0)
    style = f"--hue: var(--{'less' if (value or 0) < 0 else 'more'}); --weight: {0.04 + 0.46 * weight:.2f}"
    text = f"<strong>{number(value)}</strong>" if sure else number(value)
    return f'<td{_class("own" * own)} style="{style}">{text}<small>{"" if value is None else brackets(share)}</small></td>'


def reference_table(cells: list[dict]) -> str:
    """What each retention is to be read against; empty where nothing was measured for comparison."""
    found = groups([c for c in cells if is_verdict(c) and references(c)]).values()
    heads = ["control", "on", "retention", "floor", "ceiling", "wrong control", "normalised", "drawn again"]
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "\n".join(_reference_row(c, len(group) * (c is group[0])) for group in found for c in group)
    table = f'<table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return scrolled(table, "References of each retention") if body else ""


def _reference_row(cell: dict, rows: int) -> str:
    """A cell's row; the first one of a control names it for so many rows."""
    found = references(cell)
    names = {
        key: f'<small class="from">{escape(found.get(key, {}).get("control", ""))}</small>'
        for key in ("ceiling", "wrong")
    }
    fields = [
        ranged(cell["retention"]),
        ranged(found.get("floor", {}).get("share") or EMPTY),
        *(ranged(found.get(key, {}).get("share") or EMPTY) + name for key, name in names.items()),
        ranged(found.get("normalised", EMPTY)),
        ranged(found.get("rerun", {}).get("effect") or EMPTY, 3),
    ]
    head = f'<th scope="rowgroup" rowspan="{rows}">{escape(cell["control"])}</th>' if rows else ""
    return (
        f'<tr>{head}<th scope="row">{escape(where(cell))}</th>'
        + "".join(f"<td>{f}</td>" for f in fields)
        + "</tr>"
    )


def numbers_table(group: list[dict]) -> str:
    """All numbers of one control: a row per member and evaluator."""
    pairs = [
        (cell, evaluator_name, reading)
        for cell in group
        for evaluator_name, reading in readings(cell).items()
    ]
    columns = {
        name: [read(cell, reading) or DASH for cell, _, reading in pairs] for name, read in COLUMNS.items()
    }
    columns = {name: column for name, column in columns.items() if set(column) != {DASH}}
    columns |= {
        f"at {signed(s)}": [ranged(r["effect"][k], 3) for _, _, r in pairs]
        for k, s in enumerate(group[0]["scales"])
    }
    head = "".join(f'<th scope="col">{name}</th>' for name in ("on", "by", *columns))
    rows = [
        f'<tr><th scope="row">{escape(where(cell))}</th><td class="by">{escape(evaluator_name)}</td>'
        + "".join(f"<td>{escape(f)}</td>" for f in fields)
        + "</tr>"
        for (cell, evaluator_name, _), fields in zip(pairs, zip(*columns.values(), strict=True), strict=True)
    ]
    table = f'<table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table>'
    return scrolled(table, f"Every number of {group[0]['control']}")


def _deep(found: dict | None, *keys: str):
    """What stands under one key after another; None where one is missing."""
    for key in keys:
        found = (found or {}).get(key)
    return found


def _reach(reach: dict | None) -> str:
    return f"{100 * reach['share']:.0f} % at {number(reach['scale'], 1)}".replace("-", "−") if reach else DASH


def _matched(found: dict | None) -> str:
    return (
        f"{number(found['target'])}, source {number(found['source'])}, difference {ranged(found['difference'])}"
        if found
        else DASH
    )


def _class(names: str) -> str:
    return f' class="{names.strip()}"' if names.strip() else ""
