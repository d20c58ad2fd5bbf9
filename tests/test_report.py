"""The page: whole, self-contained, made without torch."""

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import configs
from analysis import page, report
from controls import effect, stats

SCALES = [-2.0, -1.0, 0.0, 1.0, 2.0]
MEMBERS = {"base": 1.0, "dmd": 0.95, "lcm": 0.55, "lightning": 1.4}
CONTROLS = {"smile": 0.03, "age <b>": 0.02}


def png(image: np.ndarray) -> bytes:
    """A PNG file of (H, W, 3) uint8, written by hand."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def simulated(strength: float, seed: int) -> np.ndarray:
    """Effects (12, 4, 5) of a control of this strength, saturating, with noise of prompts and images; same prompts for every seed."""
    prompts = np.random.default_rng(7).normal(1, 0.15, (12, 1, 1))
    noise = np.random.default_rng(seed).normal(0, 0.006, (12, 4, 5))
    return effect.change(strength * prompts * np.tanh(np.array(SCALES) / 1.5) * 1.5 + noise, 2)


def reading(source: np.ndarray, target: np.ndarray) -> dict:
    kept, (below, above) = stats.retention(source, target, SCALES), stats.slopes(source, target, SCALES)
    return {
        **stats.estimate(target, SCALES),
        "retention": kept,
        "verdict": stats.verdict(kept, stats.equivalence(above, below), stats.difference(above, below)),
        "monotonicity": stats.monotonicity(target, SCALES),
        "matched_scale": stats.matched_scale(source, target, SCALES),
    }


def cell(control: str, member: str, number: int) -> dict:
    strength = CONTROLS[control]
    pairs = {who: [simulated(s * strength * unit, seed + number) for s, seed in ((1, 0), (MEMBERS[member], 10 * (member != "base")))]
             for who, unit in (("clip", 1), ("probe", 12))}
    return {
        "control": control, "kind": "slider", "source": "tiny/base", "target": f"tiny/{member}", "evaluator": "clip", "scales": SCALES,
        **reading(*pairs["clip"]), "clip_change_percent": 17.8, "preservation": 0.97, "images": 240, "prompts": 12, "seeds": 4,
        "picture": f"images/{number}/{member}.png", "second": {"probe": reading(*pairs["probe"])},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder as analysis.transfer leaves it."""
    cells = [cell(control, member, i) for i, control in enumerate(CONTROLS) for member in MEMBERS]
    for c in cells:
        path = tmp_path / c["picture"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.full((8, 5 * 8, 3), 120, np.uint8)))
    results = {"schema": 1, "command": "python -m analysis.transfer", "versions": {"torch": "2.13"}, "created": "2026-01-01T00:00:00",
               "seconds": 61.5, "config": {"prompts": 12}, "evaluators": ["clip", "probe"], "cells": cells}  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_page_holds_every_control_and_value(folder):
    path = report.build(folder)
    page = path.read_text()
    assert path == folder / "report.html" and "$" not in page
    for c in report.read(folder)["cells"]:
        intervals = [c["retention"], c["matched_scale"], c["second"]["probe"]["retention"]]
        fine = [c["slope"], *c["effect"], *c["second"]["probe"]["effect"]]
        for value in [report.escape(c["control"]), c["verdict"], *map(report.ranged, intervals), *(report.ranged(i, 3) for i in fine)]:
            assert value in page, value
        if c["source"] != c["target"]:
            assert report.escape(report.headline(c)) in page
    assert "age <b>" not in page
    assert "None" not in page and "nan" not in page


def test_page_stands_alone(folder):
    page = report.build(folder).read_text()
    assert not re.findall(r"https?:|<link|<script|@import|url\(", page)
    assert page.count("data:image/png;base64,") == len(CONTROLS) * len(MEMBERS)
    assert len(re.findall(r'<img alt="[^"]{20,}"', page)) == page.count("<img")


def test_no_torch(folder):
    code = "import sys; from analysis import report; report.build(sys.argv[1]); assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=configs.ROOT)


def test_same_results_same_page(folder):
    assert report.build(folder).read_text() == report.build(folder).read_text()


def test_undefined_and_unreached_numbers_are_dashes(folder):
    results = report.read(folder)
    empty = {"value": None, "low": None, "high": None}
    missing = {"clip_change_percent": None, "picture": None}
    results["cells"][1] |= {"retention": empty, "matched_scale": empty, "verdict": "undefined", **missing}
    (folder / "results.json").write_text(json.dumps(results))
    page = report.build(folder).read_text()
    assert "None" not in page and "No pictures were kept" in page and "smile: undefined on dmd" in page


def test_headline():
    c = {"control": "smile", "source": "tiny/base", "target": "tiny/dmd", "verdict": "kept", "scales": SCALES,
         "retention": {"value": 0.93, "low": 0.88, "high": 0.98}, "matched_scale": {"value": 1.1, "low": 1.0, "high": None}}  # fmt: skip
    assert report.headline(c) == "smile: kept on dmd at 0.93 [0.88, 0.98]; use scale 1.1"
    c["second"] = {"probe": {"verdict": "weaker"}}
    assert report.headline(c).endswith("use scale 1.1 (by probe weaker)")
    c["matched_scale"] = {"value": None, "low": None, "high": None}
    assert "no scale up to +2 gives the same effect" in report.headline(c)


def test_bad_folders_are_one_line(tmp_path):
    for text in (None, "{", "[]", '{"schema": 2, "cells": [1]}', '{"schema": 1, "cells": []}'):
        if text is not None:
            (tmp_path / "results.json").write_text(text)
        with pytest.raises(configs.UserError, match=r"^[^\n]+$"):
            report.build(tmp_path)


def test_a_control_without_effect_is_one_line(folder):
    results = report.read(folder)
    for c in results["cells"][:4]:
        c |= {"verdict": "undefined", "retention": stats.UNDEFINED, "effect": [dict.fromkeys(stats.UNDEFINED, 0.0)] * 5}
        c["second"]["probe"] = {k: c[k] for k in ("verdict", "retention", "effect", "slope", "matched_scale", "monotonicity")}
    (folder / "results.json").write_text(json.dumps(results))
    assert report.build(folder).read_text().count("smile: undefined") == 1


def test_ticks_and_labels():
    assert page.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert page.ticks(-0.042, 0.055, 5) == pytest.approx([-0.04, -0.02, 0, 0.02, 0.04])
    places = page.spread([10, 11, 12, 90], 14, 5, 95)
    assert np.diff(places).min() > 13.9 and places == sorted(places)
