"""A run folder of analysis.similarity to one page, report.html, in the style of the transfer report; reads files, needs no torch."""

import base64
import json
import math
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

import configs
from analysis.report import COLOURS, DASH, number, ranged, ticks

HERE = Path(__file__).parent
INPUTS = {"forced": "same inputs", "own": "own trajectories"}
Interval = dict[str, float | None]


def build(folder: Path) -> Path:
    """Writes report.html into a run folder from its results.json and images, and returns its path. Raises UserError without results."""
    folder = Path(folder)
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise configs.UserError(f"no results.json in {folder}; python -m analysis.similarity makes one") from None
    with configs.replacing(folder / "report.html") as new:
        new.write_text(render(results, folder), encoding="utf-8")
    return folder / "report.html"


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    cells = results["cells"]
    return Template((HERE / "similarity.html").read_text(encoding="utf-8")).substitute(
        title="Where a student still agrees with its base",
        style=style(),
        lead=escape(lead(cells)),
        findings="\n".join(f"<li>{escape(sentence)}</li>" for sentence in findings(cells)),
        comparisons="\n".join(comparison_section(cells, name) for name in comparisons(cells)),
        stitching=stitching_section(of(cells, "stitch"), folder),
        controls=controls_section(cells),
        command=escape(results.get("command", "")),
        stamp=escape(f"{results.get('created', '')} · {results.get('seconds', 0):.0f} s"),
        config=escape(json.dumps(results.get("config", {}), indent=2, ensure_ascii=False)),
    )


def style() -> str:
    """The style sheet of the transfer report, with its palette."""
    sheet = re.search(r"<style>\n(.*?)</style>", (HERE / "report.html").read_text(encoding="utf-8"), re.S)[1]
    return Template(sheet).substitute(palette="\n".join(f".c{i} {{ stroke: var(--c{i}); fill: var(--c{i}); }}" for i in range(COLOURS)))


def of(cells: list[dict], what: str, **equal) -> list[dict]:
    """The cells of one kind, with these values."""
    return [c for c in cells if c["what"] == what and all(c[key] == value for key, value in equal.items())]


def comparisons(cells: list[dict]) -> list[str]:
    return list(dict.fromkeys(c["comparison"] for c in of(cells, "block")))


def table(cells: list[dict], comparison: str, inputs: str, value: Callable[[dict], float | None]) -> tuple[list[int], dict[str, list]]:
    """The steps, and per block its value at each of them."""
    chosen = of(cells, "block", comparison=comparison, inputs=inputs)
    steps = sorted({c["step"] for c in chosen})
    rows: dict[str, list] = {c["block"]: [None] * len(steps) for c in chosen}
    for c in chosen:
        rows[c["block"]][steps.index(c["step"])] = value(c)
    return steps, rows


def by_step(cells: list[dict]) -> list[dict]:
    """Per comparison and step: mean CKA over blocks with the same inputs and on own trajectories, the lowest block, mean variance ratio."""
    found = []
    for name in comparisons(cells):
        for step in sorted({c["step"] for c in of(cells, "block", comparison=name)}):
            here = {inputs: of(cells, "block", comparison=name, step=step, inputs=inputs) for inputs in INPUTS}
            lowest = min(here["forced"], key=lambda c: math.inf if c["cka"]["value"] is None else c["cka"]["value"])
            found.append({"comparison": name, "step": step, "t": lowest["t"], "lowest": lowest["block"], "lowest_cka": lowest["cka"]["value"],
                          "lowest_null": lowest["null"]["high"], **{key: mean([c["cka"]["value"] for c in here[key]]) for key in INPUTS},
                          "seed_variance": mean([c["seed_variance"]["value"] for c in here["own"]])})  # fmt: skip
    return found


def mean(values: list[float | None]) -> float | None:
    """Of those that are there."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def lead(cells: list[dict]) -> str:
    """What was compared, in numbers."""
    blocks, pairs = of(cells, "block"), [(c["first"], c["comparison"]) for c in of(cells, "block")]
    ones = "; ".join(f"{first} and {second}" for first, second in dict.fromkeys(pairs))
    controls = len({c["control"] for c in of(cells, "direction")})
    also = f" {controls} controls by their weights and by what they do." if controls else ""
    return f"Inside {ones}: {len({c['block'] for c in blocks})} blocks at every step, {blocks[0]['samples']} images.{also}"


def findings(cells: list[dict]) -> list[str]:
    """The page in sentences."""
    found = []
    for name in comparisons(cells):
        steps = [row for row in by_step(cells) if row["comparison"] == name]
        worst = min(steps, key=lambda row: math.inf if row["lowest_cka"] is None else row["lowest_cka"])
        path = " → ".join(number(row["forced"]) for row in steps)
        found.append(f"{name}: at the same inputs the blocks' mean CKA with {of(cells, 'block', comparison=name)[0]['first']} goes {path} over the "
                     f"steps; lowest at {worst['lowest']}, step {worst['step'] + 1}: {number(worst['lowest_cka'])} (chance "
                     f"up to {number(worst['lowest_null'])}).")  # fmt: skip
        found.append(f"{name}: {variance_sentence(of(cells, 'block', comparison=name, inputs='own'))}")
    return found + [stitch_sentence(c) for c in of(cells, "stitch") if c["down"] != c["up"]] + predictor_sentences(cells)


def variance_sentence(cells: list[dict]) -> str:
    """Where on own trajectories the variance over seeds is clearly below the first one's."""
    low = [c for c in cells if c["seed_variance"]["high"] is not None and c["seed_variance"]["high"] < 1]
    high = [c for c in cells if c["seed_variance"]["low"] is not None and c["seed_variance"]["low"] > 1]
    if not low:
        return f"on own trajectories no block at any step has clearly less variance over seeds; {len(high)} of {len(cells)} have clearly more."
    least = min(low, key=lambda c: c["seed_variance"]["value"])
    first = min(low, key=lambda c: c["step"])
    return (f"on own trajectories {len(low)} of {len(cells)} blocks and steps have clearly less variance over seeds, {len(high)} clearly more; "
            f"first at step {first['step'] + 1}, least at {least['block']}, step {least['step'] + 1}: "
            f"{ranged(least['seed_variance'])} of the first one's.")  # fmt: skip


def stitch_sentence(cell: dict) -> str:
    """Whose image a stitched network draws."""
    who = next(iter(cell["to_up"]))
    up, down = cell["to_up"][who], cell["to_down"][who]
    apart = "nearer to" if up["high"] < down["low"] else "farther from" if up["low"] > down["high"] else "as near to"
    return (f"Stitched, {cell['down']} below and {cell['up']} above: by {who} {apart} what {cell['up']} draws alone ({ranged(up)}) "
            f"{'as' if apart == 'as near to' else 'than'} to what {cell['down']} does ({ranged(down)}); the two lie "
            f"{number(cell['between'][who]['value'])} apart; agreement with the prompt {ranged(cell['agreement'])}.")  # fmt: skip


def predictor_sentences(cells: list[dict]) -> list[str]:
    """Per evaluator the predictor whose line foretells left-out controls best, and how many intervals leave out 0."""
    found = []
    for who in dict.fromkeys(c["evaluator"] for c in of(cells, "predictor")):
        ours = [c for c in of(cells, "predictor", evaluator=who) if c["foretold"] is not None]
        if not ours:
            found.append(f"By {who} there are too few controls with a retention to say what predicts it.")
            continue
        best, sure = max(ours, key=lambda c: c["foretold"]), [c for c in ours if c["spearman"]["low"] * c["spearman"]["high"] > 0]
        use = "" if best["foretold"] > 0 else " None foretells a control that it has not seen."
        found.append(f"What predicts retention by {who}, {best['points']} points of {best['controls']} controls, few enough for caution: "
                     f"{len(sure)} of {len(ours)} predictors have a rank correlation whose interval leaves out 0; the best for an unseen control is "
                     f"“{best['predictor']}”, R² {number(best['foretold'])}, Spearman {ranged(best['spearman'])}.{use}")  # fmt: skip
    return found


def comparison_section(cells: list[dict], name: str) -> str:
    """Map, curves, cross-block maps and every number of one comparison."""
    ours = [c for c in of(cells, "block") if c["comparison"] == name]
    charts = [
        figure(f"CKA, {INPUTS[inputs]}", curves(ours, inputs, lambda c: c["cka"], f"CKA of {name} per block, {INPUTS[inputs]}", True))
        for inputs in INPUTS
    ]
    charts.append(figure("variance over seeds, own trajectories, second / first",
                         curves(ours, "own", lambda c: c["seed_variance"], f"variance over seeds of {name} per block", False)))  # fmt: skip
    crosses = "\n".join(figure(f"step {c['step'] + 1}, t {c['t']:.0f}", cross_map(c)) for c in of(cells, "cross", comparison=name))
    return (
        f"<section>\n<h2>{escape(ours[0]['first'])} and {escape(name)}</h2>\n"
        f'<div class="wide">\n{block_map(cells, name)}\n</div>\n<p class="note">The stronger orange, the less agreement, or the less variance; blue: '
        "more variance. t falls from step to step; the last column is how far distillation moved the block's weights.</p>\n"
        f'<h3>Along the network</h3>\n<div class="charts">\n{chr(10).join(charts)}\n</div>\n'
        f'<h3>Every block with every other, same inputs</h3>\n<p class="note">Rows: blocks of {escape(ours[0]["first"])}, top to bottom; columns: '
        f'blocks of {escape(name)}. The stronger, the more alike.</p>\n<div class="maps">\n{crosses}\n</div>\n'
        f"<details><summary>Every number of {escape(name)}</summary>\n{numbers(ours)}\n</details>\n</section>"
    )


def block_map(cells: list[dict], name: str) -> str:
    """Blocks in rows; in columns the steps of CKA at the same inputs, on own trajectories, and of the variance over seeds."""
    kinds = [("forced", "CKA, same inputs", lambda c: c["cka"], less), ("own", "CKA, own", lambda c: c["cka"], less),
             ("own", "seed variance, own", lambda c: c["seed_variance"], around_one)]  # fmt: skip
    tables = [table(cells, name, inputs, value) for inputs, _, value, _ in kinds]
    moved = {c["block"]: c["change"] for c in of(cells, "weights", comparison=name)}
    heads = "".join(f'<th colspan="{len(steps)}">{title}</th><th></th>' for (_, title, _, _), (steps, _) in zip(kinds, tables, strict=True))
    second = "".join("".join(f"<th>{s + 1}</th>" for s in steps) + "<th></th>" for steps, _ in tables)
    rows = []
    for i, block in enumerate(tables[0][1]):
        parts = [
            "".join(map_cell(interval, shade) for interval in values[block]) + '<td class="gap"></td>'
            for (_, values), (_, _, _, shade) in zip(tables, kinds, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{i + 1} {escape(block)}</th>{"".join(parts)}<td>{number(moved.get(block))}</td></tr>')
    return (f'<table class="map">\n<thead><tr><th></th>{heads}<th>|ΔW| / |W|</th></tr><tr><th>step</th>{second}<th></th></tr></thead>\n'
            f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>")  # fmt: skip


def numbers(cells: list[dict]) -> str:
    """Every number of a comparison, a row per inputs, step and block."""
    heads = ["inputs", "step", "CKA", "null", "p", "standardised", "Procrustes", "permuted", "neighbours", "chance", "seed variance"]
    rows = [[INPUTS[c["inputs"]], str(c["step"] + 1), ranged(c["cka"]), number(c["null"]["high"]), number(c["null"]["p"], 3),
             number(c["standardised"]), number(c["procrustes"]), number(c["procrustes_permuted"]), number(c["neighbours"]),
             number(c["neighbours_chance"]), ranged(c["seed_variance"])] for c in cells]  # fmt: skip
    return plain(["block", *heads], [[c["block"], *row] for c, row in zip(cells, rows, strict=True)])


def stitching_section(cells: list[dict], folder: Path) -> str:
    """Pictures and scores of stitched networks."""
    if not cells:
        return ""
    who = list(cells[0]["to_up"])
    heads = ["below + above", "agreement with the prompt"] + [f"{w}: to {part}" for w in who for part in ("above alone", "below alone")]
    rows = [[f"{c['down']} + {c['up']}", ranged(c["agreement"], 3)] + [v for w in who for v in (ranged(c["to_up"][w]), ranged(c["to_down"][w]))]
            for c in {(c["down"], c["up"]): c for c in cells}.values()]  # fmt: skip
    pictures = "\n".join(stitch_figure([c for c in cells if c["comparison"] == name], folder) for name in dict.fromkeys(
        c["comparison"] for c in cells))  # fmt: skip
    return f'<section>\n<h2>Stitched networks</h2>\n<div class="strips">\n{pictures}\n</div>\n{plain(heads, rows)}\n</section>'


def stitch_figure(cells: list[dict], folder: Path) -> str:
    """One sheet: both members alone, then both ways to stitch them."""
    name, file = cells[0]["comparison"], folder / f"images/stitch/{cells[0]['comparison']}.png"
    if not file.is_file():
        return ""
    heads = "".join(f"<span>{escape(c['down'] if c['down'] == c['up'] else c['down'] + ' + ' + c['up'])}</span>" for c in cells)
    data = base64.b64encode(file.read_bytes()).decode()
    return (f'<figure class="strip pixels"><figcaption><b>{escape(name)}</b>: alone, then below + above</figcaption>'
            f'<div class="heads" aria-hidden="true">{heads}</div>'
            f'<img alt="{escape(name)} and {escape(cells[0]["down"])}: alone, then stitched" src="data:image/png;base64,{data}"></figure>')  # fmt: skip


def controls_section(cells: list[dict]) -> str:
    """Controls in weights, in what they do, and what predicts retention."""
    if not of(cells, "direction"):
        return ""
    parts = ["<section>\n<h2>Controls</h2>", '<h3>What a control does on a target, beside its source</h3>', f'<div class="wide">{direction_map(cells)}</div>']
    if of(cells, "overlap"):
        parts += ["<h3>Controls in weights: cosine of ΔW</h3>", f'<div class="wide">{overlap_map(of(cells, "overlap"))}</div>', overlap_table(cells)]
    return "\n".join([*parts, prediction(cells), "</section>"])


def direction_map(cells: list[dict]) -> str:
    """Controls and targets in rows; direction and gain per step in columns, weights beside the delta, retention by each evaluator."""
    chosen, found = of(cells, "direction"), {(p["evaluator"], p["control"], p["target"]): p["retention"] for p in of(cells, "point")}
    who, steps = list(dict.fromkeys(key[0] for key in found)), max(len(c["cosine"]) for c in chosen)
    kinds = [("direction", "cosine", signed), ("gain", "gain", around_one), ("gain, guided", "gain_guided", around_one)]
    heads = "".join(f'<th colspan="{steps}">{title}, step</th><th></th>' for title, _, _ in kinds)
    rows = []
    for c in chosen:
        row = "".join("".join(map_cell(c[key][s] if s < len(c[key]) else None, shade) for s in range(steps)) + '<td class="gap"></td>'
                      for _, key, shade in kinds)  # fmt: skip
        kept = "".join(f'<td style="{around_one(v)}">{number(v)}</td>' for v in (found.get((w, c["control"], c["target"])) for w in who))
        name = f"{escape(c['control'])} → {escape(c['target'].rpartition('/')[2])}"
        rows.append(f'<tr><th scope="row">{name}</th>{row}<td style="{signed(c["delta"]["cosine"])}">{number(c["delta"]["cosine"], 3)}</td>{kept}</tr>')
    last = "<th>cos with delta</th>" + "".join(f"<th>retention, {escape(w)}</th>" for w in who)
    under = "".join("".join(f"<th>{s + 1}</th>" for s in range(steps)) + "<th></th>" for _ in kinds) + "<th></th>" * (1 + len(who))
    return (f'<table class="map">\n<thead><tr><th></th>{heads}{last}</tr><tr><th></th>{under}</tr></thead>\n<tbody>\n'
            f"{chr(10).join(rows)}\n</tbody>\n</table>")  # fmt: skip


def overlap_map(cells: list[dict]) -> str:
    """Cosine of ΔW of every two controls."""
    names = list(dict.fromkeys([cells[0]["one"], *(c["two"] for c in cells)]))
    values = {frozenset((c["one"], c["two"])): c["cosine"] for c in cells}
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(a)}</th>'
        + "".join("<td></td>" if a == b else f'<td style="{signed(values[frozenset((a, b))])}">{number(values[frozenset((a, b))])}</td>' for b in names)
        + "</tr>" for a in names
    )  # fmt: skip
    return f'<table class="map small">\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'


def overlap_table(cells: list[dict]) -> str:
    """Pairs of one concept, then all others together, as shares of common directions over chance."""
    pairs = [c for c in of(cells, "overlap") if c["in"] is not None]
    row = lambda name, some: [name, str(len(some)), *(number(mean([v(c) for c in some]), 3) for v in (  # noqa: E731
        lambda c: c["cosine"], lambda c: abs(c["cosine"]), lambda c: c["in"], lambda c: c["chance_in"], lambda c: c["out"], lambda c: c["chance_out"]))]
    rows = [row(f"{c['one']} and {c['two']}", [c]) for c in pairs if c["same"]]
    same, other = [c for c in pairs if c["same"]], [c for c in pairs if not c["same"]]
    across = [c for c in same if c["one_source"] != c["two_source"]]
    rows += [row(name, some) for name, some in (("same concept, other member: mean", across), ("other concepts: mean", other)) if some]
    return plain(["pair", "pairs", "cosine", "|cosine|", "read together", "chance", "written together", "chance"], rows)


def prediction(cells: list[dict]) -> str:
    """The table of predictors, and retention over the best one per evaluator."""
    found = of(cells, "predictor")
    if not found:
        return ('<h3>What predicts retention</h3>\n<p class="note">Not asked here: there was no run of the transfer validator to read retentions from. '
                "python -m analysis.transfer config=configs/transfer/all.yaml makes one.</p>")  # fmt: skip
    rows = [[f"{c['predictor']}", c["evaluator"], f"{c['points']} / {c['controls']}", ranged(c["spearman"]), ranged(c["pearson"]),
             f"{number(c['without_one']['low'])} … {number(c['without_one']['high'])} ({c['without_one']['most'] or DASH})", number(c["foretold"])]
            for c in found]  # fmt: skip
    plots = []
    for who in dict.fromkeys(c["evaluator"] for c in found):
        best = max(of(cells, "predictor", evaluator=who), key=lambda c: -math.inf if c["foretold"] is None else c["foretold"])
        plots.append(figure(f"retention by {who} over “{best['predictor']}”", scatter(of(cells, "point", evaluator=who), best["predictor"])))
    heads = ["predictor", "evaluator", "points / controls", "Spearman [95 %]", "Pearson [95 %]", "Spearman without one control (moves most)", "R² foretold"]
    return (f'<h3>What predicts retention</h3>\n<p>Each number of a control and target against its retention. Intervals draw whole controls; '
            f"R² foretold is of a line through the other controls: 0 or less is no better than their mean.</p>\n"
            f'<div class="charts">\n{chr(10).join(plots)}\n</div>\n{plain(heads, rows)}')  # fmt: skip
