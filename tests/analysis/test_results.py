"""Records read back: what is not ours in every key is one line, what a page holds is text, and no path leads
out of the run's folder.
"""

import json
import random
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from support import synthetic

from analysis import dashboard, model_cards, report, results, wandb_log
from analysis.images import readings
from analysis.pages import tables
from configs import UserError
from configs.options import merge

EVIL = "<script>alert(1)</script>\"'&`$x"


def example(shape, text: str = "word"):
    """A value of a shape, every text of it the same."""
    if isinstance(shape, results.Maybe | results.Null):
        return example(shape.shape, text)
    if isinstance(shape, dict):
        return {key: example(inner, text) for key, inner in shape.items()}
    if isinstance(shape, results.Each):
        return {name: example(shape.shape, text) for name in dict.fromkeys((text, "clip"))}
    if isinstance(shape, results.Filled) and isinstance(shape.shape, results.Each):
        return example(shape.shape, text)
    if isinstance(shape, list | results.Filled):
        return [example(shape[0] if isinstance(shape, list) else shape.shape, text) for _ in range(2)]
    return shape[0] if isinstance(shape, tuple) else {str: text, bool: True, int: 2, float: 0.5}[shape]


def record(command: str, text: str = "word") -> dict:
    """A record of a command in which each part fits the others."""
    found = {**example(results.SHAPES[command], text), "schema": 3, "recipe": command}
    if command == "analysis.transfer":
        for cell, target in zip(found["cells"], (text, f"{text}/other"), strict=True):
            cell |= {
                "scales": [-1.0, 1.0],
                "target": target,
                "source": text,
                "reference": False,
                "picture": f"images/{target}.png",
            }
    elif command == "analysis.trace":
        found["evaluators"] = [text, "clip"]
        for cell in found["cells"]:
            for followed in cell["control"].values():
                followed["parts"] = [{**part, "bands": [k]} for k, part in enumerate(followed["parts"])]
    elif command == "analysis.diversity":
        found |= {"evaluators": [text, "clip"], "base": "base"}
        plans = (("base", "base"), (text, "student"), (text, "hybrid(1)"), (text, "delta(0.5)"), (text, text))
        found["cells"] = [{**found["cells"][0], "student": student, "plan": plan} for student, plan in plans]
        for row in (row for cell in found["cells"] for row in cell["per_prompt"]):
            row |= example(results.Each(results.INTERVAL), text)
    else:
        found["cells"] = [
            {**example(shape, text), "what": what} for what, shape in results.SIMILARITY.items()
        ]
        block = found["cells"].pop(0)
        found["cells"] += [
            {**block, "inputs": inputs, "step": step} for inputs in ("forced", "own") for step in (0, 1)
        ]
        stitch, point = (
            next(cell for cell in found["cells"] if cell["what"] == what) for what in ("stitch", "point")
        )
        found["cells"].append({**stitch, "up": f"{text} up"})
        point[text] = 0.5
    return found


def folder_of(found: dict, folder: Path) -> Path:
    """A run folder that holds a record, and a picture at each place where its page may look for one."""
    (folder / "results.json").write_text(json.dumps(found))
    return folder


class Structure(HTMLParser):
    """The tags of a page and the names of their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))


@pytest.fixture(params=results.SHAPES)
def command(request) -> str:
    return request.param


def test_the_report_draws_any_run_folder_and_nothing_in_it_is_more_than_text(
    tmp_path, command, monkeypatch, capsys
):
    pages = []
    for text in ("word", EVIL):
        monkeypatch.setattr("sys.argv", ["report", str(folder_of(record(command, text), tmp_path))])
        report.main()
        pages.append((tmp_path / "report.html").read_text())
    assert "report.html" in capsys.readouterr().out
    assert "<script>alert" not in pages[1] and "&lt;script&gt;alert" in pages[1]
    assert Structure(pages[0]).tags == Structure(pages[1]).tags


BROKEN = {  # what is done to a record, and what the line says of it
    "analysis.transfer": [
        (lambda r: r.pop("cells"), "no cells of schema 3"),
        (lambda r: r["cells"][0].update(readings={}), "readings must be keys and values, at least one"),
        (lambda r: r.update(cells=[]), "no cells of schema 3"),
        (lambda r: r.update(schema=1), "no cells of schema 3"),
        (lambda r: r.update(recipe="analysis.magic"), "made by 'analysis.magic'"),
        (lambda r: r["cells"].append(3), r"cells\[2\] must be keys and values; got 3"),
        (
            lambda r: r["cells"][1]["readings"]["clip"].pop("retention"),
            r"cells\[1\].readings.clip.retention is not there",
        ),
        (
            lambda r: r["cells"][1]["readings"]["clip"]["retention"].pop("low"),
            r"cells\[1\].readings.clip.retention.low is not there",
        ),
        (
            lambda r: r["cells"][0]["readings"]["clip"]["effect"][1].update(value="x"),
            r"cells\[0\].readings.clip.effect\[1\].value must be a number; got \"x\"",
        ),
        (
            lambda r: r["cells"][0]["readings"]["clip"].update(verdict="splendid"),
            r"readings.clip.verdict must be one of kept",
        ),
        (lambda r: r["cells"][0].update(scales=[]), "scales must be a list of something"),
        (lambda r: r["cells"][0].update(scales=[0.5]), "its parts do not belong together"),
        (
            lambda r: r["cells"][0]["readings"]["clip"]["effect"].append(
                {"value": 0.1, "low": 0.0, "high": 0.2}
            ),
            "its parts do not belong together",
        ),
        (lambda r: r["cells"][0].update(images=-1), "images must be a count"),
        (lambda r: r["cells"][0].update(images=10**400), "images must be a count"),
        (lambda r: r.update(seconds=float("nan")), "not JSON .NaN"),
    ],
    "analysis.trace": [
        (lambda r: r.pop("shown"), "shown is not there"),
        (lambda r: r.update(shown=10**9), "do not belong together"),
        (lambda r: r["cells"][0].update(plan=None), r"cells\[0\].plan must be a text; got null"),
        (
            lambda r: r["cells"][0]["control"]["clip"].update(half=[]),
            "control.clip.half must be keys and values",
        ),
        (lambda r: r["config"].update(bands="all"), "config.bands must be a list"),
    ],
    "analysis.diversity": [
        (lambda r: r.pop("fronts"), "fronts is not there"),
        (lambda r: r["cells"].pop(0), "do not belong together"),
        (lambda r: r["cells"][1]["diversity"].pop("clip"), "do not belong together"),
        (lambda r: r["cells"][1].update(steps={}), r"cells\[1\].steps must be a list"),
    ],
    "analysis.similarity": [
        (lambda r: r["cells"][0].update(what="else"), r"cells\[0\].what must be one of block"),
        (lambda r: r["cells"][-1].pop("to_up"), "to_up is not there"),
        (lambda r: r["cells"].__delitem__(slice(1, None)), "do not belong together"),
    ],
}


@pytest.mark.parametrize(
    ("command", "harm", "says"), [(name, *row) for name, rows in BROKEN.items() for row in rows]
)
def test_a_broken_record_is_one_line_that_names_file_and_key(tmp_path, command, harm, says):
    found = record(command)
    harm(found)
    with pytest.raises(UserError, match=says) as error:
        report.build(folder_of(found, tmp_path))
    assert (
        str(tmp_path / "results.json") in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 600
    )
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"schema": true, "cells": [1]}', b"null", b"\x80\x04."],
)
def test_what_is_no_record_is_one_line(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match="results.json"):
        results.read(tmp_path)


def test_another_commands_record_is_not_taken(tmp_path, monkeypatch):
    folder_of(record("analysis.trace"), tmp_path)
    with pytest.raises(
        UserError, match="made by 'analysis.trace'; give a folder that python -m analysis.transfer made"
    ):
        results.read(tmp_path, "analysis.transfer")
    monkeypatch.setattr(dashboard.tracking, "logged_in", lambda: True)
    with pytest.raises(UserError, match="made by 'analysis.trace'"):
        dashboard.main(merge(dashboard.Config, {"run": str(tmp_path)}))


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "/{}/secret.png", "a/../../secret.png", "link.png", "linked/secret.png", ".", "a\0b"],
)
def test_no_picture_is_read_from_outside_of_the_run(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_bytes(synthetic.png(np.zeros((2, 2, 3), np.uint8)))
    (tmp_path / "run/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "run/linked").symlink_to(tmp_path)
    found = record("analysis.transfer")
    found["cells"][0]["picture"] = name.format(tmp_path)
    with pytest.raises(UserError, match="is not a file of|can hold no"):
        report.build(folder_of(found, tmp_path / "run"))


@pytest.mark.parametrize("command", ["analysis.trace", "analysis.diversity", "analysis.similarity"])
def test_nor_by_the_other_pages(tmp_path, command):
    with pytest.raises(UserError, match="is not a file of"):
        report.build(folder_of(record(command, "../../../x"), tmp_path))


HARMS = [
    lambda data: data[:60],
    lambda data: b"",
    lambda data: data[:16] + bytes(8) + data[24:],
    lambda data: b"GIF89a",
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_picture_is_one_line(tmp_path, harm):
    found = record("analysis.transfer")
    path = folder_of(found, tmp_path) / found["cells"][0]["picture"]
    path.parent.mkdir(parents=True)
    path.write_bytes(harm(synthetic.png(np.zeros((8, 1200, 3), np.uint8))))
    with pytest.raises(UserError, match="picture|damaged"):
        report.build(tmp_path)


ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e-320,
    1e14,
    "",
    "../x",
    "x" * 500,
    [],
    {},
    [None],
    {"a": {}},
    "<script>alert",
    "\ud800",
    "\0",
]


def twisted(value, rng: random.Random, depth: int = 0):
    """A plain value with one part replaced, removed or doubled."""
    if depth > 5 or not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    if isinstance(value, list):
        k = rng.randrange(len(value))
        return [
            *value[:k],
            *rng.choice([[], value[k : k + 1] * 2, [twisted(value[k], rng, depth + 1)]]),
            *value[k + 1 :],
        ]
    key = rng.choice(sorted(value))
    if rng.random() < 0.2:
        return {name: inner for name, inner in value.items() if name != key}
    return (
        value
        | {key: twisted(value[key], rng, depth + 1)}
        | ({rng.choice(["odd", "ü"]): rng.choice(ODD)} if rng.random() < 0.1 else {})
    )


def test_no_record_ends_in_a_traceback(tmp_path, command):
    whole, drawn = record(command), 0
    for k in range(150):
        found = twisted(deepcopy(whole), random.Random(f"{command} {k}"))
        (tmp_path / "results.json").write_text(json.dumps(found))
        try:
            page = report.build(tmp_path).read_text()
            drawn += 1
        except UserError as error:
            assert 0 < len(str(error)) < 700 and "\n" not in str(error), str(error)
        else:
            assert "<script>alert" not in page
    assert 0 < drawn < 150


NAMED = "<b>\"'& x|y"  # what a control may be called


@pytest.fixture
def evil() -> dict:
    """A transfer record whose names look like markup."""
    found = synthetic.results()
    for cell in found["cells"]:
        cell["control"] = NAMED + cell["control"]
    return found


def test_model_cards_hold_names_as_text(tmp_path, evil):
    for path in model_cards.write(evil, tmp_path):
        assert path.parent == tmp_path / "cards"
        html = (
            MarkdownIt("commonmark", {"html": True})
            .enable("table")
            .render(path.read_text().split("\n---\n", 1)[1])
        )
        rows = re.findall(r"<tr>.*?</tr>", html, re.S)
        assert (
            "<b>" not in html
            and html.count("<h1>") == 1
            and len({len(re.findall("<t[hd]", row)) for row in rows}) == 1
        )
    evil["cells"][0]["control"] = "../../README"
    with pytest.raises(UserError, match="cannot name a control"):
        model_cards.write(evil, tmp_path)


def test_names_of_any_kind_get_tables_heat_maps_and_panels(evil):
    columns, rows = tables.of_cells(evil["cells"])
    assert (
        all(len(row) == len(columns) for row in rows)
        and wandb_log.heat_map(evil["cells"], "clip").width > 100
    )
    keys = dashboard.filled("retention/<control>/<target>", evil["cells"], "<member> <target>")
    assert len(keys) == len(set(keys)) and all(key.startswith("retention/<member> <target>/") for key in keys)


def test_targets_are_files_of_different_names():
    long = ["dmd:x" + "y" * count for count in (300, 301)]
    targets = ["dmd", "dmd:hybrid(1)", "dmd-hybrid(1)!", "dmd/hybrid(1)", "dmd:delta(0.8,1)", *long, "..", ""]
    names = [readings.file_name(target) for target in targets]
    assert names[:2] == ["dmd", "dmd-hybrid(1)"] and len(set(names)) == len(names)
    assert all("/" not in name and len(name) <= 120 for name in names)
