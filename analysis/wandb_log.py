"""Results to their folder and to W&B; pictures beside them."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from analysis.pages import tables, words
from analysis.pages.tables import ends, look_up
from analysis.pages.words import short
from analysis.results import SCHEMA
from configs import command, replacing, versions
from configs.tracking import Tracker

SUMMARY = {"retention": "retention.value", "matched_scale": "matched_scale.value", "verdict": "verdict"}
LOSS, GAIN, UNKNOWN = (
    (217, 95, 14),
    (49, 130, 189),
    (225, 225, 225),
)  # of the heat map, at retentions 0 and 2, and where there is none


def header(recipe: str, cfg: Any, start: float) -> dict:
    """What every record begins with: who made it, of what config, with which versions, when, in how many
    seconds since `start`.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "command": command(),
        "versions": versions(),
        "created": now,
        "seconds": round(time.time() - start, 1),
        "config": asdict(cfg),
    }


def write(results: dict, folder: Path) -> Path:
    """results.json, whole or not at all. Raises ValueError for a number that JSON does not have."""
    path = Path(folder) / "results.json"
    with replacing(path) as new:
        new.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return path


def picture(columns: Tensor, path: Path) -> Path:
    """A sheet from uint8 pictures (K, n, 3, H, W): K scales in columns, n images in rows."""
    page = torch.cat(torch.cat(list(columns), -1).unbind(0), -2)
    with replacing(path) as new:
        Image.fromarray(page.permute(1, 2, 0).numpy()).save(
            new, compress_level=1
        )  # at 6 a third of a run with nothing new
    return path


def track(results: dict, folder: Path, tracker: Tracker, controls: dict[str, Path] | None = None) -> None:
    """Logs the record: a table of cells, of leakage, heat maps, curves, images with a step per scale,
    summary, artifacts and their lineage.

    controls: the files by name, for the lineage. docs/wandb.md lists every key.
    """
    if tracker.run is None:
        return
    cells, folder = list(map(words.led, results["cells"])), Path(folder)
    for step, cell in product(
        range(max(len(c["scales"]) for c in cells)), cells
    ):  # before all else, for W&B's steps only go up
        if step < len(cell["scales"]) and (folder / cell["picture"]).is_file():
            key, scale = f"images/{cell['control']}/{cell['target']}", cell["scales"][step]
            caption = f"{cell['control']} at scale {f'{scale:+g}' if scale else 0} on {cell['target']}"
            tracker.images(
                {key: (column(folder / cell["picture"], step, len(cell["scales"])), caption)}, step
            )
    tracker.table("transfer/cells", *tables.of_cells(cells))
    if results["leakage"]:
        tracker.table("transfer/leakage", *leakage_table(results["leakage"]))
    for evaluator in words.evaluators_of(cells):
        tracker.images(
            {f"transfer/heat/{evaluator}": (heat_map(cells, evaluator), f"retention by {evaluator}")}
        )
    for (control, source), group in words.groups(cells).items():
        curves = {cell["target"]: [point["value"] for point in cell["effect"]] for cell in group}
        title = f"effect of {control}, trained on {source}, by {words.evaluators_of(group)[0]}"
        tracker.curves(f"curves/{control}", group[0]["scales"], curves, title, "scale")
    found = {
        f"{name}/{c['control']}/{c['target']}": look_up(c, path)
        for c in cells
        for name, path in SUMMARY.items()
    }
    tracker.summary({key: value for key, value in found.items() if value is not None})
    for control in dict.fromkeys(c["control"] for c in cells):
        tracker.uses(control, (controls or {}).get(control))
    files = [path for path in (folder / "results.json", folder / "report.html") if path.is_file()]
    tracker.artifact(files, f"transfer-{folder.name}", "results")


def leakage_table(leakage: list[dict]) -> tuple[list[str], list[list]]:
    """Columns and rows: what each control moves of what the others are for."""
    about = ["evaluator", "target", "control", "attribute"]
    columns = [*about, *(f"{name}{end}" for name in ("share", "slope") for end in ("", " low", " high"))]
    return columns, [
        [*(row[key] for key in about), *ends(row, "share"), *ends(row, "slope")] for row in leakage
    ]


def column(path: Path, index: int, count: int) -> Image.Image:
    """One of the columns of a sheet of equal ones."""
    sheet = Image.open(path)
    width = sheet.width // count
    return sheet.crop((index * width, 0, (index + 1) * width, sheet.height)).convert("RGB")


def heat_map(cells: list[dict], evaluator: str, width: int = 120, height: int = 62) -> Image.Image:
    """The paper's Table 1 as a picture: controls in rows, members in columns, retention as colour."""
    groups, members = words.groups(cells), words.members_of(cells)
    several = len({source for _, source in groups}) > 1
    names = {key: " on ".join((key[0], short(key[1]))) if several else key[0] for key in groups}
    big, small = ImageFont.load_default(19), ImageFont.load_default(12)
    left, top = int(max(small.getlength(name) for name in names.values())) + 24, 34
    page = Image.new("RGB", (left + width * len(members) + 12, top + height * len(groups) + 12), "white")
    pen = ImageDraw.Draw(page)
    for c, member in enumerate(members):
        pen.text((left + (c + 0.5) * width, top / 2), short(member), "black", small, anchor="mm")
    for r, (key, group) in enumerate(groups.items()):
        pen.text((left - 12, top + (r + 0.5) * height), names[key], "black", small, anchor="rm")
        for cell in group:
            reading = words.readings(cell).get(evaluator, {})
            x, y = left + members.index(cell["target"]) * width, top + r * height
            pen.rectangle(
                (x + 1, y + 1, x + width - 2, y + height - 2),
                shade(look_up(reading, "retention.value")),
                UNKNOWN,
            )
            _numbers(pen, x + width / 2, y, reading, big, small)
    return page


def _numbers(
    pen: ImageDraw.ImageDraw,
    x: float,
    y: float,
    reading: dict,
    big: ImageFont.ImageFont,
    small: ImageFont.ImageFont,
) -> None:
    """A retention, its interval and the verdict, below one another around x."""
    value, low, high = ends(reading, "retention")
    if value is not None:
        pen.text((x, y + 17), f"{value:.2f}", "black", big, anchor="mm")
    if low is not None and high is not None:
        pen.text((x, y + 34), f"[{low:.2f}, {high:.2f}]", "black", small, anchor="mm")
    pen.text((x, y + 49), reading.get("verdict", ""), "black", small, anchor="mm")


def shade(retention: float | None) -> tuple[int, int, int]:
    """White at 1, towards orange at 0 and below, towards blue at 2 and above, grey where there is none."""
    if retention is None:
        return UNKNOWN
    colour, share = (LOSS if retention < 1 else GAIN), min(abs(retention - 1), 1.0)
    return tuple(round(255 + share * 0.85 * (part - 255)) for part in colour)
