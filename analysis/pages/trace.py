"""The page of analysis.trace, which needs nothing else; analysis.report writes it.

A scrubber over the steps moves all members together. Reads files and imports no torch.
"""

import base64
import json
from html import escape
from pathlib import Path

from analysis.pages import charts
from analysis.pages.charts import figure, figures, forest, lines, section, shown, table
from analysis.pages.html import number
from analysis.results import is_file

NOTES = {
    "distance": "How far the x0 of each step is from the final image; 1 is how far two seeds of the base are apart (Fig 5).",
    "commitment": "The first step whose x0 is within the tolerance of the final image: as a share of the steps and as noise level t.",
    "abandoned": "Images in which a concept is there at some step and gone in the end; in the second column it was not there at the first "
    "step. A strip shows the x0 of every step.",
    "effect": "The effect of the control on the x0 of each step, over the share of the steps.",
    "parts": "What is left of the control's effect when it acts on a part of the noise levels alone; 1 = all of it.",
    "sheets": "As the paper's Fig 4: x_t above, x0 below, the share of the steps in columns.",
}
STYLE = """<style>
.scrubber { position: sticky; top: 0; z-index: 1; display: flex; gap: .8rem; align-items: center; padding: .7rem 0;
  background: var(--paper); border-bottom: 1px solid var(--line); }
.scrubber input { flex: 1; min-width: 8rem; accent-color: var(--c1); height: 2rem; }
.scrubber button { font: inherit; min-width: 5rem; min-height: 2.2rem; color: var(--ink); background: none; border: 1px solid var(--soft);
  border-radius: 4px; cursor: pointer; }
.scrubber button:focus-visible, .scrubber input:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
.scrubber output { min-width: 4rem; text-align: right; font-variant-numeric: tabular-nums; }
.run { display: flex; flex-wrap: wrap; align-items: end; gap: .8rem; margin: .5rem 0 1.5rem; }
.run figcaption { width: 7rem; font-size: .8rem; line-height: 1.25; min-height: 2.6em; }
.film { width: 7rem; aspect-ratio: 1 / 2; background-repeat: no-repeat; border-radius: 3px; }
.film.small { image-rendering: pixelated; }
</style>"""
SCRIPT = """<script>
(() => {
  const dial = document.getElementById("share"), out = document.getElementById("now"), play = document.getElementById("play");
  const films = [...document.querySelectorAll(".film")];
  let timer = 0;
  const show = () => {
    const share = dial.value / dial.max;
    out.textContent = Math.round(100 * share) + " %";
    for (const film of films) {
      const levels = JSON.parse(film.dataset.levels), count = levels.length;
      const step = Math.max(0, Math.floor(share * count + 1e-9) - 1);
      film.style.backgroundPositionX = count > 1 ? 100 * step / (count - 1) + "%" : "0";
      film.parentElement.querySelector("small").textContent = "step " + (step + 1) + " of " + count + ", t " + Math.round(levels[step]);
    }
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (dial.value === dial.max) dial.value = 0;
    play.textContent = "Stop";
    timer = setInterval(() => { dial.stepUp(); show(); if (dial.value === dial.max) stop(); }, 300);
  });
  dial.addEventListener("input", () => { stop(); show(); });
  show();
})();
</script>"""


def render(results: dict, folder: Path) -> str:
    """The page as text."""
    cells, names, control = results["cells"], results["evaluators"], results["control"]
    lead = (
        f"{len(cells)} ways to draw, {cells[0]['prompts']} prompts × {cells[0]['seeds']} seeds each, paired by seed"
        f"{', and the control ' + control if control else ''}."
    )
    tolerance = results["config"]["tolerance"]
    parts = [
        charts.sentences(findings(cells, results["base"], tolerance, control)),
        section("Step by step", scrubber(results, folder)),
        section(
            "How far from the final image",
            figures(*(distance(cells, name) for name in names)),
            note=NOTES["distance"],
        ),
        section(
            "Commitment",
            commitments(cells, names),
            figures(*(forests(cells, name) for name in names)),
            note=NOTES["commitment"],
        ),
        section("Begun and abandoned", abandoned(cells), *strips(cells, folder), note=NOTES["abandoned"]),
        section(f"The control {control}", *effects(cells, names, results["config"]["bands"]))
        if control
        else "",
        section(
            "Sheets", *(sheet(results, folder, k) for k in range(results["shown"])), note=NOTES["sheets"]
        ),
    ]
    return charts.page("What a model believes at every step", lead, parts, results, STYLE)


def label(cell: dict) -> str:
    """A plan by its student: "dmd", "dmd hybrid(1)", "base(4)"."""
    if cell["plan"] in ("base", "student"):
        return cell["student"]
    return (
        cell["plan"]
        if cell["plan"].startswith((f"{cell['student']}(", "interval"))
        else f"{cell['student']} {cell['plan']}"
    )


def findings(cells: list[dict], base: str, tolerance: float, control: str) -> list[str]:
    """What the numbers say, in sentences."""
    found = []
    for c in cells:
        if c["plan"] not in ("base", "student"):
            continue
        when = c["commitment"].items()
        when = "; ".join(
            f"by {name} after {shown(w['share'], 2)} of the steps, at t {shown(w['t'], 0)}"
            for name, w in when
        )
        found.append(f"{label(c)} commits (within {tolerance:g}) {when}.")
        if control and "control" in c:
            half = "; ".join(f"by {name} at t {shown(e['half']['t'], 0)}" for name, e in c["control"].items())
            found.append(f"{label(c)}: half of the effect of {control} is there {half}.")
    return found


def scrubber(results: dict, folder: Path) -> str:
    """A range input over the share of the steps, and beneath it every member's x_t and x0 at that moment."""
    most = max(len(c["steps"]) for c in results["cells"])
    dial = (
        f'<div class="scrubber"><button id="play" type="button">Play</button>'
        f'<input id="share" type="range" min="0" max="{4 * most}" value="{4 * most}" step="1" aria-label="share of the steps">'
        f'<output id="now" for="share">100 %</output></div>'
    )
    note = '<p class="note">x_t above, x0 below. Arrow keys move the slider by a fraction of a step, Home and End to its ends.</p>'
    heads = [f"<h3>{escape(results['prompts'][k])}</h3>" for k in range(results["shown"])]
    runs = [f'{head}\n<div class="run">{films(results, folder, k)}</div>' for k, head in enumerate(heads)]
    return "\n".join([note, dial, *runs, SCRIPT])


def films(results: dict, folder: Path, k: int) -> str:
    """The sprites of one image, a member each."""
    found = []
    for i, cell in enumerate(results["cells"]):
        path, steps = folder / f"images/sprite-{i}-{k}.webp", [step["t"] for step in cell["steps"]]
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            style = f"background: 100% 0 / {100 * len(steps)}% 100% url(data:image/webp;base64,{data})"
            small = " small" if len(data) < 100_000 else ""
            about = f"{label(cell)}: x_t above, x0 below, {len(steps)} steps"
            head = f"<figcaption><b>{escape(label(cell))}</b><br><small></small></figcaption>"
            found.append(
                f'<figure>{head}<div class="film{small}" role="img" aria-label="{escape(about)}" '
                f'data-levels="{json.dumps(steps)}" style="{style}"></div></figure>'
            )
    return "".join(found)


def distance(cells: list[dict], name: str) -> str:
    """The paper's Fig 5: distance of x0 to the final image over the share of the steps."""
    curves = {
        label(c): [(step["share"], p) for step, p in zip(c["steps"], c["distance"][name], strict=True)]
        for c in cells
    }
    return figure(
        f"by {name}", lines(curves, "share of the steps", "", f"distance of x0 to the final image by {name}")
    )


def commitments(cells: list[dict], names: list[str]) -> str:
    heads = [head for name in names for head in (f"share, by {name}", "t")]

    def when(c):
        return [
            shown(c["commitment"][name][key], digits)
            for name in names
            for key, digits in (("share", 2), ("t", 0))
        ]

    rows = [[label(c), *when(c)] for c in cells]
    return table(["", *heads], rows)


def forests(cells: list[dict], name: str) -> str:
    """The noise level of commitment, a row per plan."""
    rows = [(label(c), c["commitment"][name]["t"], 1) for c in cells]
    return figure(f"by {name}", forest(rows, "t at commitment, high = early", f"t at commitment by {name}"))


def abandoned(cells: list[dict]) -> str:
    if all(c["abandoned"]["falls"] is None for c in cells):
        return ""
    rows = [
        [label(c), *(shown(c["abandoned"][key], 2) for key in ("falls", "rises_and_falls")), str(c["images"])]
        for c in cells
    ]
    return table(["", f"falls, by {cells[0]['abandoned']['evaluator']}", "rises and falls", "images"], rows)


def strips(cells: list[dict], folder: Path) -> list[str]:
    """What was abandoned, with pictures and the score at each step."""
    found = []
    for c in cells:
        path = is_file(folder, c["abandoned"].get("picture"))
        if path:
            says = [
                (f"{e['concept']} in “{e['prompt']}”", ", ".join(number(v, 1) for v in e["score"]))
                for e in c["abandoned"]["examples"]
            ]
            items = "".join(f"<li>{escape(what)}: {scores}</li>" for what, scores in says)
            found.append(
                f"<h3>{escape(label(c))}</h3>{charts.picture(path, 'x0 at every step')}<ul class='note'>{items}</ul>"
            )
    return found


def effects(cells: list[dict], names: list[str], bands: list[float]) -> list[str]:
    """The effect over the steps, and the matrix of what a part of the steps does."""
    followed = [c for c in cells if "control" in c]

    def points(c, name):
        return [(step["share"], p) for step, p in zip(c["steps"], c["control"][name]["effect"], strict=True)]

    names = [name for name in names if followed and name in followed[0]["control"]]  # those that read words
    curves = {name: {label(c): points(c, name) for c in followed} for name in names}
    drawn = figures(
        *(
            figure(f"by {name}", lines(curves[name], "share of the steps", "", f"effect by {name}"))
            for name in names
        )
    )
    notes = [f'<p class="note">{escape(NOTES[key])}</p>' for key in ("effect", "parts")]
    return [
        notes[0],
        drawn,
        notes[1],
        *(matrix([c for c in followed if c["control"][name]["parts"]], name, bands) for name in names),
    ]


def matrix(cells: list[dict], name: str, cuts: list[float]) -> str:
    """Step × effect: a row per member, a column per set of bands."""
    if not cells:
        return ""
    edges = [999.0, *cuts, 0.0]
    parts = [part["bands"] for part in cells[0]["control"][name]["parts"]]
    heads = [f"t {edges[bands[0]]:g}–{edges[bands[-1] + 1]:g}" for bands in parts]
    rows = [[label(c), *(shown(part["share"], 2) for part in c["control"][name]["parts"])] for c in cells]
    return f"<h3>by {escape(name)}</h3>" + table(["on at", *heads], rows)


def sheet(results: dict, folder: Path, k: int) -> str:
    path, head = folder / f"images/sheet-{k}.png", f"<h3>{escape(results['prompts'][k])}</h3>"
    return head + charts.picture(path, "x_t above, x0 below, members in rows") if path.is_file() else ""
