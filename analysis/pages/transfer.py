"""The page of analysis.transfer, which needs nothing else; analysis.report writes it.

Reads files and imports no torch.
"""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template

from analysis.pages import words as of
from analysis.pages.figures import colours_of, control_section, page_dial
from analysis.pages.html import number, png_size, short, whole
from analysis.pages.tables import MARKS, heat_map, leakage, reference_table
from analysis.pages.words import advice, dissent, finding, headline, is_verdict, where
from analysis.results import is_file
from controls.retention import MARGIN, SATURATED

BODY = Path(__file__).with_name("transfer.html")
TITLE = "Which controls survive distillation"
OPEN = 6  # up to this many controls their sentences are shown at once; beyond, on demand


def render(results: dict, folder: Path) -> str:
    """The page as text. folder: where the pictures' paths start."""
    results = {**results, "cells": list(map(of.led, results["cells"]))}
    cells = results["cells"]
    groups, colours, margin = (
        of.groups(cells),
        colours_of(of.members_of(cells)),
        results.get("margin", list(MARGIN)),
    )
    names = {key: f"control-{i}" for i, key in enumerate(groups, 1)}
    body = Template(BODY.read_text(encoding="utf-8")).substitute(
        links=_links(results),
        tally=escape(of.tally(cells)),
        legend=_legend(cells) if len(groups) > OPEN else "",
        verdicts="\n".join(
            verdicts(group, names[key], cells[0]["source"], len(groups) <= OPEN)
            for key, group in groups.items()
        ),
        second_note=escape(_second_note(of.evaluators_of(cells))),
        heat=heat_map(cells),
        comparison_note=escape(_comparison_note(cells)),
        dial=page_dial(cells),
        rows=escape(_rows(results, folder)),
        controls="\n".join(
            control_section(group, folder, names[key], colours, margin) for key, group in groups.items()
        ),
        leakage=_leakage(results),
        references=_references(cells),
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(results)),
        command=escape(results.get("command", "")),
        images=escape(_images(cells)),
        margin="[{:g}, {:g}]".format(*margin),
        saturated=f"{SATURATED:g}",
        config=escape(json.dumps(results.get("config", {}), indent=2, ensure_ascii=False)),
    )
    return whole(TITLE, _lead(cells), body)


def verdicts(group: list[dict], name: str, home: str, opened: bool) -> str:
    """The verdicts of one control: its members as chips in one line, and a sentence each on demand.

    name: the id of its section. home: the source that needs no mention.
    """
    targets, source = [c for c in group if is_verdict(c)] or group[:1], group[0]["source"]
    away = f' <span class="away">from {escape(short(source, home))}</span>' if source != home else ""
    chips = "".join(map(chip, targets))
    sentences = "\n".join(f"<li>{sentence(c)}</li>" for c in _distinct(targets))
    return (
        f'<details class="verdict"{" open" * opened}><summary><span class="who">{escape(group[0]["control"])}{away}</span>'
        f'<span class="chips">{chips}</span></summary>\n<ul>\n{sentences}\n</ul>\n'
        f'<p class="note"><a href="#{name}">Curves and images of {escape(group[0]["control"])}</a></p></details>'
    )


def _distinct(targets: list[dict]) -> list[dict]:
    """One of the cells where all are undefined, for then the reason is the same."""
    return targets[:1] if all(c["verdict"] == "undefined" for c in targets) else targets


def chip(cell: dict) -> str:
    """A verdict in few words: mark, member, retention, scale."""
    word, value = cell["verdict"], cell["matched_scale"]["value"]
    numbers = f" {number(cell['retention']['value'])}" if word != "undefined" else ""
    reach = cell["matched_scale"].get("reach")
    scale = (
        f"scale {number(value, 1)}" if value is not None else f"at most {of.reached(reach)}" if reach else ""
    )
    use = f' <span class="use">{scale}</span>' if scale else ""
    mark = f'<span class="mark" aria-hidden="true">{MARKS.get(word, "")}</span><span class="unseen">{escape(word)} on </span>'
    return f'<span class="chip {escape(word)}">{mark}{escape(where(cell))}<b>{numbers}</b>{use}</span>'


def sentence(cell: dict) -> str:
    """The headline of a cell with its mark, the control's name (which stands above it) read but not seen, the
    next step in bold.
    """
    mark = f'<span class="mark {escape(cell["verdict"])}" aria-hidden="true">{MARKS.get(cell["verdict"], "")}</span>'
    if not is_verdict(cell) or cell["verdict"] == "undefined":
        return mark + escape(headline(cell))
    name = f'<span class="unseen">{escape(cell["control"])}: </span>'
    return f"{mark}{name}{escape(finding(cell))}; <b>{escape(advice(cell))}</b>{escape(dissent(cell))}"


def _legend(cells: list[dict]) -> str:
    found = [word for word in of.WORDS if any(c["verdict"] == word for c in cells if is_verdict(c))]
    return " ".join(
        f'<span class="{w}"><span class="mark" aria-hidden="true">{MARKS[w]}</span>{w}</span>' for w in found
    )


def _lead(cells: list[dict]) -> str:
    controls, members = len({c["control"] for c in cells}), len({c["target"] for c in cells if is_verdict(c)})
    sources = ", ".join(dict.fromkeys(c["source"] for c in cells))
    ones = f"{controls} control{'s' * (controls != 1)} trained on {sources}, tried on {members} other model{'s' * (members != 1)}"
    return f"{ones} without retraining. {_images(cells)}"


def _second_note(evaluators: list[str]) -> str:
    return (
        f"Measured by {evaluators[0]}; beneath it by {', '.join(evaluators[1:])}." if evaluators[1:] else ""
    )


def _comparison_note(cells: list[dict]) -> str:
    few = [where(c) for c in cells if c.get("reference") and ":few(" in c["target"]]
    return (
        f"{few[0]} is that member in so few steps, without guidance: what the sampler does, apart from the weights."
        if few
        else ""
    )


def _rows(results: dict, folder: Path) -> str:
    """What the rows of the sheets are, where the record says so."""
    prompts, pictures = (
        results.get("config", {}).get("prompts"),
        [c for c in results["cells"] if c.get("picture")],
    )
    path = is_file(folder, pictures[0]["picture"]) if pictures else None
    if not prompts or path is None:
        return ""
    width, height = png_size(path.read_bytes())
    shown = round(height * len(pictures[0]["scales"]) / width)
    return "Rows, from the top: " + "; ".join(f"“{p}”" for p in prompts[:shown]) + "."


def _links(results: dict) -> str:
    there = {"leakage": results.get("leakage"), "references": reference_table(results["cells"])}
    return "".join(f'<a href="#{name}">{name.capitalize()}</a> ' for name, found in there.items() if found)


def _leakage(results: dict) -> str:
    rows, home = results.get("leakage"), results["cells"][0]["source"]
    return LEAKAGE.format(table=leakage(rows, home)) if rows else ""


def _references(cells: list[dict]) -> str:
    table = reference_table(cells)
    return REFERENCES.format(table=table) if table else ""


LEAKAGE = """<section aria-labelledby="leakage">
<h2 id="leakage">Leakage</h2>
<p>How far each control moves what another one is for, as a share of what that other control itself does there. 1 is as far, 0 not at all;
bold where the interval excludes 0; outlined is a control's own attribute. Slopes are those between scales −1 and 1.</p>
{table}
</section>"""

REFERENCES = """<section aria-labelledby="references">
<h2 id="references">References</h2>
<p>What a retention is to be read against, as shares of the control's slope on its source. <b>Floor</b>: a random control whose weights
have the same norm in every layer, at scale 1. <b>Ceiling</b>: a control of the same words that was trained on the target. <b>Wrong
control</b>: another control, measured by this one's words. <b>Normalised</b>: where the control stands between floor (0) and ceiling (1).
<b>Drawn again</b>: the effect that drawing the images at scale 0 a second time has.</p>
{table}
</section>"""


def _facts(results: dict) -> Iterator[tuple[str, str]]:
    """When, how long and with what, as far as the record says so."""
    cost, versions = results.get("cost"), results.get("versions", {})
    yield (
        "Made",
        " · ".join(filter(None, [results.get("created"), f"{results.get('seconds', 0):.0f} s in all"])),
    )
    if cost:
        yield (
            "Cost",
            f"{cost['drawn']} images drawn in {cost['seconds']:.0f} s, {cost['cached']} were there already",
        )
    if versions:
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    hashes = {c["control"]: c["hash"] for c in results["cells"] if c.get("hash")}
    if hashes:
        yield "Hashes", ", ".join(f"{name} {value}" for name, value in hashes.items())


def _images(cells: list[dict]) -> str:
    counts = {(c["prompts"], c["seeds"], len(c["scales"])) for c in cells}
    each = " or ".join(
        f"{p} prompt{'s' * (p != 1)} × {s} seed{'s' * (s != 1)} × {k} scales" for p, s, k in sorted(counts)
    )
    return f"{each} per control and model, {sum(c['images'] for c in cells)} images in all."
