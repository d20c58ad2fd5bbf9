"""The page: whole, self-contained, made without torch."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from support.synthetic import CONTROLS, SCALES, TARGETS, png, results, sheet, write

import configs
from analysis import report
from analysis.pages import charts, figures, html, transfer, words
from controls import intervals

OLD = {
    "window",
    "equivalence",
    "difference",
    "shape",
    "preservation_curve",
    "preservation_matched",
    "references",
    "spread",
    "reference",
    "below",
}


@pytest.fixture(scope="module")
def made() -> dict:
    return results()


@pytest.fixture(scope="module")
def cells(made) -> list[dict]:
    """As a page shows them."""
    return list(map(words.led, made["cells"]))


@pytest.fixture
def folder(made, tmp_path: Path) -> Path:
    """A run folder as analysis.transfer leaves it."""
    return write(made, tmp_path)


def built(found: dict, folder: Path) -> str:
    (folder / "results.json").write_text(json.dumps(found))
    return report.build(folder).read_text()


def text_of(html: str) -> str:
    """What a page says, without its tags."""
    return re.sub(r"<[^>]+>", "", html)


def test_page_holds_every_control_and_value(folder):
    path = report.build(folder)
    page = path.read_text()
    said = text_of(page)
    assert path == folder / "report.html" and "$" not in page
    for c in map(words.led, report.read(folder)["cells"]):
        for reading in c["readings"].values():
            fine = [c["slope"], *reading["effect"], reading["shape"]["area"]]
            for value in [
                *map(words.ranged, (reading["retention"], reading["matched_scale"])),
                *(words.ranged(i, 3) for i in fine),
            ]:
                assert value in page, value
        assert escape(c["control"]) in page and c["verdict"] in page
        assert (escape(words.headline(c)) in said) == words.is_verdict(c), words.headline(c)
    for value in ("its twin", "another", "person, smiling", "4320 images drawn", "an old man", "torch 2.13"):
        assert value in page, value
    assert "age <b>" not in page and "a child" not in page.split("Configuration")[0]
    assert "None" not in page and "nan" not in page


def test_page_stands_alone(folder):
    page = report.build(folder).read_text()
    assert not re.findall(r"https?:|<link|<script src|@import|url\(", page)
    assert "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == len(CONTROLS) * len(TARGETS)
    assert len(re.findall(r'<img alt="[^"]{20,}"', page)) == page.count("<img")


def test_no_torch(folder):
    code = (
        "import sys; from analysis import report; report.build(sys.argv[1]); assert not {'torch', "
        "'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=configs.ROOT)


def test_same_results_same_page(folder):
    assert report.build(folder).read_text() == report.build(folder).read_text()


def test_undefined_and_unreached_numbers_are_dashes(made, folder):
    found = copy.deepcopy(made)
    empty = {"value": None, "low": None, "high": None}
    (folder / found["cells"][1]["picture"]).unlink()
    found["cells"][1] |= {"clip_change_percent": empty}
    unread = {"preservation_matched": None, "spread": None, "verdict": "undefined"}
    found["cells"][1]["readings"]["clip"] |= {
        "retention": empty,
        "matched_scale": empty | {"reach": None},
        **unread,
    }
    found["leakage"][1]["share"] = empty
    page = built(found, folder)
    assert "None" not in page and "No pictures were kept" in page and "smile: undefined" in page


def test_a_control_without_effect_is_one_line(made, folder):
    found = copy.deepcopy(made)
    for c in found["cells"][: len(TARGETS)]:
        for reading in c["readings"].values():
            nothing = [dict.fromkeys(intervals.UNDEFINED, 0.0)] * len(SCALES)
            reading |= {"verdict": "undefined", "retention": intervals.UNDEFINED, "effect": nothing}
    assert built(found, folder).count("smile: undefined") == 1


def test_many_controls_are_one_line_each(made, folder):
    found = copy.deepcopy(made)
    found["cells"] = [{**c, "control": f"{c['control']} {k}"} for k in range(3) for c in made["cells"]]
    page = built(found, folder)
    assert page.count('<details class="verdict">') == 9 and page.count('class="chip ') == 27
    assert report.build(write(made, folder)).read_text().count('<details class="verdict" open>') == 3


def headline(verdict: str, **matched) -> str:
    """The sentence of a cell with this verdict and matched scale."""
    c = {
        "control": "smile",
        "source": "tiny/base",
        "target": "tiny/dmd",
        "verdict": verdict,
        "scales": SCALES,
        "readings": {"clip": {"verdict": verdict}},
        "below_zero": None,
        "retention": {"value": 0.93, "low": 0.88, "high": 0.98},
        "matched_scale": {"value": None, "low": None, "high": None, **matched},
    }
    return words.headline(c)


def test_headline_says_what_to_do():
    assert headline("kept", value=1.1, low=1.0) == "smile: kept on dmd at 0.93 [0.88, 0.98]; use scale 1.1"
    reach = {"share": 0.89, "scale": 1.4}
    assert headline("kept", reach=reach).endswith("0.98]; at most 89 % of the source's effect, at scale 1.4")
    assert headline("dead", reach=reach).endswith("at scale 1.4; train one on dmd")
    none = "; no positive scale has any of the source's effect; train one on dmd"
    assert headline("reversed", reach={"share": 0.0, "scale": 0.0}).endswith(none)
    assert headline("unclear", value=1.1).endswith("; try scale 1.1; more prompts would tell")
    assert "at most 99 %" in headline("kept", reach={"share": 0.998, "scale": 2.0})
    assert headline("kept", reach=None).endswith(
        "; no scale to match, since its effect at +1 on base cannot be told from none"
    )

    c = {
        "verdict": "kept",
        "readings": {
            "clip": {"verdict": "kept"},
            "probe": {"verdict": "weaker"},
            "other": {"verdict": "kept"},
        },
    }
    assert words.dissent(c) == " (by probe weaker)"


def test_what_is_for_comparison_only_stands_apart_and_gets_no_verdict(made, cells, folder):
    assert words.members_of(cells) == [
        f"tiny/{t}" for t in ("base", "dmd", "lcm", "lightning", "base:few(4)")
    ]
    assert (
        words.tally(cells)
        == "Of 9 pairs of a control and another model: 2 kept, 3 weaker, 3 stronger, 1 unclear."
    )
    page = transfer.render({**made, "cells": cells}, folder)
    table = page[page.index('<table class="heat">') :].partition("</table>")[0]
    apart = re.findall(r'<td class="apart".*?</td>', table, re.S)
    assert table.count('scope="col" class="apart"') == 1 and len(apart) == len(CONTROLS)
    few = next(c for c in cells if c["reference"])
    assert words.number(few["retention"]["value"]) in apart[0] and few["verdict"] not in apart[0]
    assert table.count("from dmd") == 1 and "from base" not in table


def test_bad_folders_are_one_line(tmp_path):
    for text in (None, "{", "[]", '{"schema": 1, "cells": [1]}', '{"schema": 3, "cells": []}'):
        if text is not None:
            (tmp_path / "results.json").write_text(text)
        with pytest.raises(configs.UserError, match=r"^[^\n]+$"):
            report.build(tmp_path)


def test_wide_sheets_are_embedded_small(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_bytes(png(sheet(size=300, rows=1)))
    assert html.embedded(path).startswith("data:image/png;base64,") and html.embedded(path, 1800).startswith(
        "data:image/png"
    )
    small = html.embedded(path, 600)
    assert small.startswith("data:image/webp;base64,") and len(small) < len(html.embedded(path))
    (tmp_path / "small.webp").write_bytes(html.base64.b64decode(small.split(",")[1]))
    assert Image.open(tmp_path / "small.webp").size == (600, 100)


def test_ticks_and_labels():
    assert charts.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(-0.042, 0.055, 5) == pytest.approx([-0.04, -0.02, 0, 0.02, 0.04])
    places = charts.spread([10, 11, 12, 90], 14, 5, 95)
    assert np.diff(places).min() > 13.9 and places == sorted(places)


def test_a_curve_of_which_nothing_is_known_is_drawn_and_printed(tmp_path):
    point = {"value": 0.2, "low": None, "high": None}  # no interval: one prompt
    nothing = {"value": None, "low": None, "high": None}
    chart = charts.curves({"bare": [(0, point), (1, point)], "none": [(0, nothing)]}, "scale", "Curves")
    assert "none" in chart and len(figures.write({"curves": chart}, tmp_path)) == 2


def test_the_window_and_the_margin_are_where_their_scales_are(cells):
    own = cells[0]
    assert own["window"] == [False, True, True, True, True, False]
    svg = transfer.dose_response([own], "clip", [own["target"]])
    x, width = (float(re.search(rf'class="window".* {key}="([\d.]+)"', svg)[1]) for key in ("x", "width"))
    dots = [float(v) for v in re.findall(r'<circle class="c0" cx="([\d.]+)"', svg)]
    assert (x, x + width) == pytest.approx((dots[1], dots[4]), abs=0.2)


def test_retentions_stand_on_one_axis_with_the_margin(cells):
    group = [c for c in cells if c["control"] == "smile"]
    svg = transfer.retentions(group, [0.5, 1.5])
    x, width = (float(re.search(rf'class="margin".* {key}="([\d.]+)"', svg)[1]) for key in ("x", "width"))
    found = [float(v) for v in re.findall(r'<path class="first" transform="translate\(([\d.]+)', svg)]
    wanted = [x + width * (c["retention"]["value"] - 0.5) for c in group if not words.is_own(c)]
    assert found == pytest.approx(wanted, abs=0.2)
    assert all(svg.count(f'<path class="{kind}"') == 4 for kind in charts.SHAPES)


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float(
        np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        @ [0.2126, 0.7152, 0.0722]
    )


def test_every_colour_can_be_read_as_text():
    for scheme in re.findall(r":root \{(.*?)\}", html.source("page.css"), re.S):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        grounds = [luminance(colours.pop(name)) for name in ("paper", "tint")]
        assert len(colours) == charts.COLOURS + 6
        for name in colours.keys() - {"line"}:
            for ground in grounds:
                dark, light = sorted((luminance(colours[name]), ground))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_p_values():
    assert [words.small(p) for p in (0.0004, 0.0316, 1.0, None)] == ["< 0.001", "0.032", "1.000", "–"]
