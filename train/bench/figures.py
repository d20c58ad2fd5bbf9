"""What docs/records/gpu.json says, as Markdown: all figures, and the word of docs/families.md on them."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from configs import ROOT, UserError, replacing, versions

RECORD = ROOT / "docs/records/gpu.json"  # of a GPU alone
PAGE = ROOT / "docs/families.md"
BLOCK = re.compile(r"(<!-- gpu -->\n).*?(\n<!-- /gpu -->)", re.S)  # the page's place for it
STAND_IN = "no GPU: the embedded family on the CPU stands in"
WHAT = """`make gpu` measures in at most 9 minutes all that only a GPU can show: SDXL at full size beside
diffusers' pipelines, training steps, peaks of memory, `torch.compile`, commands' values beside the CPU's"""


def read(path: Path) -> dict:
    """The file. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"no file {path}; make gpu writes it")
    return json.loads(path.read_text())


def write(path: Path, record: dict) -> None:
    """A record into its file, whole or not at all."""
    with replacing(path) as new:
        new.write_text(json.dumps(record, indent=1) + "\n")


def write_cells(cfg, cells: list | dict) -> None:
    """What a bench has measured into out/results.json, with its config and what ran."""
    record = {"schema": 1, "config": asdict(cfg), "versions": versions(), "cells": cells}
    write(Path(cfg.out) / "results.json", record)


def markdown(results: dict) -> str:
    """All figures: what they were taken on, those that have an aim, a table per part."""
    device, made = results["hardware"], results["versions"]
    where = STAND_IN
    if device["gpu"]:
        where = f"{device['gpu']}, {device['memory_gb']} GB, driver {device['driver']}, CUDA {device['cuda']}"
    made_by = f"torch {made.get('torch')}, commit {made.get('commit', 'unknown')}"
    lines = [f"{where}; {made_by}, {results['created']}", "", *aims(results)]
    for part, measured in results["parts"].items():
        reason = f": {measured['error']}" if measured["error"] else ""
        earlier = measured.get("created", results["created"])
        when = f", {earlier}" if earlier != results["created"] else ""
        lines += ["", f"**{part}**, {measured['seconds']:.0f} seconds{when}{reason}"]
        if measured["rows"]:
            lines += ["", *table(measured["rows"])]
    return "\n".join(lines)


def aims(results: dict) -> list[str]:
    """The figures that have an aim; none where one could not be measured."""
    rows, lines = results["parts"].get("pictures", {}).get("rows", {}), []
    base, student, hybrid = (rows.get(name, {}) for name in ("base", "student", "hybrid(1), the paper's"))
    if "in_network" in base:
        share = base["in_network"]
        lines.append(f"- share of a base image's seconds inside the network: {share:.1%}; aim: at least 97 %")
    if "seconds" in student and "seconds" in hybrid:
        ratio = hybrid["seconds"] / student["seconds"]
        lines.append(f"- seconds of the paper's hybrid(1) over the student's: {ratio:.3f}; aim: at most 1.02")
    return lines


def table(rows: dict[str, dict]) -> list[str]:
    """Rows as Markdown, a column per figure that any of them has."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| | {' | '.join(key.replace('_', ' ') for key in keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(key, row.get(key)) for key in keys)} |")
    return lines


def cell(key: str, value: float | int | str | bool | None) -> str:
    """A figure in a table; empty for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1%}" if key == "in_network" else f"{value:.3g}"
    return str(value).replace("|", "/")


def docs() -> str:
    """The page's word on it: that it has not run on a GPU, or the figures."""
    if not RECORD.is_file():
        return f"{WHAT}.\n**It has not run on a GPU yet**, so that there is no `docs/records/gpu.json`."
    return f"{WHAT}.\n\n<details><summary>The figures</summary>\n\n{markdown(read(RECORD))}\n\n</details>"


def write_docs() -> Path:
    """Puts that into the page's place for it."""
    text = BLOCK.sub(lambda place: place[1] + docs() + place[2], PAGE.read_text())
    with replacing(PAGE) as new:
        new.write_text(text)
    return PAGE
