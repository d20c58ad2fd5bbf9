"""What the page of analysis.similarity shows; similarity.html says how. Reads files and imports no torch."""

import math
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from analysis.pages import charts, html
from analysis.pages.words import DASH, counted, number, ranged, side, small
from analysis.results import is_file

INPUTS = {"forced": "same inputs", "own": "own trajectories"}
BASELINE = "which student"  # the mean retention there of other concepts' controls
LEVEL = 0.05  # of the family-wise p
Cells = list[dict]


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    cells = results["cells"]
    stitched = of(cells, "stitch")
    return html.render(
        "similarity.html",
        title="Where a student still agrees with its base",
        lead=lead(cells),
        results=results,
        findings=findings(cells),
        comparisons={name: comparison(cells, name) for name in comparisons(cells)},
        stitched={(c["down"], c["up"]): c for c in stitched},
        stitch_sheets={
            name: (
                [c for c in stitched if c["comparison"] == name],
                is_file(folder, f"images/stitch/{name}.png"),
            )
            for name in dict.fromkeys(c["comparison"] for c in stitched)
        },
        directions=of(cells, "direction"),
        retentions={(p["evaluator"], p["control"], p["target"]): p["retention"] for p in of(cells, "point")},
        readers=list(dict.fromkeys(p["evaluator"] for p in of(cells, "point"))),
        overlaps=overlaps(of(cells, "overlap")),
        predictions=of(cells, "prediction"),
        predictors=predictors(cells),
        plots=plots(cells),
    )


def of(cells: Cells, what: str, **equal) -> Cells:
    """The cells of one kind, with these values."""
    return [c for c in cells if c["what"] == what and all(c[key] == value for key, value in equal.items())]


def comparisons(cells: Cells) -> list[str]:
    return list(dict.fromkeys(c["comparison"] for c in of(cells, "block")))


def table(
    cells: Cells, comparison: str, inputs: str, value: Callable[[dict], object]
) -> tuple[list[int], dict[str, list]]:
    """The steps, and per block its value at each of them."""
    chosen = of(cells, "block", comparison=comparison, inputs=inputs)
    steps = sorted({c["step"] for c in chosen})
    rows: dict[str, list] = {c["block"]: [None] * len(steps) for c in chosen}
    for c in chosen:
        rows[c["block"]][steps.index(c["step"])] = value(c)
    return steps, rows


def by_step(cells: Cells) -> list[dict]:
    """Per comparison and step: mean CKA over blocks, the lowest block, mean variance ratio."""
    rows = []
    for name in comparisons(cells):
        for step in sorted({c["step"] for c in of(cells, "block", comparison=name)}):
            blocks = {key: of(cells, "block", comparison=name, step=step, inputs=key) for key in INPUTS}
            rows.append({"comparison": name, "step": step, **of_step(blocks)})
    return rows


def of_step(blocks: dict[str, Cells]) -> dict:
    """One step of a comparison."""
    low = min(blocks["forced"], key=lambda c: _or_infinite(c["cka"]["value"]))
    own = blocks["own"]
    return {
        "first": low["first"],
        "t": low["t"],
        "lowest": low["block"],
        "lowest_cka": low["cka"]["value"],
        "lowest_null": low["null"]["high"],
        **{key: mean([c["cka"]["value"] for c in blocks[key]]) for key in INPUTS},
        "seed_variance": mean([c["seed_variance"]["value"] for c in own]),
        "shares": [mean([c["seed_share"][side] for c in own]) for side in (0, 1)],
    }


def mean(values: list[float | None]) -> float | None:
    """Of those that are there."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def lead(cells: Cells) -> str:
    """What was compared, in numbers."""
    blocks = of(cells, "block")
    ones = "; ".join(
        f"{first} and {second}"
        for first, second in dict.fromkeys((c["first"], c["comparison"]) for c in blocks)
    )
    controls = len({c["control"] for c in of(cells, "direction")})
    also = f" {controls} controls by their weights and by what they do." if controls else ""
    return (
        f"Inside {ones}: {len({c['block'] for c in blocks})} blocks at every step, "
        f"{blocks[0]['samples']} images.{also}"
    )


def findings(cells: Cells) -> list[str]:
    """The page in sentences."""
    sentences = []
    for name in comparisons(cells):
        steps = [row for row in by_step(cells) if row["comparison"] == name]
        own = of(cells, "block", comparison=name, inputs="own")
        sentences += [agreement_sentence(steps), f"{name}: {variance_sentence(own)} {share_sentence(steps)}"]
    return (
        sentences
        + [stitch_sentence(c) for c in of(cells, "stitch") if c["down"] != c["up"]]
        + predictor_sentences(cells)
    )


def agreement_sentence(steps: list[dict]) -> str:
    """How CKA goes over the steps of one comparison, and where it is lowest; steps: rows of `by_step`."""
    worst = min(steps, key=lambda row: _or_infinite(row["lowest_cka"]))
    return (
        f"{worst['comparison']}: at the same inputs the blocks' mean CKA with {worst['first']} goes "
        f"{' → '.join(number(row['forced']) for row in steps)} over the steps, on own trajectories "
        f"{' → '.join(number(row['own']) for row in steps)}; at the same inputs it is lowest at "
        f"{worst['lowest']}, step "
        f"{worst['step'] + 1}: {number(worst['lowest_cka'])} (permuted prompts reach "
        f"{number(worst['lowest_null'])})."
    )


def variance_sentence(cells: Cells) -> str:
    """Where on own trajectories the variance over seeds is clearly below the first one's."""
    low, high = ([c for c in cells if side(c["seed_variance"], 1.0) == where] for where in (-1, 1))
    counts = (
        f"of {len(cells)} blocks and steps {len(low)} have clearly less variance over seeds, "
        f"{len(high)} clearly more"
    )
    if not low:
        return f"on own trajectories, {counts}."
    least = min(low, key=lambda c: c["seed_variance"]["value"])
    return (
        f"on own trajectories, {counts}; less first at step {1 + min(c['step'] for c in low)}, least at "
        f"{least['block']}, "
        f"step {least['step'] + 1}: {ranged(least['seed_variance'])} of the first one's."
    )


def share_sentence(steps: list[dict]) -> str:
    """Seeds' share in the variance of both members over the steps; steps: rows of `by_step`."""
    first, second = (" → ".join(number(row["shares"][side]) for row in steps) for side in (0, 1))
    return (
        f"Of all variance, seeds and prompts, seeds make {second} over the steps, in the first one "
        f"{first} (means over blocks)."
    )


def stitch_sentence(c: dict) -> str:
    """Whose image a stitched network draws."""
    evaluator_name = next(iter(c["to_up"]))
    up, down = c["to_up"][evaluator_name], c["to_down"][evaluator_name]
    apart = {-1: "nearer to", 0: "about as near to", 1: "farther from"}[
        side(c["nearer"][evaluator_name], 0.0)
    ]
    than = "as" if apart.endswith("near to") else "than"
    return (
        f"Stitched, {c['down']} below and {c['up']} above: by {evaluator_name} {apart} what {c['up']} "
        f"draws alone ({ranged(up)}) {than} to what "
        f"{c['down']} draws in the same plan ({ranged(down)}); the two lie "
        f"{number(c['between'][evaluator_name]['value'])} apart. Agreement with "
        f"the prompt {ranged(c['agreement'])}."
    )


def predictor_sentences(cells: Cells) -> list[str]:
    """Per evaluator, whether anything that was measured beforehand foretells retention."""
    return [
        predictor_sentence(c, of(cells, "predictor", evaluator=c["evaluator"]))
        for c in of(cells, "prediction")
    ]


def predictor_sentence(c: dict, predictors: Cells) -> str:
    """What foretells retention by one evaluator, or that nothing does; c: of all predictors together."""
    known = [p for p in predictors if p["p_family_wise"] is not None]
    if not known:
        return f"By {c['evaluator']} too few controls have a retention to say whether anything foretells it."
    over = f"retention by {c['evaluator']} ({extent(c)})"
    alone = f"{BASELINE} it is, alone, has R² {number(c['r2_cross_validated'])}"
    if sure := [p for p in known if foretells(p)]:
        return f"What foretells {over}: {'; '.join(map(evidence, sure))}; {alone}."
    strongest = min(known, key=lambda p: p["p_family_wise"])
    best = max(known, key=lambda p: _or_infinite(p["r2_cross_validated"], -math.inf))
    also = "" if best is strongest else f", the best on a concept left out is {evidence(best)}"
    first = f"of {len(known)} numbers the strongest is {evidence(strongest)}"
    return f"Nothing foretells {over}: {first}{also}; {alone}."


def foretells(c: dict) -> bool:
    """Whether a predictor may be said to foretell retention: its rank correlation is not chance among so
    many, and on a concept left out its line is of use, and of more than knowing the target alone.
    """
    p, r2 = c["p_family_wise"], c["r2_cross_validated"]
    return p is not None and r2 is not None and p < LEVEL and r2 > max(0.0, c["r2_which_student"] or 0.0)


def evidence(c: dict) -> str:
    """A predictor with the numbers that decide whether it foretells."""
    return (
        f"“{c['predictor']}”, Spearman {ranged(c['spearman'])}, family-wise p {small(c['p_family_wise'])}, "
        f"R² {number(c['r2_cross_validated'])}"
    )


def extent(c: dict) -> str:
    """Of how much all predictors are judged."""
    concepts = counted(len(c["concepts"]), "concept")
    return f"{counted(c['points'], 'point')}, {counted(c['controls'], 'control')}, {concepts}"


def best_of(predictors: Cells) -> dict:
    """The predictor of the lowest family-wise p; of equal ones that of the best R² on concepts left out."""
    return min(
        predictors,
        key=lambda c: (_or_infinite(c["p_family_wise"]), -_or_infinite(c["r2_cross_validated"], -math.inf)),
    )


def comparison(cells: Cells, name: str) -> dict:
    """What is shown of one comparison: its blocks' map, charts along the network, all with all."""
    blocks = of(cells, "block", comparison=name)
    return {
        "first": blocks[0]["first"],
        "moved": {c["block"]: c["change"] for c in of(cells, "weights", comparison=name)},
        "maps": [
            (title, hue, *table(cells, name, inputs, lambda c, key=key: c[key]))
            for title, inputs, key, hue in (
                ("CKA, same inputs", "forced", "cka", "lacking"),
                ("CKA, own", "own", "cka", "lacking"),
                ("seed variance, own", "own", "seed_variance", "around_one"),
            )
        ],
        "charts": dict(along_network(cells, name)),
        "crosses": [(cross, squares(cross, name)) for cross in of(cells, "cross", comparison=name)],
        "numbers": [block_numbers(c) for c in blocks],
    }


def squares(cross: dict, name: str) -> Markup:
    title = f"CKA of every block of {cross['first']} with every block of {name}, step {cross['step'] + 1}"
    return charts.squares(cross["cka"], title)


def along_network(cells: Cells, name: str) -> list[tuple[str, Markup | str]]:
    """CKA and variance over seeds over the blocks, with the same inputs and on own trajectories, a line per
    step.
    """
    drawn = []
    for inputs, says in INPUTS.items():
        nulls = [row[0] for row in table(cells, name, inputs, lambda c: c["null"]["high"])[1].values()]
        title = f"CKA of {name} per block, {says}; dashed: permuted prompts, step 1"
        drawn.append((f"CKA, {says}", over_blocks(cells, name, inputs, "cka", nulls, title)))
    for inputs, says in reversed(INPUTS.items()):
        ones = [1.0] * len({c["block"] for c in of(cells, "block", comparison=name)})
        title = f"variance over seeds of {name}, {says}"
        caption = f"variance over seeds, {says}, second / first"
        drawn.append((caption, over_blocks(cells, name, inputs, "seed_variance", ones, title)))
    return drawn


def over_blocks(cells: Cells, name: str, inputs: str, key: str, beside: list, title: str) -> Markup | str:
    """Lines over numbered blocks, one per step, and one dashed beside them."""
    steps, rows = table(cells, name, inputs, lambda c: c[key])
    lines = {
        f"step {step + 1}": [(k + 1.0, row[i]) for k, row in enumerate(rows.values())]
        for i, step in enumerate(steps)
    }
    dashed = [(k + 1.0, value) for k, value in enumerate(beside) if value is not None]
    return charts.curves(lines, "block", title, include=(0.0, 1.0), dashed=dashed)


def block_numbers(c: dict) -> dict[str, str]:
    """Every number of a block at a step, by its name."""
    return {
        "block": c["block"],
        "inputs": INPUTS[c["inputs"]],
        "step": str(c["step"] + 1),
        "CKA": ranged(c["cka"]),
        "null, 95 %": number(c["null"]["high"]),
        "p": number(c["null"]["p"], 3),
        "standardised": number(c["standardised"]),
        "Procrustes": number(c["procrustes"]),
        "permuted": number(c["procrustes_permuted"]),
        "neighbours": number(c["neighbours"]),
        "chance": number(c["neighbours_chance"]),
        "seed variance": ranged(c["seed_variance"]),
        "share of seeds, first": number(c["seed_share"][0]),
        "second": number(c["seed_share"][1]),
    }


def overlaps(pairs: Cells) -> dict | None:
    """Cosine of ΔW of every two controls, rows of pairs of one concept, then of means; None without pairs."""
    if not pairs:
        return None
    cosines = {frozenset((c["one"], c["two"])): c["cosine"] for c in pairs}
    known = [c for c in pairs if c["in"] is not None]
    other = [c for c in known if not c["same"]]
    groups = {f"{c['one']} and {c['two']}": [c] for c in known if c["same"]} | {
        "same concept, mean": [c for c in known if c["same"]],
        "other concepts, same start, mean": [c for c in other if c["same_start"]],
        "other concepts, other start, mean": [c for c in other if not c["same_start"]],
    }
    keys = ("cosine", "in", "chance_in", "out", "chance_out")
    rows = [
        [name, str(len(some)), *(number(mean([c[key] for c in some]), 3) for key in keys)]
        for name, some in groups.items()
        if some
    ]
    names = list(dict.fromkeys([pairs[0]["one"], *(c["two"] for c in pairs)]))
    return {
        "names": names,
        "cosines": [[cosines.get(frozenset((a, b))) for b in names] for a in names],
        "rows": rows,
    }


def predictors(cells: Cells) -> list[list[str]]:
    """A row per predictor, and one of the baseline below each evaluator's."""
    rows = []
    for name in dict.fromkeys(c["evaluator"] for c in of(cells, "predictor")):
        rows += [predictor_row(c) for c in of(cells, "predictor", evaluator=name)]
        for c in of(cells, "prediction", evaluator=name):
            known = f"{c['points']} / {c['controls']}"
            r2 = [number(c["r2_cross_validated"]), DASH, lowest(c)]
            rows.append([BASELINE, name, known, DASH, DASH, *r2, DASH, DASH])
    return rows


def predictor_row(c: dict) -> list[str]:
    return [
        c["predictor"],
        c["evaluator"],
        f"{c['points']} / {c['controls']}",
        ranged(c["spearman"]),
        small(c["p_family_wise"]),
        number(c["r2_cross_validated"]),
        number(c["r2_which_student"]),
        lowest(c),
        ranged(c["pearson"]),
        f"{number(c['without_one']['low'])} … {number(c['without_one']['high'])} "
        f"({c['without_one']['most'] or DASH})",
    ]


def lowest(c: dict) -> str:
    """The lowest R² without one concept, and which."""
    return f"{number(c['r2_without_one']['value'])} ({c['r2_without_one']['without'] or DASH})"


def point(p: dict, predictor: str, target: int) -> dict:
    """A dot of a scatter plot; target: its number among the targets, for its colour."""
    says = f"{p['control']} on {p['target']}"
    about = {"says": says, "css": f"c{target % charts.COLOURS}", "group": p["target"].rpartition("/")[2]}
    return {"x": p[predictor], "y": p["retention"], "r": 3.4, **about}


def plots(cells: Cells) -> dict[str, Markup]:
    """Retention over the predictor of the lowest p, by each evaluator."""
    drawn = {}
    for evaluator in dict.fromkeys(c["evaluator"] for c in of(cells, "predictor")):
        best = best_of(of(cells, "predictor", evaluator=evaluator))["predictor"]
        known = [p for p in of(cells, "point", evaluator=evaluator) if p[best] is not None]
        targets = list(dict.fromkeys(p["target"] for p in known))
        points = [point(p, best, targets.index(p["target"])) for p in known]
        caption = f"retention by {evaluator} over “{best}”"
        drawn[caption] = charts.scatter(points, best, "retention", caption, right=110)
    return drawn


def _or_infinite(value: float | None, infinite: float = math.inf) -> float:
    return infinite if value is None else value
