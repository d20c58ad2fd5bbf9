"""What the page of analysis.transfer shows; transfer.html says how. Reads files and imports no torch."""

from pathlib import Path

from markupsafe import Markup

from analysis.pages import charts, html, words
from analysis.pages.words import number, percent, ranged, shown, signed, small
from analysis.results import is_file
from controls.retention import DEAD, SATURATED, WEAK

TITLE = "Which controls survive distillation"
OPEN = 6  # up to this many controls their sentences are shown at once; beyond, on demand
REACH = (-1.0, 3.0)  # a retention beyond is drawn at the edge


def render(results: dict, folder: Path) -> str:
    """The page as text. folder: where the pictures' paths start."""
    cells = list(map(words.led, results["cells"]))
    return html.render(
        "transfer.html",
        title=TITLE,
        lead=lead(cells),
        results=results,
        cells=cells,
        groups=words.groups(cells),
        adapted=words.adapted(cells),
        adapted_of=lambda group: [
            c for c in cells if c["adapted_from"] == group[0]["control"] and words.is_verdict(c)
        ],
        members=words.members_of(cells),
        evaluators=words.evaluators_of(cells),
        home=cells[0]["source"],
        margin=results["margin"],
        saturated=SATURATED,
        weak=WEAK,
        dead=DEAD,
        opened=OPEN,
        pictures={cell["picture"]: is_file(folder, cell["picture"]) for cell in cells},
        rows=rows(results, folder),
        images=images(cells),
        facts=facts(results),
        leakage=leakage(results["leakage"]),
        references=[c for c in cells if words.is_verdict(c) and words.references(c)],
        dose_response=dose_response,
        retentions=retentions,
        numbers=numbers,
    )


def lead(cells: list[dict]) -> str:
    controls = words.counted(len({c["control"] for c in cells if not c["adapted_from"]}), "control")
    members = words.counted(len({c["target"] for c in cells if words.is_verdict(c)}), "other model")
    sources = ", ".join(dict.fromkeys(c["source"] for c in cells))
    return f"{controls} trained on {sources}, tried on {members} without retraining. {images(cells)}"


def images(cells: list[dict]) -> str:
    """How many images the cells are made of."""
    counts = sorted({c["prompts"] for c in cells})
    prompts = f"{counts[0]} to {counts[-1]} prompts" if counts[1:] else words.counted(counts[0], "prompt")
    return f"{prompts} × {words.counted(cells[0]['seeds'], 'seed')} per control and model."


def rows(results: dict, folder: Path) -> str:
    """What the rows of the sheets are, where the record says so."""
    drawn = results["cells"][0]
    path = is_file(folder, drawn["picture"])
    if path is None:
        return ""
    width, height = html.png_size(path.read_bytes())
    count = round(height * len(drawn["scales"]) / width)
    prompts = "; ".join(f"“{prompt}”" for prompt in results["config"]["prompts"][:count])
    return f"Rows, from the top: {prompts}."


def facts(results: dict) -> dict[str, str]:
    """When, how long and with what."""
    cost = "{drawn} images drawn in {seconds:.0f} s, {cached} were there already"
    return {
        "Made": f"{results['created']} · {results['seconds']:.0f} s in all",
        "Cost": cost.format(**results["cost"]),
        "Versions": words.listed(results["versions"]),
        "Hashes": words.listed({c["control"]: c["hash"] for c in results["cells"]}),
    }


def charts_of(results: dict) -> dict[str, Markup | str]:
    """The charts of the page by a name, for files of their own."""
    cells, charts_by_name = list(map(words.led, results["cells"])), {}
    for (control, _), group in words.groups(cells).items():
        for evaluator in words.evaluators_of(group):
            chart = dose_response(group, evaluator, words.members_of(cells))
            charts_by_name[f"{control}-curves-{evaluator}"] = chart
        charts_by_name[f"{control}-retention"] = retentions(group, results["margin"])
    return charts_by_name


def dose_response(group: list[dict], evaluator: str, members: list[str]) -> Markup | str:
    """The effect of one control over its scales, a curve per target; shaded where its slopes are taken."""
    cells = [c for c in group if evaluator in c["readings"]]
    scales = group[0]["scales"]
    lines = {
        words.where(c): list(zip(scales, c["readings"][evaluator]["effect"], strict=True)) for c in cells
    }
    used = cells[0]["readings"][evaluator]["window"]
    inside = [scale for scale, inside in zip(scales, used, strict=True) if inside]
    ends = "; ".join(f"{name} {ranged(line[-1][1], 3)}" for name, line in lines.items())
    colours = [members.index(cell["target"]) % charts.COLOURS for cell in cells]
    dashed = [" dashed" if cell["reference"] else "" for cell in cells]
    return charts.curves(
        lines,
        "scale",
        f"{group[0]['control']} by {evaluator}, effect over scale; at the largest scale: {ends}",
        include=(0.0,),
        columns={scale: signed(scale) for scale in scales},
        paint=[f"c{colour}{dash}" for colour, dash in zip(colours, dashed, strict=True)],
        window=(inside[0], inside[-1]) if inside else None,
        frame=((380, 270), 46, 98),
    )


def retentions(group: list[dict], margin: list[float]) -> Markup | str:
    """The retentions of one control on one axis, by two evaluators, with their references."""
    cells = [c for c in group if not words.is_own(c) and c["retention"]["value"] is not None]
    rows = [(words.where(c), retention_lines(c), ranged(c["retention"])) for c in cells]
    said = "; ".join(f"{name} {text}" for name, _, text in rows)
    title = f"{group[0]['control']}, retention: {said}"
    return charts.forest(rows, "retention", title, (0.0, 1.0), tuple(margin), REACH, (380, 92))


def retention_lines(cell: dict) -> list[dict[str, dict]]:
    """A cell's lines on that axis: a retention by each of two evaluators, then its references."""
    kept = [reading["retention"] for reading in cell["readings"].values()]
    lines = [{kind: interval} for kind, interval in zip(("first", "second"), kept, strict=False)]
    shares = {
        kind: found["share"]
        for kind, found in words.references(cell).items()
        if kind in ("floor", "ceiling", "wrong")
    }
    return [*lines, shares] if shares else lines


def leakage(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """By (target, evaluator): the controls, the attributes and the share of each with each."""
    tables: dict[tuple[str, str], dict] = {}
    for row in rows:
        table = tables.setdefault((row["target"], row["evaluator"]), {"shares": {}})
        table["shares"][row["control"], row["attribute"]] = row["share"] or words.EMPTY
    for table in tables.values():
        table["controls"], table["attributes"] = map(dict.fromkeys, zip(*table["shares"], strict=True))
    return tables


def numbers(group: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of all numbers of one control, a row per member and evaluator; columns of dashes go."""
    pairs = [(cell, name, reading) for cell in group for name, reading in cell["readings"].items()]
    lines = [
        {"on": words.where(cell), "by": name, **reading_numbers(cell, reading)}
        for cell, name, reading in pairs
    ]
    heads = [head for head in lines[0] if any(line[head] != words.DASH for line in lines)]
    return heads, [[line[head] for head in heads] for line in lines]


def reading_numbers(cell: dict, reading: dict) -> dict[str, str]:
    """Every number of one evaluator's reading of a cell, by its name."""
    shape, reach = reading["shape"], reading["matched_scale"]["reach"]
    equal, saturation = reading["preservation_matched"], shape["saturation"]
    role = "source" if words.is_own(cell) else "for comparison" if cell["reference"] else reading["verdict"]
    return {
        "slope": ranged(reading["slope"], 3),
        "retention": ranged(reading["retention"]),
        "verdict": role,
        "retention below 0": below_zero(reading["below_zero"]),
        "slope retention": ranged(reading["slope_retention"]),
        "share of words": ranged(reading["of_words"]),
        **{f"p {claim}": small(tested["p_holm"]) for claim, tested in reading["p"].items()},
        "matched scale": ranged(reading["matched_scale"]),
        "most reached": f"{100 * reach['share']:.0f} % at {number(reach['scale'], 1)}".replace("-", "−")
        if reach
        else words.DASH,
        "area": shown(shape["area"], 3),
        "saturates at": words.DASH if saturation is None else signed(saturation),
        "monotonicity": number(reading["monotonicity"]),
        "right sign": number(shape["signs"]),
        "smoothness": number(shape["smoothness"]),
        "preservation": number(reading["preservation"]),
        "preservation at equal effect": at_equal_effect(equal) if equal else words.DASH,
        "CLIP change": percent(cell["clip_change_percent"]),
        "prompts": str(cell["prompts"]),
        **{f"at {signed(scale)}": ranged(reading["effect"][k], 3) for k, scale in enumerate(cell["scales"])},
    }


def below_zero(side: dict | None) -> str:
    """The retention below 0, marked where it differs from that above."""
    if side is None:
        return words.DASH
    return ranged(side["retention"]) + (" differs" if side["differs"] else "")


def at_equal_effect(equal: dict) -> str:
    return (
        f"{number(equal['target'])}, source {number(equal['source'])}, difference "
        f"{ranged(equal['difference'])}"
    )
