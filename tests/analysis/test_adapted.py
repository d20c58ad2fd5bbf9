"""Controls that were adapted, beside their originals: what they are compared with, where they are shown."""

import json
import subprocess
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from support.short_runs import QUICK

from analysis import adapting, transfer
from analysis.pages import words
from configs import ROOT, UserError, merge
from controls import formats
from controls.lora import Control, content
from train import adapt

KV = ROOT / "controls/tiny/watercolour-kv.safetensors"
SMALL = [
    *(f"controls=[{KV}]", "targets=[base,dmd,lcm]", "rounds=1", "max_prompts=8", "baselines=1"),
    *("references=false", "lora_scales=[0,1]", "evaluators=[clip,probe]", "wandb=disabled", QUICK),
]


def adapted(folder: Path, name: str = "watercolour-kv-dmd") -> Path:
    """As train/adapt.py writes one: here the original, twice as strong."""
    original = formats.load(KV)
    origin = {"name": "watercolour-kv", "member": "tiny/base", "hash": content(original)}
    recipe = {**original.card.recipe, "adapted_from": origin, "members": ["tiny/dmd"]}
    card = replace(original.card, name=name, member="dmd", alpha=2 * original.card.alpha, recipe=recipe)
    folder.mkdir(parents=True, exist_ok=True)
    formats.save(Control(card, original.tensors), folder / "control.safetensors")
    return folder / "control.safetensors"


def measured(folder: Path, *more: str) -> dict:
    cfg = merge(transfer.Config, [*SMALL, f"out={folder}", f"cache={folder}/cache", *more])
    return json.loads((transfer.main(cfg).parent / "results.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    return folder, measured(folder, f"controls=[{KV},{adapted(folder / 'theirs')}]")


def test_an_adapted_control_is_compared_with_its_original_on_the_source(run):
    cells = {(c["control"], c["target"]): c for c in run[1]["cells"]}
    original, its = cells["watercolour-kv", "tiny/dmd"], cells["watercolour-kv-dmd", "tiny/dmd"]
    assert (its["source"], its["adapted_from"], original["adapted_from"]) == (
        "tiny/base",
        "watercolour-kv",
        "",
    )
    assert ("watercolour-kv-dmd", "tiny/lcm") not in cells, "it is asked about where it was adapted to"
    sources = [cells[name, "tiny/base"]["readings"] for name in ("watercolour-kv", "watercolour-kv-dmd")]
    for name in ("clip", "probe"):
        assert sources[0][name]["effect"] == sources[1][name]["effect"], "the original's, for both"
        before, after = (cell["readings"][name] for cell in (original, its))
        share = after["effect"][-1]["value"] / sources[0][name]["effect"][-1]["value"]
        assert after["retention"]["value"] in (None, pytest.approx(share, rel=0.3))
        assert after["effect"][-1]["value"] != before["effect"][-1]["value"]


def test_before_and_after_are_said_and_shown_under_one_dial(run):
    folder, record = run
    (line,) = words.adapted(list(map(words.led, record["cells"])))
    assert line.startswith("watercolour-kv on dmd: ") and ", adapted " in line
    page = (folder / "default/report.html").read_text()
    assert line in page and "<b>dmd, adapted</b>" in page
    assert (folder / "default/images/watercolour-kv/members.png").is_file()
    assert words.adapted([c for c in map(words.led, record["cells"]) if c["adapted_from"]]) == []


class Asked(list):
    """Trainings asked for: control, member, name."""

    def __init__(self):
        super().__init__()
        self.how, self.shares = [], repeat(1.1)  # all words; what each brings


@pytest.fixture
def asked(monkeypatch):
    """What the trainer is asked for, which writes what is quickly made; every verdict is adapted."""
    asked, run = Asked(), subprocess.run

    def trained(command, **how):
        if not str(command[1]).endswith("train/adapt.py"):
            return run(command, **how)
        told = dict(word.split("=", 1) for word in command[2:])
        asked.append((told["control"], told["member"].rpartition("/")[2], told["name"]))
        asked.how.append(told)
        asked.cfg = merge(adapt.Config, command[2:])
        assert not any(key.startswith(("RANK", "MASTER_")) for key in how["env"])
        file = adapted(Path(told["out"]) / told["name"], told["name"])
        share = next(asked.shares)
        (file.parent / "shares.json").write_text(json.dumps([{"judged": {"value": share}}] * 2))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(adapting.subprocess, "run", trained)
    monkeypatch.setattr(adapting, "LOST", (*adapting.LOST, "unclear", "kept", "stronger"))
    return asked


def test_controls_that_are_lost_are_adapted_and_measured_again(tmp_path, asked):
    """By the trainer's own command, once: a second run finds the files."""
    for _ in range(2):
        record = measured(tmp_path, "targets=[base,dmd]", "adapt=true")
        assert asked == [(str(KV), "dmd", "watercolour-kv-dmd")]
        assert [c["control"] for c in record["cells"] if c["adapted_from"]] == ["watercolour-kv-dmd"] * 2
        assert asked.cfg.precision is None
    measured(tmp_path, "targets=[base,dmd]", "adapt=true", "adapt_judged=48", "adapt_precision=0.1")
    assert len(asked) == 2 and (asked.cfg.judged, asked.cfg.precision) == (48, 0.1)


def test_what_was_taught_otherwise_is_taught_anew(tmp_path, asked):
    """On other prompts, or another original under the same name: what is measured is what was asked for."""
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(KV.read_bytes())

    folder = tmp_path / "default/adapted/watercolour-kv-dmd"

    def measures(prompts: str) -> int:
        """How often the trainer was asked by then."""
        measured(
            tmp_path, f"controls=[{mine}]", "targets=[base,dmd]", "adapt=true", f"adapt_prompts={prompts}"
        )
        return len(asked)

    assert (measures("[a,b]"), asked.cfg.prompts) == (1, ["a", "b"]) and measures("[a,b]") == 1
    (folder / "state.pt").touch()
    assert (measures("[a,c]"), asked.cfg.prompts) == (2, ["a", "c"]) and not (folder / "state.pt").exists()
    (folder / "state.pt").touch()
    (folder / "control.safetensors").unlink()
    assert measures("[a,c]") == 3 and (folder / "state.pt").exists(), "a training that was killed goes on"
    original = formats.load(KV)
    formats.save(Control(replace(original.card, alpha=4.0), original.tensors), mine)
    assert measures("[a,c]") == 4 and not (folder / "state.pt").exists()


def test_the_trainer_is_told_what_the_run_was_told(tmp_path, asked, capsys):
    """Prompts with a trigger word, what a file without a card makes, what memory there is."""
    texts = ["tok style, a person", 'a "person", tok: hat']
    words = ["targets=[base,dmd]", "adapt=true", "prompts=[configs/prompts/portraits.txt:8]"]
    measured(tmp_path / "a", *words, f"cache={tmp_path}/cache")
    assert "note: taught on" in capsys.readouterr().out and asked.cfg.prompts == []
    options = {
        "adapt_prompts": texts,
        "positive": "watercolour portrait, of a person",
        "memory": {"tiling": True},
    }
    cfg = merge(transfer.Config, [*SMALL, *words, f"out={tmp_path}/b", f"cache={tmp_path}/cache"], options)
    transfer.main(cfg)
    assert "note: taught on" not in capsys.readouterr().out and asked.cfg.prompts == texts
    assert asked.cfg.memory.tiling and asked.cfg.positive == options["positive"] and not asked.cfg.quantize


@pytest.mark.parametrize(
    ("second", "kept"), [(1.0, "wide"), pytest.param(9.0, "adapted", marks=pytest.mark.slow)]
)
def test_what_the_originals_layers_cannot_carry_is_taught_to_all(tmp_path, asked, second, kept):
    """The nearer of the two is measured."""
    asked.shares = iter([0.5, second])
    record = measured(tmp_path, "targets=[base,dmd]", "adapt=true")
    assert [how.get("layers", "") for how in asked.how] == ["", "full"]
    file = record["config"]["controls"][-1]
    assert Path(file).parent.parent.name == kept


def test_how_near_a_try_is_is_what_the_farthest_of_those_says_who_see_the_original(tmp_path):
    def written(folder, *shares):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shares.json").write_text(json.dumps([{"judged": {"value": share}} for share in shares]))
        return folder

    first, second = tmp_path / "first", adapting.wider(tmp_path / "first")
    assert adapting.distance(written(first, 0.9, 0.5, None, 1.5)) == pytest.approx(np.log(2))
    assert adapting.distance(written(first, None)) == adapting.distance(tmp_path / "nowhere") == np.inf
    # near by those that set its strength, dead by a third: another control is nearer that all see
    written(first, 1.05, 0.96, -0.02)
    assert adapting.nearer(first) == first
    written(second, 0.89, 1.11, 1.22)
    assert adapting.nearer(first) == second


def test_a_loss_by_the_second_evaluator_alone_is_one():
    cell = {"source": "tiny/base", "target": "tiny/dmd", "reference": ""}
    for verdicts, lost in (("kept", "weaker", "kept"), True), (("kept", "kept", "dead"), False):
        readings = {name: {"verdict": its} for name, its in zip("abc", verdicts, strict=True)}
        assert adapting.is_lost({**cell, "readings": readings}) is lost


@pytest.mark.parametrize(
    ("device", "visible", "seen"),
    [("cuda:1", None, "1"), ("cuda:1", "4,6", "6"), ("cpu", "4,6", "4,6"), ("cpu", None, None)],
)
def test_each_process_teaches_on_its_own_gpu(device, visible, seen, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", raising=False
    )
    its = adapting.environment(torch.device(device))
    assert its.get("CUDA_VISIBLE_DEVICES") == seen and "RANK" not in its and "PATH" in its


def test_a_training_that_fails_is_one_line(tmp_path, asked, monkeypatch):
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(adapting.subprocess, "run", lambda command, **how: failed)
    with pytest.raises(UserError, match="could not adapt watercolour-kv to tiny/dmd"):
        measured(tmp_path, "targets=[base,dmd]", "adapt=true", "wandb=disabled")
