"""The cells of the transfer validator's record: in groups, in order, and in sentences.

Plain text, no HTML, no torch.
"""

import math

DASH = "–"
EMPTY = {"value": None, "low": None, "high": None}
MARKS = {
    "kept": "✓",
    "weaker": "↓",
    "stronger": "↑",
    "dead": "✕",
    "reversed": "⇄",
    "unclear": "?",
    "undefined": "–",
}
WORDS = (
    "kept",
    "weaker",
    "stronger",
    "dead",
    "reversed",
    "unclear",
    "undefined",
)  # the verdicts, best news first


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


def percent(interval: dict) -> str:
    """A signed percentage with its interval, "+17.8 % [12.1, 23.5]"; a dash where there is none."""
    value = interval["value"]
    if number(value) == DASH:
        return DASH
    return f"{'+' if value > 0 else ''}{number(value, 1)} % {brackets(interval, 1)}"


def signed(value: float) -> str:
    """A scale as "+1", "0", "−0.5"."""
    return f"{'+' if value > 0 else ''}{value:g}".replace("-", "−")


def shown(interval: dict | None, digits: int = 3) -> str:
    """An interval in a table; a dash where there is none."""
    return DASH if not interval or interval["value"] is None else ranged(interval, digits)


def small(p: float | None) -> str:
    """A p value, "0.032" or "< 0.001"."""
    return "< 0.001" if p is not None and p < 0.001 else number(p, 3)


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 prompt", "12 prompts"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def design(cell: dict) -> str:
    """How many images a cell is made of: "12 prompts × 4 seeds"."""
    return f"{cell['prompts']} prompts × {cell['seeds']} seeds"


def listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def scale_labels(scales: list[float]) -> list[str]:
    return [f"scale {signed(scale)}" for scale in scales]


def start_of(scales: list[float]) -> int:
    """Where a dial over scales stands at first: at 1, else at the last."""
    return scales.index(1) if 1 in scales else len(scales) - 1


def stamp(results: dict) -> str:
    """When a record was made, how long that took, with what."""
    return f"{results['created']} · {results['seconds']:.0f} s · {listed(results['versions'])}"


def led(cell: dict) -> dict:
    """A cell with what its first evaluator reads in the cell itself, as pages and tables show it."""
    return {**cell, **next(iter(cell["readings"].values()))}


def is_own(cell: dict) -> bool:
    """Whether a cell is its control's on its own source."""
    return cell["source"] == cell["target"]


def is_verdict(cell: dict) -> bool:
    """Whether a cell says something about transfer: neither the source's own nor for comparison only."""
    return not is_own(cell) and not cell["reference"]


def where(cell: dict) -> str:
    """The target in short: "dmd", "base:few(4)"."""
    return short(cell["target"], cell["source"])


def adapted(cells: list[dict]) -> list[str]:
    """What adapting brought, a sentence each: "watercolour-kv on dmd: 0.20 weaker, adapted 0.97 kept"."""
    retentions = {(c["control"], c["target"]): f"{ranged(c['retention'])} {c['verdict']}" for c in cells}
    return [
        f"{c['adapted_from']} on {where(c)}: {retentions[c['adapted_from'], c['target']]}, adapted "
        f"{retentions[c['control'], c['target']]}."
        for c in cells
        if is_verdict(c) and (c["adapted_from"], c["target"]) in retentions
    ]


def groups(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The cells of each (control, source), in order of appearance: the source's own first, those for
    comparison last.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for cell in sorted(cells, key=_place):
        found.setdefault((cell["control"], cell["source"]), []).append(cell)
    return {key: found[key] for key in dict.fromkeys((c["control"], c["source"]) for c in cells)}


def on(group: list[dict], target: str) -> dict | None:
    """The cell of a control on a target; None where there is none."""
    return next((cell for cell in group if cell["target"] == target), None)


def members_of(cells: list[dict]) -> list[str]:
    """The targets: sources first, those for comparison last, else in order of appearance."""
    return list(dict.fromkeys(c["target"] for c in sorted(cells, key=_place)))


def evaluators_of(cells: list[dict]) -> list[str]:
    """The evaluators, the primary one first."""
    return list(dict.fromkeys(name for c in cells for name in c["readings"]))


def readings(cell: dict) -> dict[str, dict]:
    """What each evaluator says of a cell: effect, slope, retention, verdict, monotonicity, matched_scale …"""
    return cell["readings"]


def references(reading: dict) -> dict[str, dict]:
    """What a retention is compared with, where measured: floor, ceiling, wrong, rerun, normalised."""
    return {name: found for name, found in reading["references"].items() if found}


def headline(cell: dict) -> str:
    """A cell in one sentence: "smile: kept on dmd at 0.93 [0.88, 0.98]; use scale 1.1"."""
    name = cell["control"]
    if is_own(cell):
        return f"{name}: trained on {where(cell)}, slope {ranged(cell['slope'], 3)} per unit of scale"
    if cell["verdict"] == "undefined":
        return f"{name}: {no_effect(cell)}"
    return f"{name}: {finding(cell)}; {advice(cell)}{dissent(cell)}"


def finding(cell: dict) -> str:
    """What was found: "kept on dmd at 0.93 [0.88, 0.98]"; with the other side of 0 where that differs."""
    other = cell["below_zero"]
    beside = f", below 0 {ranged(other['retention'])}" if other and other["differs"] else ""
    return f"{cell['verdict']} on {where(cell)} at {ranged(cell['retention'])}{beside}"


def no_effect(cell: dict) -> str:
    """Why there is no verdict."""
    return f"undefined; its effect on {short(cell['source'])} itself cannot be told from none"


def advice(cell: dict) -> str:
    """What to do about it: the scale to use, or what comes nearest, and what else would help."""
    value, word = cell["matched_scale"]["value"], cell["verdict"]
    sure = "use" if word in ("kept", "weaker", "stronger") else "try"
    scale = nearest(cell) if value is None else f"{sure} scale {number(value, 1)}"
    more = {
        "dead": f"train one on {where(cell)}",
        "reversed": f"train one on {where(cell)}",
        "unclear": "more prompts would tell",
    }
    return f"{scale}; {more[word]}" if word in more else scale


def nearest(cell: dict) -> str:
    """How near a control comes to the effect that it has on its source at scale 1."""
    matched = cell["matched_scale"]

    if matched["reach"] is None:
        return (
            f"no scale to match, since its effect at +1 on {short(cell['source'])} cannot be told from none"
        )
    if matched["reach"]["share"] <= 0:
        return "no positive scale has any of the source's effect"
    return (
        f"at most {reached(matched['reach'])} of the source's effect, at scale "
        f"{number(matched['reach']['scale'], 1)}"
    )


def reached(reach: dict) -> str:
    """The share of an effect that is not reached: below 100 %."""
    return f"{min(round(100 * reach['share']), 99)} %"


def dissent(cell: dict) -> str:
    """The evaluators that give another verdict: " (by probe weaker)"."""
    verdicts = {name: reading["verdict"] for name, reading in cell["readings"].items()}
    others = [f"by {name} {verdict}" for name, verdict in verdicts.items() if verdict != cell["verdict"]]
    return f" ({', '.join(others)})" if others else ""


def tally(cells: list[dict]) -> str:
    """All verdicts in one sentence: "Of 12 pairs of a control and a model 9 kept, 1 stronger, 2 unclear."."""
    found = [c["verdict"] for c in cells if is_verdict(c)]
    if not found:
        return ""
    counts = [f"{found.count(word)} {word}" for word in WORDS if word in found]
    return (
        f"Of {len(found)} pair{'s' * (len(found) != 1)} of a control and another model: {', '.join(counts)}."
    )


def agreement(entries: list[dict]) -> str:
    """How far evaluators agree, in one sentence; empty for one evaluator, or where nothing was judged."""
    found = [
        f"{e['first']} and {e['second']} in {100 * e['same']:.0f} % of {counted(e['cells'], 'cell')}, "
        f"{_kappa(e['kappa'])}"
        for e in entries
        if e["cells"]
    ]
    return f"The evaluators give the same verdict: {'; '.join(found)}." if found else ""


def _kappa(interval: dict) -> str:
    """κ, unless the cells are too few to tell it."""
    if interval["value"] is None:
        return "κ not defined"
    told = interval["low"] is not None and interval["high"] - interval["low"] < 1
    return f"κ {ranged(interval)}" if told else "too few for κ"


def _place(cell: dict) -> int:
    return 0 if is_own(cell) else 2 if cell["reference"] else 1
