"""The main job, small, on the embedded family: its record, its continuation, its mistakes."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.commands import configured, launched, refused

from analysis import transfer
from analysis.images import cache
from analysis.images.design import Subject, cycled, looks_of
from analysis.images.readings import by_text, judge
from analysis.pages import words
from analysis.pages.words import led
from analysis.session import Session, balanced
from configs import ROOT, UserError, merge
from controls import formats
from controls.lora import content
from models import families
from models.evaluators import Picture
from models.promptsets import PromptSet

SMALL = [
    "controls=[controls/tiny/smile-dmd.safetensors]",
    "targets=[dmd,lightning]",
    "seeds=2",
    "max_prompts=2",
    "rounds=1",
    "baselines=1",
    "scales=[-1,0,1]",
    "wandb=disabled",
    "prompts=[portrait of a person,'portrait of a person, hat']",
]
CELL = {
    "control",
    "source",
    "target",
    "scales",
    "effect",
    "slope",
    "retention",
    "clip_change_percent",
    "monotonicity",
    "preservation",
    "matched_scale",
    "images",
    "prompts",
    "seeds",
    "verdict",
    "references",
    "p",
    "below_zero",
    "slope_retention",
    "of_words",
    "at",
    "looks",
    "shape",
}
# three targets at three scales, their floors, second drawings of two, and what the words do on these
SETS = 3 * 3 + 3 + 2 + 2


def measure(out, *words, cache=None) -> dict:
    """The record of a small run into a folder."""
    transfer.main(merge(transfer.Config, [*SMALL, f"out={out}", f"cache={cache or out}/cache", *words]))
    record = json.loads((out / "default/results.json").read_text())
    return {**record, "cells": list(map(led, record["cells"]))}


def alike(a, b) -> bool:
    """Whether two records say the same up to float tolerance; p values are as sensitive as logarithms."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == pytest.approx(b, rel=1e-3, abs=1e-3) if isinstance(a, float) else a == b


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer")
    return out, measure(out)


def test_record_and_page(run):
    out, results = run
    assert results["schema"] == 3 and results["cost"]["drawn"] == 4 * SETS and results["cost"]["cached"] == 0
    assert [cell["target"] for cell in results["cells"]] == ["tiny/dmd", "tiny/lightning", "tiny/base:few(4)"]
    for cell in results["cells"]:
        assert cell.keys() >= CELL and len(cell["effect"]) == 3 and cell["images"] == 4
        assert cell["effect"][1] == {"value": 0, "low": 0, "high": 0}
        assert (out / "default" / cell["picture"]).is_file()
        assert list(cell["readings"]) == ["clip", "probe", "geometry"]
    own = results["cells"][0]
    assert own["source"] == own["target"] and own["retention"]["value"] in (1.0, None)
    (first, *_) = results["agreement"]
    assert (first["first"], first["second"], len(results["agreement"])) == ("clip", "probe", 3)
    assert first["cells"] == 1 and first["kappa"]["value"] is None, "one cell says nothing of chance"
    page = (out / "default/report.html").read_text()
    assert "smile" in page and words.agreement(results["agreement"]) in page


def test_references(run):
    for cell in run[1]["cells"]:
        probe = cell["readings"]["probe"]
        assert abs(probe["references"]["floor"]["slope"]["value"]) < 0.3 * probe["slope"]["value"]
        rerun = cell["references"]["rerun"]
        assert (rerun is None) == cell["reference"] and (rerun is None or rerun["effect"]["value"] == 0)
        assert cell["references"]["wrong"] is None and cell["references"]["ceiling"] is None


def test_a_ceiling_a_wrong_control_and_leakage(tmp_path, run):
    more = [f"controls/tiny/{name}.safetensors" for name in ("smile-dmd", "smile-lightning", "age")]
    results = measure(tmp_path, f"controls=[{','.join(more)}]", "targets=[lightning]", cache=run[0])
    assert results["cost"]["cached"] == 4 * 14, "what smile-dmd needs was drawn before"
    smile, ceiling, age = (cell for cell in results["cells"] if cell["target"] == "tiny/lightning")
    assert (
        smile["references"]["ceiling"]["control"] == "smile-lightning"
        and smile["references"]["wrong"]["control"] == "age"
    )
    assert ceiling["references"]["ceiling"] is None and age["references"]["wrong"]["control"] == "smile-dmd"
    leaks = {
        (row["control"], row["attribute"], row["evaluator"]): row["share"]["value"]
        for row in results["leakage"]
    }
    assert {attribute for _, attribute, _ in leaks} == {"smile-dmd", "age"} and leaks[
        "age", "age", "probe"
    ] == 1
    assert abs(leaks["age", "smile-dmd", "probe"]) < 0.5


def test_a_killed_run_continues_to_the_same_numbers(tmp_path, run, monkeypatch):
    original, made = transfer.make, []

    def dies(parts, job):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(job)
        original(parts, job)

    monkeypatch.setattr(transfer, "make", dies)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    monkeypatch.setattr(transfer, "make", original)
    results = measure(tmp_path)
    assert (
        results["cost"]["cached"] == 4 * 5
        and results["cells"] == run[1]["cells"]
        and results["leakage"] == run[1]["leakage"]
    )


def test_a_second_run_draws_nothing_and_an_evaluator_more_draws_no_image(run, monkeypatch):
    out, first = run
    for path in (out / "cache").rglob("*-probe-*"):
        path.unlink()
    monkeypatch.setattr(cache, "latents", lambda *_: pytest.fail("drawn again"))
    assert measure(out)["cells"] == first["cells"]


def test_starting_afresh_leaves_the_drawings_that_runs_share(run, monkeypatch):
    out, first = run
    (out / "default/mine.txt").write_text("of the run before")
    monkeypatch.setattr(cache, "latents", lambda *_: pytest.fail("drawn again"))
    assert measure(out, "overwrite=true")["cost"]["drawn"] == 0
    assert not (out / "default/mine.txt").exists()


def test_a_second_run_loads_no_evaluator(run, monkeypatch):
    out, before = run
    measure(out)  # knows the words by now
    monkeypatch.setattr(Picture, "_part", None)
    assert alike(measure(out)["cells"], before["cells"])


@pytest.mark.slow
def test_the_batch_does_not_matter(run, tmp_path):
    assert alike(measure(tmp_path, "batch_size=3")["cells"], run[1]["cells"])


def test_a_batch_too_large_is_halved_and_said(run, tmp_path, monkeypatch, capsys):
    original = cache.finish

    def greedy(plan, noise, prompts):
        if len(noise) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(plan, noise, prompts)

    monkeypatch.setattr(cache, "finish", greedy)
    assert alike(
        measure(tmp_path, "references=false", "targets=[dmd]")["cells"][0]["effect"],
        run[1]["cells"][0]["effect"],
    )
    assert "out of memory: on with 2 at once" in capsys.readouterr().out


def test_damaged_drawings_are_made_again_and_said(run, tmp_path, capsys):
    """A flipped bit, an emptied file and two files in each other's place change no number."""
    shutil.copytree(run[0] / "cache", tmp_path / "cache")
    cfg = merge(transfer.Config, [*SMALL, f"cache={tmp_path}/cache"])
    every = transfer.prepare(Session("analysis.transfer", cfg, ())).all
    files = {path for drawings, jobs in every for job in jobs for path in drawings.files(job)}
    flipped, emptied, *rest = sorted(files)
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 8
    flipped.write_bytes(content)
    emptied.write_bytes(b"")
    same = [path for path in rest if path.stat().st_size == rest[-1].stat().st_size][-2:]
    os.rename(same[0], tmp_path / "aside")
    os.rename(same[1], same[0])
    os.rename(tmp_path / "aside", same[1])
    capsys.readouterr()
    assert measure(tmp_path)["cells"] == run[1]["cells"]
    assert "4 of the drawings in" in capsys.readouterr().out


def test_what_is_not_finite_is_named_and_not_kept(tmp_path, monkeypatch):
    original = cache.finish
    monkeypatch.setattr(
        cache, "finish", lambda plan, noise, prompts: original(plan, noise, prompts) * float("nan")
    )
    with pytest.raises(UserError, match="images of tiny/dmd with smile-dmd at scale -1 are not finite"):
        measure(tmp_path, "targets=[dmd]", "references=false", "scales=[-1,0,1]")
    assert not list((tmp_path / "cache").glob("??/*"))


def test_a_control_called_as_the_floor_of_another_is_not_it(tmp_path):
    """random-smile beside smile, whose floor is a random control."""
    other = formats.load("controls/tiny/age.safetensors")
    formats.save(replace(other, card=replace(other.card, name="random-smile")), tmp_path / "x.safetensors")
    words = [
        f"controls=[controls/tiny/smile.safetensors,{tmp_path}/x.safetensors]",
        "targets=[dmd]",
        f"cache={tmp_path}/cache",
    ]
    design = transfer.prepare(Session("analysis.transfer", merge(transfer.Config, words), ()))
    drawings, (smile, named) = design.parts[0], design.subjects
    assert content(drawings.controls["random-smile", False]) == content(other)
    assert (
        drawings.key(smile.floor("dmd"))
        != drawings.key(cache.Job("dmd", named.name, 1.0))
        != drawings.key(named.floor("dmd"))
    )


def test_one_network_at_a_time(tmp_path, monkeypatch):
    """Each is loaded once and let go after its last drawing; the encoders are gone before the first, and
    nothing stays.
    """
    alive, most, loaded = weakref.WeakSet(), [], []
    network, make = families.network, transfer.make

    def counted(card, name, *args):
        found = network(card, name, *args)
        alive.add(found)
        loaded.append(name)
        return found

    def made(parts, job):
        make(parts, job)
        most.append(len(alive))
        assert not parts[0].family.encoders()

    monkeypatch.setattr(families, "network", counted)
    monkeypatch.setattr(transfer, "make", made)
    words = ["targets=[dmd,dmd:hybrid(1),lcm,lightning]", "seeds=1", "scales=[0,1]", "references=false"]
    measure(tmp_path, *words)
    assert (
        sorted(loaded) == ["base", "dmd", "lcm", "lightning"] and max(most) == 2 and most[-1] == 1
    )  # hybrid asks two
    gc.collect()
    assert not alive


def test_jobs_come_network_by_network():
    targets = ["turbo", "dmd2:hybrid(1)", "base", "dmd2", "lightning-lora"]
    jobs = cache.in_turn([cache.Job(target) for target in targets], families.card("sdxl"))
    assert [job.target for job in jobs] == ["base", "lightning-lora", "dmd2:hybrid(1)", "dmd2", "turbo"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, tmp_path):
    words = [*SMALL, f"out={tmp_path}", f"cache={tmp_path}/cache"]
    # torchrun, for on a CPU `accelerate launch --num_processes=2` starts one process
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29547",
        "-m",
        "analysis.transfer",
        *words,
    ]
    done = subprocess.run(
        launch, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert alike(
        list(map(led, json.loads((tmp_path / "default/results.json").read_text())["cells"])), run[1]["cells"]
    )


def test_without_words_the_direction_is_that_at_the_scale_of_use():
    """Where a control moves images at twice that scale is another."""
    control = formats.load(ROOT / "controls/tiny/space-1.safetensors")
    scales = [-2.0, 0.0, 0.5, 2.0]
    assert [job.scale for job in Subject(control, None, scales).pilot(0.5)] == [0.0, 0.5]
    assert Subject(control, ("a hat", "a person"), scales).pilot(0.5) == []


def test_any_lora_of_another_tool_is_measured_by_words_or_along_its_own_direction(tmp_path, run):
    control = formats.load(ROOT / "controls/tiny/smile-dmd.safetensors")
    formats.save_kohya(control, tmp_path / "card.safetensors")
    tensors, _ = formats.read(tmp_path / "card.safetensors")
    save_file(tensors, tmp_path / "theirs.safetensors")
    words = [
        f"controls=[{tmp_path}/theirs.safetensors]",
        "source=dmd",
        "lora_scales=[-1,0,1]",
        "references=false",
    ]
    ends = ["positive=portrait of a person, smiling", "negative=portrait of a person, frowning"]
    told = measure(tmp_path / "a", *words, *ends, cache=run[0])
    assert told["cost"]["drawn"] == 0, "the same weights make the same images, whatever the file"
    assert (
        told["cells"][0]["kind"] == "lora"
        and told["cells"][0]["effect"][0]["value"] < 0 < told["cells"][0]["effect"][2]["value"]
    )
    alone = measure(tmp_path / "b", *words, cache=run[0])
    assert (
        alone["cells"][0]["effect"][2]["value"] > 0
        and alone["cells"][0]["clip_change_percent"]["value"] is None
    )
    subject = measure(tmp_path / "c", *words, ends[0], cache=run[0])
    assert subject["cells"][0]["effect"][2]["value"] > 0


@pytest.mark.slow
def test_below_a_noise_level_a_control_does_less(tmp_path, run):
    words = ["references=false", "targets=[dmd,'dmd:hybrid(1)']"]
    whole, part, none = (
        measure(tmp_path / f"{below}", *words, f"below={below}", cache=run[0])
        for below in ("null", 8.0, 0.001)
    )
    assert whole["cells"][0]["effect"] == run[1]["cells"][0]["effect"] and part["cells"][0]["below"] == 8

    def size(found):
        return found["cells"][0]["readings"]["probe"]["effect"][2]["value"]

    assert size(none) == 0 < size(part) < size(whole)
    assert part["cells"][1]["target"] == "tiny/dmd:hybrid(1)" and part["cells"][1]["source"] == "tiny/dmd"


def test_the_card_is_written_into_the_file_on_request(tmp_path, run):
    file = tmp_path / "smile-dmd.safetensors"
    file.write_bytes((ROOT / "controls/tiny/smile-dmd.safetensors").read_bytes())
    results = measure(tmp_path, f"controls=[{file}]", "write_card=true", cache=run[0])
    told = formats.load(file).card.transfer["targets"]["tiny/lightning"]["clip"]
    assert results["cost"]["drawn"] == 0 and told["retention"] == results["cells"][1]["retention"]
    assert "tiny/lightning" in (tmp_path / "default/cards/smile-dmd.md").read_text()


def test_the_plan_says_what_it_costs_and_draws_nothing(tmp_path, capsys):
    transfer.main(
        merge(transfer.Config, [*SMALL, f"out={tmp_path}", f"cache={tmp_path}/cache", "dry_run=true"])
    )
    said = capsys.readouterr().out
    assert f"to draw: at most {4 * SETS} images, {16 * SETS} network evaluations" in said
    assert "minutes" in said and "2 prompts x 2 seeds: sees a retention that differs from 1 by" in said
    assert "corrected for 1 cells and 1 looks" in said
    assert not list(tmp_path.iterdir())


def reading(p: float, of_words: float | None = 0.5) -> dict:
    """A retention of 1, equivalent with this p."""
    claims = {"reversed": 1.0, "dead": 1.0, "equivalence": p, "difference": 1.0}
    return {
        "retention": {"value": 1.0, "low": 0.9, "high": 1.1},
        "p": {claim: {"p": value} for claim, value in claims.items()},
        "of_words": {"value": of_words, "low": None, "high": None},
    }


def judged(*cells: dict) -> list[dict]:
    """Cells {"p": …} of one control, with the verdicts of the first evaluator."""
    made = []
    for cell in cells:
        about = {"control": "one", "source": "a", "target": "b", "reference": False}
        told = reading(cell.pop("p"), cell.pop("of_words", 0.5))
        made.append({**about, **cell, "readings": {"clip": told}})
    judge(made)
    return list(map(led, made))


def test_verdicts_are_corrected_over_the_cells_that_ask():
    cells = judged({"p": 0.02}, {"p": 0.04}, {"p": 0.0, "target": "a"}, {"p": 0.03, "reference": True})
    assert [cell["p"]["equivalence"]["p_holm"] for cell in cells] == [0.04, 0.04, 0.0, 0.03]
    assert {cell["verdict"] for cell in cells} == {"kept"}
    assert [cell["verdict"] for cell in judged({"p": 0.03}, {"p": 0.04})] == ["unclear", "unclear"]


def test_a_control_that_does_next_to_nothing_on_its_source_has_no_verdict():
    own = {"p": 0.0, "target": "a"}
    assert [c["verdict"] for c in judged({"p": 0.0}, {**own, "of_words": 0.05})] == ["undefined"] * 2
    assert [c["verdict"] for c in judged({"p": 0.0}, {**own, "of_words": None})] == ["kept"] * 2
    other = {"p": 0.0, "control": "two"}
    assert [c["verdict"] for c in judged(other, {**own, "of_words": 0.05})] == ["kept", "undefined"]


def test_prompts_double_from_look_to_look():
    looks, ends = looks_of(4, 96, 12)
    assert (looks.prompts, looks.parts, ends) == ((12, 24, 48, 96), (1, 2, 3, 4), [12, 24, 48, 96])
    assert looks.shares == pytest.approx((0.1, 0.2, 0.3, 0.4))
    looks, ends = looks_of(1, 96, 12)
    assert (looks.prompts, looks.parts, looks.shares, ends) == ((96,), (2,), (1.0,), [12, 96])
    looks, ends = looks_of(4, 3, 12)
    assert looks.prompts == (1, 3) and ends == [1, 3] and sum(looks.shares) == pytest.approx(1)


def test_prompts_come_again_with_other_seeds_and_count_once():
    texts, numbers = cycled(PromptSet(["a", "b"]), 5, 2, 100)
    assert texts == ["a", "b", "a", "b", "a"] and numbers == list(range(100, 110))
    _, numbers = cycled(PromptSet(["a", "b"], [7, 30]), 4, 2, 100)
    assert numbers == [7, 8, 30, 31, 9, 10, 32, 33]
    assert by_text(np.array([1.0, 2.0, 3.0, 4.0, 8.0]), texts).tolist() == [4.0, 3.0]
    assert by_text(np.array([1.0, 2.0]), ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.slow
def test_rounds_go_on_where_nothing_is_decided(tmp_path, run):
    """The source and the undecided target alone; the same in one go or interrupted; the time is kept."""
    words = [
        "rounds=2",
        "max_prompts=4",
        "baselines=2",
        "prompts=[]",
        "references=false",
        "targets=[dmd,lcm,lightning]",
    ]
    whole = measure(tmp_path / "whole", *words)
    own, lcm, lightning = whole["cells"]
    assert own["looks"] == 0 and own["prompts"] == 2
    for cell in (lcm, lightning):
        assert cell["prompts"] == {1: 2, 2: 4}[cell["looks"]] and cell["images"] == 2 * cell["prompts"]
        assert (cell["looks"] == 2) == (cell["verdict"] in ("unclear", "undefined")) or cell["looks"] == 2
    short = measure(tmp_path / "short", *words, "minutes=0.0001")
    assert {cell["looks"] for cell in short["cells"]} == {0, 1}
    again = measure(tmp_path / "again", *words, cache=tmp_path / "whole")
    assert again["cells"] == whole["cells"] and again["cost"]["drawn"] == 0


def test_shares_are_of_the_same_cost():
    jobs = [("base", 20.0)] * 5 + [("student", 4.0)] * 25
    parts = balanced(jobs, lambda job: job[1], 2)
    costs = [sum(cost for _, cost in part) for part in parts]
    assert sorted(parts[0] + parts[1]) == sorted(jobs) and sum(costs) >= 0.9 * 2 * max(costs)


def test_the_table_is_read_by_csv_and_latex(run):
    rows = list(csv.DictReader((run[0] / "default/table.csv").open(encoding="utf-8")))
    assert len(rows) == 3 * 3 and rows[3]["target"] == "tiny/lightning" and rows[3]["evaluator"] == "clip"
    slope = run[1]["cells"][1]["slope"]
    assert [float(rows[3][f"slope{end}"]) for end in ("", " low", " high")] == list(slope.values())
    tex = (run[0] / "default/table.tex").read_text()
    assert tex.count("&") == 2 * 2 and "smile-dmd" in tex and tex.startswith(r"\begin{tabular}{llr}")


class Trap:
    def __reduce__(self):
        return (open, (str(ROOT / "runs/trap-was-sprung"), "w"))


def bad_controls(folder):
    whole = (ROOT / "controls/tiny/smile.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(Trap(), folder / "pickle.safetensors")
    control = formats.load(ROOT / "controls/tiny/smile.safetensors")
    control.tensors = {
        key.replace("down_blocks.1", "down_blocks.7"): value for key, value in control.tensors.items()
    }
    formats.save(control, folder / "elsewhere.safetensors")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sedes=3"], "seeds"),
        (["seeds=few"], "seeds"),
        (["family=nowhere"], "tiny"),
        (["targets=[sdxl]"], "lightning"),
        (["targets=['dmd:hybrid(9)']"], "0 … 4"),
        (["targets=['dmd:mixed(1)']"], "hybrid"),
        (["below=0"], "noise level"),
        (["at=0"], "at is the scale"),
        (["precision=-1"], "precision"),
        (["rounds=0"], "rounds"),
        (["max_prompts=0"], "max_prompts"),
        (["minutes=-1"], "minutes"),
        (["batch_size=-1"], "batch_size must be"),
        (["negative=a frown", "controls=[controls/tiny/space-1.safetensors]"], "positive"),
        (["scales=[1,2]"], "0"),
        (["controls=[missing.safetensors]"], "missing.safetensors"),
        (["controls=[{}/truncated.safetensors]"], "truncated"),
        (["controls=[{}/pickle.safetensors]"], "pickle"),
        (["controls=[{}/elsewhere.safetensors]", "prompts=[a]", "seeds=1", "targets=[dmd]"], "have no place"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path):
    bad_controls(tmp_path)
    words = [
        *(word.format(tmp_path) for word in words),
        f"out={tmp_path}",
        f"cache={tmp_path}/cache",
        "wandb=disabled",
    ]
    refused(configured(transfer, words), says)
    assert not (ROOT / "runs/trap-was-sprung").exists() and not (tmp_path / "default").exists()


def test_the_command_itself_exits_with_2():
    refused(launched("analysis.transfer", "sedes=3"), "seeds")
