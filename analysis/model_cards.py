"""What a transfer run measured, as a model card per control, and as the same numbers in the control's own
header.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from analysis.pages import words
from analysis.pages.words import ranged
from configs import ROOT, UserError, plain_name, replacing
from controls import formats
from controls.lora import Card
from controls.scales import HOPELESS
from models import families

KINDS = {"slider": "A Concept Slider", "lora": "A LoRA", "sliderspace": "A SliderSpace direction"}
NOTE = """Use scale: where the effect is the one that the control has at scale 1 on the model it was trained
on. Kept: slope of the effect over the scale, as a share of the slope there, and a verdict on it; *kept* is
shown to lie within {low:g} and {high:g}. In brackets 95 % intervals."""


def write(results: dict, folder: Path) -> list[Path]:
    """cards/<control>.md of every control in a run folder; returns their paths.

    Raises UserError for a name that would lead elsewhere.
    """
    paths = []
    for control in dict.fromkeys(cell["control"] for cell in results["cells"]):
        paths.append(Path(folder) / f"cards/{plain_name(control, 'control')}.md")
        with replacing(paths[-1]) as new:
            new.write_text(text(results, control), encoding="utf-8")
    return paths


def into_header(results: dict, path: Path) -> None:
    """Writes the numbers into the card of a control's file; its tensors and the rest of its header stay as
    they are.

    Raises UserError as `carded` does, and for a control that the run did not measure.
    """
    card, measured = carded(path), list(dict.fromkeys(cell["control"] for cell in results["cells"]))
    if card.name not in measured:
        raise UserError(
            f"{path} is {card.name}, which this run did not measure: it measured {', '.join(measured)}"
        )
    formats.relabel(replace(card, transfer=numbers(results, card.name)), path)


def carded(path: Path) -> Card:
    """The card in a control's file. Raises UserError where there is none to write into."""
    card = formats.card_of(path, formats.read(Path(path))[1])
    if card is None:
        raise UserError(f"{path} has no card to write into; python -m controls.convert makes it one of ours")
    return card


def numbers(results: dict, control: str) -> dict:
    """What to know before using a control: scale, retention, verdict per target and evaluator."""
    cells = [cell for cell in results["cells"] if cell["control"] == control and not cell["reference"]]
    targets = {
        cell["target"]: {
            evaluator_name: {
                "scale": reading["matched_scale"],
                "retention": reading["retention"],
                "verdict": reading["verdict"],
            }
            for evaluator_name, reading in words.readings(cell).items()
        }
        for cell in cells
    }
    first = cells[0]
    about = {key: first[key] for key in ("source", "scales", "prompts", "seeds")}
    how = {key: results[key] for key in ("margin", "command", "created", "versions")}
    return {**about, "targets": targets, **how}


def text(results: dict, control: str) -> str:
    """A model card in Markdown, with the front matter that Hugging Face reads."""
    cell, found = next(c for c in results["cells"] if c["control"] == control), numbers(results, control)
    ends = f' from "{plain(cell["negative"])}" to "{plain(cell["positive"])}"' if cell["negative"] else ""
    evaluators = words.evaluators_of([cell])
    heads = ["on", "use scale", *(f"kept, by {plain(evaluator_name)}" for evaluator_name in evaluators)]
    rows = [
        [
            code(target) + (", trained on it" if target == found["source"] else ""),
            scale(by[evaluators[0]], found["scales"]),
            *(
                f"{ranged(by[evaluator_name]['retention'])} {plain(by[evaluator_name]['verdict'])}"
                for evaluator_name in evaluators
            ),
        ]
        for target, by in found["targets"].items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])
    versions = ", ".join(plain(f"{name} {version}") for name, version in found["versions"].items())
    (low, high), scales = found["margin"], ", ".join(f"{s:g}" for s in found["scales"])
    return f"""---
{front(results, cell).strip()}
---
# {plain(control)}

{KINDS.get(cell["kind"], "A control")}{ends}, trained on {code(found["source"])}.

{table}

{NOTE.format(low=low, high=high)}

{found["prompts"]} prompts × {found["seeds"]} seeds at scales {scales}, measured {plain(found["created"])} by

    {" ".join(str(found["command"]).split())}

with {versions}.
"""


def plain(text: str) -> str:
    """A text in one line, in which Markdown and HTML find nothing of theirs."""
    return (
        re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(text).split()))
        .replace("&", "&amp;")
        .replace("\\<", "&lt;")
    )


def code(text: str) -> str:
    """A name as code, also in a table."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def scale(reading: dict, scales: list[float]) -> str:
    """The scale to use, in words."""
    matched = reading["scale"]
    if reading["verdict"] in HOPELESS:
        return "none"
    if matched["value"] is not None:
        return ranged(matched)
    reach = matched["reach"]
    return f"none up to {scales[-1]:g}" + (
        f"; at {reach['scale']:.2g} it has {reach['share']:.0%} of the effect" if reach else ""
    )


@cache
def family_of(name: str) -> families.FamilyCard:
    return families.card(name)


def front(results: dict, cell: dict) -> str:
    """YAML for Hugging Face; base_model only where the network is on the Hub and not a folder of this
    project.
    """
    tags = ["lora", *(["concept-slider"] if cell["kind"] == "slider" else []), "distilled-control"]
    found = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    family, member = family_of(results["config"]["family"]), families.split(cell["source"])[1]
    repo = family.members[member].repo or family.repo if member in family.members else ""
    if repo and not (ROOT / repo).exists():
        found |= {"base_model": repo, "base_model_relation": "adapter"}
    return yaml.safe_dump(found, sort_keys=False)
