"""The record of a transfer run in W&B: recorded offline, and read back from W&B's own files."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.synthetic import GREYS, SCALES, TARGETS, TRACKED, UNIT, documented, write
from support.synthetic import results as fake_record
from wandb.proto import wandb_internal_pb2

from analysis import dashboard, wandb_log
from analysis.pages import words
from configs import ROOT, merge, tracking
from train import slider


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """What an offline run has written.

    In LevelDB's log format: after 7 bytes of header, blocks of 32 KiB that hold pieces of (crc, length, type)
    and data.
    """
    (path,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another header: the block's rest is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


class Recorded:
    """An offline run read back: its rows of history by step, config, summary, artifacts, and the media files
    that they name.
    """

    def __init__(self, folder: Path):
        until = time.monotonic() + 60
        while not any(
            found.HasField("exit") for found in records(folder)
        ):  # W&B's own process writes the file a little later
            assert time.monotonic() < until
            time.sleep(0.1)
        self.rows, self.config, self.summary, self.artifacts = {}, {}, {}, []
        self.files = next(Path(folder).glob("wandb/offline-run-*/files"))
        for found in records(folder):
            if found.HasField("history"):
                row = merged({}, found.history.item)
                self.rows.setdefault(row["_step"], {}).update(row)
            elif found.HasField("run"):
                self.run = found.run
                merged(self.config, found.run.config.update)
            elif found.HasField("config"):
                merged(self.config, found.config.update)
            elif found.HasField("summary"):
                merged(self.summary, found.summary.update)
            elif found.HasField("artifact"):
                self.artifacts.append(found.artifact)

    @property
    def keys(self) -> set[str]:
        """Everything in the history or the summary, but for W&B's own."""
        return {key for row in (*self.rows.values(), self.summary) for key in row if not key.startswith("_")}

    def table(self, key: str) -> list[dict]:
        """A table's rows, from its file."""
        (entry,) = [row[key] for row in self.rows.values() if key in row]
        found = json.loads((self.files / entry["path"]).read_text())
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]

    def artifact(self, kind: str) -> dict[str, tuple[set[str], bool]]:
        """The artifacts of a type: name to the files within, and whether the run reads it rather than writes
        it.
        """
        return {
            a.name: ({entry.path for entry in a.manifest.contents}, a.use_after_commit)
            for a in self.artifacts
            if a.type == kind
        }


def merged(into: dict, items) -> dict:
    """W&B's list of keys, nested or not, and JSON values, put into a dict."""
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = into
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return into


@pytest.fixture(scope="module")
def results() -> dict:
    record = fake_record(TRACKED)
    return {**record, "cells": list(map(words.led, record["cells"]))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, results) -> Path:
    """A run folder with its W&B run, recorded offline."""
    folder = write(results, tmp_path_factory.mktemp("runs") / "mine")
    wandb_log.write(results, folder)
    (folder / "report.html").write_text("<p>the page</p>")
    files = {"smile": ROOT / "controls/tiny/smile.safetensors"}
    with tracking.start(
        folder, results["config"], "analysis.transfer", "smile+age+nothing", mode="offline"
    ) as tracker:
        wandb_log.track(results, folder, tracker, files)
        assert not tracker.warned
    return folder


@pytest.fixture(scope="module")
def found(folder) -> Recorded:
    return Recorded(folder)


def test_the_run_is_filed_as_contributing_says(found):
    assert (found.run.job_type, found.run.run_group) == ("analysis.transfer", "smile+age+nothing")
    assert found.config["family"] == "tiny" and found.config["uses"] == list(TRACKED)


def test_every_cell_is_in_the_table_by_both_evaluators(found, results):
    rows = {(row["control"], row["target"], row["evaluator"]): row for row in found.table("transfer/cells")}
    assert len(rows) == len(TRACKED) * len(TARGETS) * len(UNIT)
    for cell in results["cells"]:
        for evaluator_name, reading in words.readings(cell).items():
            row = rows[cell["control"], cell["target"], evaluator_name]
            assert row["verdict"] == reading["verdict"] and row["reference"] is cell["reference"]
            references = reading["references"]
            for name, interval in {
                "retention": reading["retention"],
                "matched scale": reading["matched_scale"],
                "floor": (references["floor"] or {}).get("share"),
                "ceiling": (references["ceiling"] or {}).get("share"),
                "normalised": references["normalised"],
            }.items():
                assert ends(row, name) == [(interval or words.EMPTY)[end] for end in words.EMPTY]
            assert row["saturation"] == reading["shape"]["saturation"]


def ends(row: dict, name: str) -> list[float | None]:
    """Value, low and high of an interval in a row of a table."""
    return [row[name], row[f"{name} low"], row[f"{name} high"]]


def test_all_of_leakage_is_in_its_table(found, results):
    for row, leak in zip(found.table("transfer/leakage"), results["leakage"], strict=True):
        assert all(row[key] == leak[key] for key in ("evaluator", "target", "control", "attribute"))
        assert [ends(row, name) for name in ("share", "slope")] == [
            list(leak[name].values()) for name in ("share", "slope")
        ]


def test_every_scale_is_a_step_of_the_image_slider(found, results):
    for cell in results["cells"]:
        for step, scale in enumerate(cell["scales"]):
            entry = found.rows[step][f"images/{cell['control']}/{cell['target']}"]
            assert (
                entry["caption"]
                == f"{cell['control']} at scale {f'{scale:+g}' if scale else '0'} on {cell['target']}"
            )
            with Image.open(found.files / entry["path"]) as picture:
                assert picture.size == (16, 64) and np.all(np.asarray(picture) == GREYS[step])


def test_curves_and_heat_maps(found, results):
    for control in TRACKED:
        lines = found.table(f"curves/{control}_table")
        drawn = {
            f"tiny/{target}": [row["lineVal"] for row in lines if row["lineKey"] == f"tiny/{target}"]
            for target in TARGETS
        }
        cells = [c for c in results["cells"] if c["control"] == control]
        assert drawn == {c["target"]: [point["value"] for point in c["effect"]] for c in cells}
        assert [row["step"] for row in lines][: len(SCALES)] == SCALES
        panel = found.config["_wandb"]["visualize"][f"curves/{control}"]["panel_config"]
        assert control in panel["stringSettings"]["title"] and panel["stringSettings"]["xname"] == "scale"
    for evaluator in UNIT:
        (entry,) = [
            row[key] for row in found.rows.values() for key in row if key == f"transfer/heat/{evaluator}"
        ]
        assert (
            Image.open(found.files / entry["path"]).size
            == wandb_log.heat_map(results["cells"], evaluator).size
        )


def test_summary_holds_retention_scale_and_verdict(found, results):
    for cell in results["cells"]:
        where = f"{cell['control']}/{cell['target']}"
        assert found.summary[f"verdict/{where}"] == cell["verdict"]
        assert (
            found.summary.get(f"retention/{where}") == cell["retention"]["value"]
        )  # left out where undefined
        assert found.summary.get(f"matched_scale/{where}") == cell["matched_scale"]["value"]
    assert (
        "retention/nothing/tiny/dmd" not in found.summary and found.summary["retention/smile/tiny/base"] == 1
    )


def test_artifacts_and_lineage(found):
    assert found.artifact("control") == {"smile": ({"smile.safetensors"}, True)}
    assert found.artifact("results") == {"transfer-mine": ({"results.json", "report.html"}, False)}


def test_every_logged_key_is_documented_and_every_documented_one_logged(found, tmp_path):
    words = [
        "steps=1",
        "batch_size=1",
        "trajectories=1",
        "sample_seeds=[1]",
        "sample_scales=[0,1]",
        "watch=[tiny/dmd]",
        "watch_every=1",
        "watch_prompts=1",
        "wandb=offline",
        f"out={tmp_path}",
    ]
    slider.main(merge(slider.Config, words))
    watched = json.loads(
        (tmp_path / "smile/watch.jsonl").read_text()
    )  # also what could not be told and was not logged
    logged = (
        found.keys | Recorded(tmp_path / "smile").keys | {f"watch/{key}" for key in watched if key != "step"}
    )
    patterns = documented("training", "transfer")
    assert not [key for key in logged if not any(pattern.fullmatch(key) for pattern in patterns.values())]
    assert not [key for key, pattern in patterns.items() if not any(map(pattern.fullmatch, logged))]


def test_the_dashboard_names_what_was_logged(found, results):
    patterns = [pattern for title in ("Transfer", "Images") for _, _, pattern in dashboard.SECTIONS[title]]
    named = {
        key
        for p in patterns
        for name in TRACKED
        for key in dashboard.filled(p.replace("<control>", name), results["cells"])
    }
    undefined = {
        f"{what}/{c['control']}/{c['target']}"
        for c in results["cells"]
        for what in ("retention", "matched_scale")
        if c[what]["value"] is None
    }
    assert undefined and named - found.keys == undefined


def test_heat_map_colours():
    assert wandb_log.shade(1.0) == (255, 255, 255) and wandb_log.shade(None) == wandb_log.UNKNOWN
    assert wandb_log.shade(-1.0) == wandb_log.shade(0.0) and wandb_log.shade(3.0) == wandb_log.shade(2.0)
    darkness = [sum(wandb_log.shade(value)) for value in (0.0, 0.3, 0.7, 1.0, 1.3, 2.0)]
    assert darkness == sorted(darkness[:4]) + sorted(darkness[4:], reverse=True)
