"""The page of analysis.similarity, in the style of the transfer report; analysis.report writes it.

Reads files, needs no torch.
"""

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from analysis.pages.html import DASH, embedded, number, ranged, side, whole
from analysis.pages.similarity_charts import (
    around_one,
    cell,
    cells,
    curves,
    figure,
    heat,
    less,
    plain,
    scatter,
    signed,
    squares,
)
from analysis.results import is_file

BODY = Path(__file__).with_name("similarity.html")
TITLE = "Where a student still agrees with its base"
INPUTS = {"forced": "same inputs", "own": "own trajectories"}
MAKE = "python -m analysis.transfer config=configs/transfer/all.yaml"
Cells = list[dict]


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    found = results["cells"]
    body = Template(BODY.read_text(encoding="utf-8")).substitute(
        findings="\n".join(f"<li>{escape(sentence)}</li>" for sentence in findings(found)),
        comparisons="\n".join(comparison_section(found, name) for name in comparisons(found)),
        stitching=stitching_section(of(found, "stitch"), folder),
        controls=controls_section(found),
        command=escape(results.get("command", "")),
        stamp=escape(f"{results.get('created', '')} · {results.get('seconds', 0):.0f} s"),
        config=escape(json.dumps(results.get("config", {}), indent=2, ensure_ascii=False)),
    )
    return whole(TITLE, lead(found), body)


def of(found: Cells, what: str, **equal) -> Cells:
    """The cells of one kind, with these values."""
    return [c for c in found if c["what"] == what and all(c[key] == value for key, value in equal.items())]


def comparisons(found: Cells) -> list[str]:
    return list(dict.fromkeys(c["comparison"] for c in of(found, "block")))


def table(
    found: Cells, comparison: str, inputs: str, value: Callable[[dict], object]
) -> tuple[list[int], dict[str, list]]:
    """The steps, and per block its value at each of them."""
    chosen = of(found, "block", comparison=comparison, inputs=inputs)
    steps = sorted({c["step"] for c in chosen})
    rows: dict[str, list] = {c["block"]: [None] * len(steps) for c in chosen}
    for c in chosen:
        rows[c["block"]][steps.index(c["step"])] = value(c)
    return steps, rows


def by_step(found: Cells) -> list[dict]:
    """Per comparison and step: mean CKA over blocks with the same inputs and on own trajectories, the lowest
    block, mean variance ratio.
    """
    rows = []
    for name in comparisons(found):
        for step in sorted({c["step"] for c in of(found, "block", comparison=name)}):
            here = {
                inputs: of(found, "block", comparison=name, step=step, inputs=inputs) for inputs in INPUTS
            }
            low = min(here["forced"], key=lambda c: _or_infinite(c["cka"]["value"]))
            rows.append(
                {
                    "comparison": name,
                    "first": low["first"],
                    "step": step,
                    "t": low["t"],
                    "lowest": low["block"],
                    "lowest_cka": low["cka"]["value"],
                    "lowest_null": low["null"]["high"],
                    **{key: mean([c["cka"]["value"] for c in here[key]]) for key in INPUTS},
                    "seed_variance": mean([c["seed_variance"]["value"] for c in here["own"]]),
                    "shares": [mean([c["seed_share"][side] for c in here["own"]]) for side in (0, 1)],
                }
            )
    return rows


def mean(values: list[float | None]) -> float | None:
    """Of those that are there."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def lead(found: Cells) -> str:
    """What was compared, in numbers."""
    blocks = of(found, "block")
    ones = "; ".join(
        f"{first} and {second}"
        for first, second in dict.fromkeys((c["first"], c["comparison"]) for c in blocks)
    )
    controls = len({c["control"] for c in of(found, "direction")})
    also = f" {controls} controls by their weights and by what they do." if controls else ""
    return f"Inside {ones}: {len({c['block'] for c in blocks})} blocks at every step, {blocks[0]['samples']} images.{also}"


def findings(found: Cells) -> list[str]:
    """The page in sentences."""
    sentences = []
    for name in comparisons(found):
        steps = [row for row in by_step(found) if row["comparison"] == name]
        own = of(found, "block", comparison=name, inputs="own")
        sentences += [agreement_sentence(steps), f"{name}: {variance_sentence(own)} {share_sentence(steps)}"]
    return (
        sentences
        + [stitch_sentence(c) for c in of(found, "stitch") if c["down"] != c["up"]]
        + predictor_sentences(found)
    )


def agreement_sentence(steps: list[dict]) -> str:
    """How CKA goes over the steps of one comparison, and where it is lowest; steps: rows of `by_step`."""
    worst = min(steps, key=lambda row: _or_infinite(row["lowest_cka"]))
    return (
        f"{worst['comparison']}: at the same inputs the blocks' mean CKA with {worst['first']} goes "
        f"{' → '.join(number(row['forced']) for row in steps)} over the steps, on own trajectories "
        f"{' → '.join(number(row['own']) for row in steps)}; at the same inputs it is lowest at {worst['lowest']}, step "
        f"{worst['step'] + 1}: {number(worst['lowest_cka'])} (permuted prompts reach {number(worst['lowest_null'])})."
    )


def variance_sentence(found: Cells) -> str:
    """Where on own trajectories the variance over seeds is clearly below the first one's."""
    low, high = ([c for c in found if side(c["seed_variance"], 1.0) == where] for where in (-1, 1))
    counts = f"of {len(found)} blocks and steps {len(low)} have clearly less variance over seeds, {len(high)} clearly more"
    if not low:
        return f"on own trajectories, {counts}."
    least = min(low, key=lambda c: c["seed_variance"]["value"])
    return (
        f"on own trajectories, {counts}; less first at step {1 + min(c['step'] for c in low)}, least at {least['block']}, "
        f"step {least['step'] + 1}: {ranged(least['seed_variance'])} of the first one's."
    )


def share_sentence(steps: list[dict]) -> str:
    """Seeds' share in the variance of both members over the steps; steps: rows of `by_step`."""
    first, second = (" → ".join(number(row["shares"][side]) for row in steps) for side in (0, 1))
    return f"Of all variance, seeds and prompts, seeds make {second} over the steps, in the first one {first} (means over blocks)."


def stitch_sentence(c: dict) -> str:
    """Whose image a stitched network draws."""
    evaluator_name = next(iter(c["to_up"]))
    up, down = c["to_up"][evaluator_name], c["to_down"][evaluator_name]
    apart = {-1: "nearer to", 0: "about as near to", 1: "farther from"}[
        side(c["nearer"][evaluator_name], 0.0)
    ]
    than = "as" if apart.endswith("near to") else "than"
    return (
        f"Stitched, {c['down']} below and {c['up']} above: by {evaluator_name} {apart} what {c['up']} draws alone ({ranged(up)}) {than} to what "
        f"{c['down']} draws in the same plan ({ranged(down)}); the two lie {number(c['between'][evaluator_name]['value'])} apart. Agreement with "
        f"the prompt {ranged(c['agreement'])}."
    )


def predictor_sentences(found: Cells) -> list[str]:
    """Per evaluator how many predictors can be told from none, and the one whose line foretells left-out
    controls best.
    """
    sentences = []
    for evaluator_name in dict.fromkeys(c["evaluator"] for c in of(found, "predictor")):
        ours = [
            c
            for c in of(found, "predictor", evaluator=evaluator_name)
            if c["r2_without_one"]["value"] is not None
        ]
        if not ours:
            sentences.append(
                f"By {evaluator_name} there are too few controls with a retention to say what predicts it."
            )
            continue
        best, sure = best_of(ours), [c for c in ours if c["spearman"]["low"] * c["spearman"]["high"] > 0]
        robust = best["r2_without_one"]["value"]
        use = "" if robust > 0 else ", so none foretells a control that it has not seen"
        sentences.append(
            f"What predicts retention by {evaluator_name} ({best['points']} points of only {best['controls']} controls): {len(sure)} of "
            f"{len(ours)} numbers have a rank correlation whose interval leaves out 0; the best for an unseen control is "
            f"“{best['predictor']}”, Spearman {ranged(best['spearman'])}, R² {number(best['r2_cross_validated'])}, "
            f"and {number(robust)} when {best['r2_without_one']['without']} is not there{use}."
        )
    return sentences


def best_of(predictors: Cells) -> dict:
    """The predictor with the best cross-validated R², which it does not owe to a single control."""
    return max(
        predictors,
        key=lambda c: -math.inf if c["r2_without_one"]["value"] is None else c["r2_without_one"]["value"],
    )


def comparison_section(found: Cells, name: str) -> str:
    """Map, curves, maps of every block with every other, and every number of one comparison."""
    ours = of(found, "block", comparison=name)
    crosses = [
        figure(
            f"step {c['step'] + 1}, t {c['t']:.0f}",
            squares(
                c["cka"],
                f"CKA of every block of {c['first']} with every block of {name}, step {c['step'] + 1}",
            ),
        )
        for c in of(found, "cross", comparison=name)
    ]
    first = escape(ours[0]["first"])
    return (
        f"<section>\n<h2>{first} and {escape(name)}</h2>\n{block_map(found, name)}\n"
        '<p class="note">Orange: less agreement, less variance; blue: more variance. |ΔW| / |W|: how far the block\'s weights moved.</p>\n'
        f'<h3>Along the network</h3>\n<div class="charts">\n{chr(10).join(charts(found, name))}\n</div>\n'
        f'<h3>Every block with every other, same inputs</h3>\n<p class="note">Rows: blocks of {first}, downwards; columns: blocks '
        f'of {escape(name)}.</p>\n<div class="maps">\n{chr(10).join(crosses)}\n</div>\n'
        f"<details><summary>Every number of {escape(name)}</summary>\n{numbers(ours)}\n</details>\n</section>"
    )


def charts(found: Cells, name: str) -> list[str]:
    """CKA with the same inputs and on own trajectories, and the variance over seeds, over the blocks; one
    line per step.
    """
    drawn = []
    for inputs, says in INPUTS.items():
        dashed = [values[0] for values in table(found, name, inputs, lambda c: c["null"]["high"])[1].values()]
        title = f"CKA of {name} per block, {says}; dashed: permuted prompts, step 1"
        drawn.append(
            figure(f"CKA, {says}", curves(_lines(found, name, inputs, lambda c: c["cka"]), dashed, title))
        )
    for inputs, says in reversed(INPUTS.items()):
        lines = _lines(found, name, inputs, lambda c: c["seed_variance"])
        ones = [1.0] * len(next(iter(lines.values())))
        drawn.append(
            figure(
                f"variance over seeds, {says}, second / first",
                curves(lines, ones, f"variance over seeds of {name}, {says}"),
            )
        )
    return drawn


def _lines(found: Cells, name: str, inputs: str, value: Callable[[dict], dict]) -> dict[str, list[dict]]:
    steps, rows = table(found, name, inputs, value)
    return {f"step {step + 1}": [values[i] for values in rows.values()] for i, step in enumerate(steps)}


def block_map(found: Cells, name: str) -> str:
    """Blocks in rows; in columns the steps of CKA at the same inputs, on own trajectories, and of the
    variance over seeds.
    """
    kinds = [
        ("forced", "CKA, same inputs", "cka", less),
        ("own", "CKA, own", "cka", less),
        ("own", "seed variance, own", "seed_variance", around_one),
    ]
    tables = [
        (*table(found, name, inputs, lambda c, key=key: c[key]), shade) for inputs, _, key, shade in kinds
    ]
    moved = {c["block"]: c["change"] for c in of(found, "weights", comparison=name)}
    titles = "".join(
        f'<th colspan="{len(steps)}">{kind[1]}</th><th></th>'
        for kind, (steps, _, _) in zip(kinds, tables, strict=True)
    )
    steps = "".join("".join(f"<th>{s + 1}</th>" for s in steps) + "<th></th>" for steps, _, _ in tables)
    rows = [
        f'<th scope="row">{i + 1} {escape(block)}</th>{"".join(cells(rows[block], shade) for _, rows, shade in tables)}'
        f"<td>{number(moved.get(block))}</td>"
        for i, block in enumerate(tables[0][1])
    ]
    return heat([f"<th></th>{titles}<th>|ΔW| / |W|</th>", f"<th>step</th>{steps}<th></th>"], rows)


def numbers(found: Cells) -> str:
    """Every number of a comparison, a row per block, inputs and step."""
    heads = [
        "block",
        "inputs",
        "step",
        "CKA",
        "null, 95 %",
        "p",
        "standardised",
        "Procrustes",
        "permuted",
        "neighbours",
        "chance",
        "seed variance",
        "share of seeds, first",
        "second",
    ]
    rows = [
        [
            c["block"],
            INPUTS[c["inputs"]],
            str(c["step"] + 1),
            ranged(c["cka"]),
            number(c["null"]["high"]),
            number(c["null"]["p"], 3),
            number(c["standardised"]),
            number(c["procrustes"]),
            number(c["procrustes_permuted"]),
            number(c["neighbours"]),
            number(c["neighbours_chance"]),
            ranged(c["seed_variance"]),
            *map(number, c["seed_share"]),
        ]
        for c in found
    ]
    return plain(heads, rows)


def stitching_section(found: Cells, folder: Path) -> str:
    """Pictures and scores of stitched networks."""
    if not found:
        return ""
    evaluator_name = list(found[0]["to_up"])
    heads = ["below + above", "agreement with the prompt"] + [
        f"{w}: to {part} alone" for w in evaluator_name for part in ("above", "below")
    ]
    rows = [
        [
            f"{c['down']} + {c['up']}",
            ranged(c["agreement"], 3),
            *(ranged(c[key][w]) for w in evaluator_name for key in ("to_up", "to_down")),
        ]
        for c in {(c["down"], c["up"]): c for c in found}.values()
    ]
    names = dict.fromkeys(c["comparison"] for c in found)
    pictures = "\n".join(
        stitch_figure([c for c in found if c["comparison"] == name], folder) for name in names
    )
    return f'<section>\n<h2>Stitched networks</h2>\n<div class="strips">\n{pictures}\n</div>\n{plain(heads, rows)}\n</section>'


def stitch_figure(found: Cells, folder: Path) -> str:
    """One sheet: both members alone, then both ways to stitch them."""
    name = found[0]["comparison"]
    file = is_file(folder, f"images/stitch/{name}.png")
    if file is None:
        return f'<figure class="strip"><figcaption><b>{escape(name)}</b>: no pictures were kept.</figcaption></figure>'
    heads = "".join(
        f"<span>{escape(c['down'] if c['down'] == c['up'] else c['down'] + ' + ' + c['up'])}</span>"
        for c in found
    )
    alt = f"{found[0]['down']} and {name}: alone, then stitched, one row per prompt"
    return (
        f'<figure class="strip pixels"><figcaption><b>{escape(name)}</b>: alone, then below + above</figcaption>'
        f'<div class="heads" aria-hidden="true">{heads}</div><img alt="{escape(alt)}" '
        f'src="{embedded(file)}"></figure>'
    )


def controls_section(found: Cells) -> str:
    """Controls in weights, in what they do, and what predicts retention."""
    if not of(found, "direction"):
        return ""
    pairs = of(found, "overlap")
    weights = (
        ["<h3>Controls in weights: cosine of ΔW</h3>", overlap_map(pairs), overlap_table(pairs)]
        if pairs
        else []
    )
    parts = [
        "<section>\n<h2>Controls</h2>",
        prediction(found),
        "<h3>What a control does on a target, beside its source</h3>",
        direction_map(found),
        *weights,
        "</section>",
    ]
    return "\n".join(parts)


def direction_map(found: Cells) -> str:
    """Controls and targets in rows; direction and gain per step in columns, weights beside the delta,
    retention by each evaluator.
    """
    chosen = of(found, "direction")
    kept = {(p["evaluator"], p["control"], p["target"]): p["retention"] for p in of(found, "point")}
    evaluator_name, steps = list(dict.fromkeys(key[0] for key in kept)), max(len(c["cosine"]) for c in chosen)
    kinds = {
        "direction": ("cosine", signed),
        "gain": ("gain", around_one),
        "gain, guided": ("gain_guided", around_one),
    }
    titles = "".join(f'<th colspan="{steps}">{title}</th><th></th>' for title in kinds)
    under = ("".join(f"<th>{s + 1}</th>" for s in range(steps)) + "<th></th>") * len(kinds)
    rows = []
    for c in chosen:
        row = "".join(cells(c[key] + [None] * (steps - len(c[key])), shade) for key, shade in kinds.values())
        last = cell(c["delta"]["cosine"], signed, 3) + "".join(
            cell(kept.get((w, c["control"], c["target"])), around_one) for w in evaluator_name
        )
        rows.append(
            f'<th scope="row">{escape(c["control"])} → {escape(c["target"].rpartition("/")[2])}</th>{row}{last}'
        )
    ends = "<th>cos with delta</th>" + "".join(f"<th>retention, {escape(w)}</th>" for w in evaluator_name)
    return heat(
        [f"<th></th>{titles}{ends}", f"<th>step</th>{under}{'<th></th>' * (1 + len(evaluator_name))}"], rows
    )


def overlap_map(pairs: Cells) -> str:
    """Cosine of ΔW of every two controls."""
    names = list(dict.fromkeys([pairs[0]["one"], *(c["two"] for c in pairs)]))
    values = {frozenset((c["one"], c["two"])): c["cosine"] for c in pairs}
    rows = [
        f'<th scope="row">{escape(a)}</th>'
        + "".join(cell(values.get(frozenset((a, b))), signed) for b in names)
        for a in names
    ]
    return heat(["<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names)], rows, small=True)


def overlap_table(pairs: Cells) -> str:
    """Pairs of one concept, then means, as shares of common directions beside chance."""
    pairs = [c for c in pairs if c["in"] is not None]
    keys = ("cosine", "in", "chance_in", "out", "chance_out")

    def row(name, some):
        return [name, str(len(some)), *(number(mean([c[key] for c in some]), 3) for key in keys)]

    same, other = [c for c in pairs if c["same"]], [c for c in pairs if not c["same"]]
    rows = [row(f"{c['one']} and {c['two']}", [c]) for c in same]
    means = {
        "same concept, mean": same,
        "other concepts, same start, mean": [c for c in other if c["same_start"]],
        "other concepts, other start, mean": [c for c in other if not c["same_start"]],
    }
    rows += [row(name, some) for name, some in means.items() if some]
    note = (
        '<p class="note">Same start: training began from the same random A, and controls then read much together whatever they were '
        "taught; what they write, from B = 0, is the fairer witness.</p>"
    )
    return (
        plain(
            ["pair", "pairs", "cosine of ΔW", "read together", "chance", "written together", "chance"], rows
        )
        + note
    )


def prediction(found: Cells) -> str:
    """The table of predictors, and retention over the best one per evaluator."""
    ours = of(found, "predictor")
    if not ours:
        return f'<h3>What predicts retention</h3>\n<p class="note">Not asked: there were no retentions to read. {MAKE} makes them.</p>'
    rows = [
        [
            c["predictor"],
            c["evaluator"],
            f"{c['points']} / {c['controls']}",
            ranged(c["spearman"]),
            ranged(c["pearson"]),
            f"{number(c['without_one']['low'])} … {number(c['without_one']['high'])} ({c['without_one']['most'] or DASH})",
            number(c["r2_cross_validated"]),
            f"{number(c['r2_without_one']['value'])} ({c['r2_without_one']['without'] or DASH})",
        ]
        for c in ours
    ]
    plots = []
    for evaluator_name in dict.fromkeys(c["evaluator"] for c in ours):
        best = best_of(of(found, "predictor", evaluator=evaluator_name))["predictor"]
        dots = [
            (f"{p['control']} on {p['target']}", p["target"].rpartition("/")[2], p[best], p["retention"])
            for p in of(found, "point", evaluator=evaluator_name)
            if p[best] is not None
        ]
        plots.append(
            figure(
                f"retention by {evaluator_name} over “{best}”",
                scatter(dots, best, f"retention by {evaluator_name} over {best}"),
            )
        )
    heads = [
        "predictor",
        "by",
        "points / controls",
        "Spearman [95 %]",
        "Pearson [95 %]",
        "Spearman without one control (moves most)",
        "cross-validated R²",
        "lowest without one control",
    ]
    return (
        f"<h3>What predicts retention</h3>\n<p>One number of a control and a target against its retention there. Intervals draw whole "
        f"controls; cross-validated R² is of a line through the other controls, and 0 or less is no better than their mean.</p>\n"
        f'<div class="charts">\n{chr(10).join(plots)}\n</div>\n{plain(heads, rows)}'
    )


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
