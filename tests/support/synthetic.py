"""The one made-up run folder of the transfer validator: known retentions, every part of the record, a grey
per column of its sheets; and a tracker that remembers its keys.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from analysis import transfer
from configs import ROOT
from controls import effect, intervals, retention

SCALES = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]
ZERO, AT = 2, 4  # where 0 and 1 stand among them
TARGETS = {
    "base": 1.0,
    "dmd": 0.93,
    "lcm": 0.55,
    "lightning": 1.4,
    "base:few(4)": 0.4,
}  # the retention of a control from base
CONTROLS = {
    "smile": ("base", 0.03),
    "age <b>": ("base", 0.02),
    "eyes-dmd": ("dmd", 0.025),
}  # source and slope
TRACKED = {"smile": ("base", 0.03), "age": ("base", 0.02), "nothing": ("base", 0.0)}  # one without effect
UNIT = {"clip": 1, "probe": 12}  # of the effects that evaluators read
GREYS = [20, 60, 100, 140, 180, 220]  # of the columns of a sheet


def png(image: np.ndarray) -> bytes:
    """A PNG file of (H, W, 3) uint8, written by hand."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def sheet(size: int = 16, rows: int = 4) -> np.ndarray:
    """One grey per column: (rows · size, 6 · size, 3)."""
    return np.tile(np.repeat(np.array(GREYS, np.uint8), size)[None, :, None], (rows * size, 1, 3))


def simulated(strength: float, seed: int) -> np.ndarray:
    """Effects (12, 4, 6) of a control of this strength, saturating, with noise of prompts and images; same
    prompts for every seed.
    """
    prompts = np.random.default_rng(7).normal(1, 0.15, (12, 1, 1))
    noise = np.random.default_rng(seed).normal(0, 0.003, (12, 4, len(SCALES)))
    return effect.change(strength * prompts * np.tanh(np.array(SCALES) / 1.5) * 1.5 + noise, ZERO)


def reading(source: np.ndarray, target: np.ndarray, on_source: bool) -> dict:
    """What one evaluator reads of a cell, with the keys that analysis.transfer writes."""
    inside = retention.window(source, SCALES)
    below, above = (intervals.units(effect[..., AT]) for effect in (source, target))
    under, beyond = (intervals.units(effect[..., 1]) for effect in (source, target))  # at scale -1
    kept, p = intervals.ratio(above, below), retention.tests(below, above)
    p_holm = {claim: min(1.0, 3 * value) for claim, value in p.items()}

    def share(factor):
        return intervals.ratio(factor * below + 0.002 * np.sin(np.arange(len(below))), below)

    def part(factor):
        return {"slope": intervals.mean(factor * below), "share": share(factor)}

    return {
        "window": inside.tolist(),
        **retention.estimate(target, SCALES, inside),
        "retention": kept,
        "below_zero": {
            "retention": intervals.ratio(beyond, under),
            "differs": retention.differ((below, above), (under, beyond)),
        },
        "slope_retention": retention.slope_retention(source, target, SCALES),
        "of_words": {"value": 0.6, "low": 0.5, "high": 0.7},
        "p": {claim: {"p": p[claim], "p_holm": p_holm[claim]} for claim in p},
        "matched_scale": retention.matched_scale(source, target, SCALES),
        "shape": retention.shape(target, SCALES),
        "monotonicity": retention.monotonicity(target, SCALES),
        "preservation": 0.97,
        "preservation_curve": [0.9, 0.95, 1.0, 0.98, 0.95, 0.9],
        "preservation_matched": {
            "source": 0.96,
            "target": 0.95,
            "difference": {"value": -0.01, "low": -0.02, "high": 0.0},
        },
        "references": {
            "floor": None if on_source else part(0.04),
            "ceiling": None if on_source else {"control": "its twin", **part(1.02)},
            "wrong": None if on_source else {"control": "another", **part(-0.1)},
            "rerun": {"effect": {"value": 0.0, "low": 0.0, "high": 0.0}},
            "normalised": None if on_source else share(0.91),
        },
        "spread": retention.spread(source[..., AT], target[..., AT]),
        "verdict": retention.verdict(kept, p_holm),
    }


def cell(control: str, target: str) -> dict:
    source, strength = (CONTROLS | TRACKED)[control]
    number, on_source = sum(map(ord, control)), target == source
    share, seed = TARGETS[target] / TARGETS[source], number if on_source else number + 10
    readings = {
        evaluator_name: reading(
            simulated(strength * unit, number), simulated(share * strength * unit, seed), on_source
        )
        for evaluator_name, unit in UNIT.items()
    }
    return {
        "control": control,
        "kind": "slider",
        "hash": f"{number:016x}",
        "source": f"tiny/{source}",
        "target": f"tiny/{target}",
        "reference": target == "base:few(4)",
        "scales": SCALES,
        "readings": readings,
        "clip_change_percent": {"value": 17.8, "low": 12.1, "high": 23.5},
        "at": 1.0,
        "looks": 1,
        "images": 288,
        "prompts": 12,
        "seeds": 4,
        "positive": "person, smiling",
        "negative": "person, sad",
        "below": None,
        "above": None,
        "adapted_from": "",
        "picture": f"images/{number}/{target.replace(':', '-')}.png",
    }


def leakage(names: list[str]) -> list[dict]:
    """One row per evaluator, target, control and attribute."""

    def share(a, b):
        return 1.0 if a == b else 0.11 * (len(a) - len(b))

    return [
        {
            "evaluator": evaluator_name,
            "target": f"tiny/{target}",
            "control": a,
            "attribute": b,
            "slope": {"value": 0.02, "low": 0.01, "high": 0.03},
            "share": {"value": share(a, b), "low": share(a, b) - 0.1, "high": share(a, b) + 0.1},
        }
        for evaluator_name in UNIT
        for target in ("base", "dmd", "lcm", "lightning")
        for a in names
        for b in names
    ]


def results(controls: Iterable[str] = CONTROLS) -> dict:
    """The record of these controls, as analysis.transfer writes it."""
    controls = list(controls)
    cells = [cell(control, target) for control in controls for target in TARGETS]
    return {
        "schema": 3,
        "recipe": "analysis.transfer",
        "command": "python -m analysis.transfer",
        "versions": {"torch": "2.13"},
        "created": "2026-01-01T00:00:00",
        "seconds": 61.5,
        "config": {
            "family": "tiny",
            "prompts": ["portrait of a person", "a man", "a woman", "an old man", "a child"],
            "seeds": 4,
        },
        "evaluators": list(UNIT),
        "margin": [0.8, 1.25],
        "prompts": [12],
        "cost": {"drawn": 4320, "cached": 0, "seconds": 50.0},
        "cells": cells,
        "agreement": transfer.agreement_of(cells),
        "leakage": leakage(controls),
    }


def write(record: dict, folder: Path) -> Path:
    """results.json and its sheets, in a folder that need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for c in record["cells"]:
        if c["picture"]:
            (folder / c["picture"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / c["picture"]).write_bytes(png(sheet()))
    (folder / "results.json").write_text(json.dumps(record))
    return folder


class Keys:
    """A tracker that remembers what it was asked to log, and nothing else."""

    def __init__(self):
        self.logged: set[str] = set()

    def log(self, values: dict, step: int | None = None) -> None:
        self.logged |= values.keys()

    def table(self, key: str, columns: list[str], rows: list[list]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.logged.add(key)

    def image(self, key: str, path: Path, caption: str | None = None) -> None:
        assert Path(path).is_file()
        self.logged.add(key)

    def uses(self, *_) -> None: ...

    def artifact(self, path: Path, name: str, type: str) -> None:
        assert Path(path).exists() and type == "results"


def documented(*commands: str) -> dict[str, re.Pattern]:
    """The keys of the table in docs/wandb.md, all or of some commands; <words> stand for anything."""
    section = (ROOT / "docs/wandb.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (\w+)[^|]* \|$", section, re.M)
    return {
        key: re.compile(re.sub(r"<[^>]+>", ".+", key))
        for key, where in rows
        if where in (commands or (where,))
    }


def undocumented(logged: set[str], command: str) -> list[str]:
    """The keys that a command logs and the table lacks, and the other way round."""
    patterns = documented(command)
    lost = [key for key in sorted(logged) if not any(pattern.fullmatch(key) for pattern in patterns.values())]
    return lost + [key for key, pattern in patterns.items() if not any(map(pattern.fullmatch, logged))]
