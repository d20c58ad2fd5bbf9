"""Folders of pictures: named, documented, drawn again to the bit, continued."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configs import ROOT, UserError, load, merge
from controls import formats, generate
from controls.acting import by_network
from controls.generate import Config, settings_of
from controls.lora import fused
from controls.picture_grid import to_uint8
from models.families import Family
from models.plans import hybrid
from models.sampler import draw_noise, finish

SMILE, KV = (ROOT / f"controls/tiny/{name}.safetensors" for name in ("smile", "watercolour-kv"))
TEXTS = ["portrait of a person", "portrait of a person, hat"]
SMALL = [f"prompts={TEXTS}", "seeds=2", "wandb=disabled"]


def drawn(folder: Path, *words: str) -> Path:
    return generate.main(merge(Config, [*SMALL, f"out={folder}", *words]))


def seen(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("pictures") / "mine", "controls={smile: 0.8, watercolour-kv: 1}")


def test_a_picture_is_the_plans_with_all_controls_on_all_its_networks(folder):
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        *("0_0.png", "0_1.png", "1_2.png", "1_3.png")
    ]
    family = Family("tiny", dtype=torch.float32)
    base, dmd, (smile, kv) = family.member("base"), family.member("dmd"), map(formats.load, (SMILE, KV))
    plan = hybrid(base, dmd, 1)
    with torch.no_grad(), fused(base.denoiser.net, smile, 0.8), fused(base.denoiser.net, kv, 1.0):
        with fused(dmd.denoiser.net, smile, 0.8), fused(dmd.denoiser.net, kv, 1.0):
            noise = draw_noise([2], family.latent_shape, plan.steps)
            expected = to_uint8(family.decode(finish(plan, noise, family.encode(TEXTS[1:]))))[0]
    got = torch.from_numpy(seen(folder / "images/1_2.png")).permute(2, 0, 1)
    assert (got.int() - expected.int()).abs().max() <= 1
    assert not np.array_equal(seen(folder / "images/1_2.png"), seen(folder / "images/1_3.png"))


def test_a_control_acts_also_where_weights_are_mixed(tmp_path):
    """Whose sums are not those of either member's weights."""
    words = ["plan=dmd:delta(0.8)", "seeds=1", f"prompts={TEXTS[:1]}"]
    plain, smiling = drawn(tmp_path / "plain", *words), drawn(tmp_path / "on", *words, "controls={smile: 1}")
    pictures = [seen(folder / "images/0_0.png").astype(int) for folder in (plain, smiling)]
    assert np.abs(pictures[0] - pictures[1]).max() > 20


def test_one_network_has_one_scale():
    """As that of a LoRA student, which is its base's."""
    family = Family("tiny", dtype=torch.float32)
    base, dmd = family.member("base"), family.member("dmd")
    shared = replace(dmd, denoiser=replace(dmd.denoiser, net=base.denoiser.net))
    plan = hybrid(base, shared, 1)
    assert by_network(plan, {"tiny/base": 1.0, "tiny/dmd": 1.0}) == {base.denoiser.net: 1.0}
    with pytest.raises(UserError, match="shares the network of a member that has another scale, 1 and 1.3"):
        by_network(plan, {"tiny/base": 1.0, "tiny/dmd": 1.3})


def test_settings_that_are_damaged_are_said(tmp_path):
    about = PngInfo()
    about.add_itxt(generate.KEY, '{"prompt": "a hat"}')
    Image.new("RGB", (8, 8)).save(tmp_path / "half.png", pnginfo=about)
    with pytest.raises(UserError, match="has no settings of controls.generate"):
        drawn(tmp_path / "out", f"again={tmp_path}/half.png")


def test_every_picture_says_all_it_depends_on(folder):
    said = settings_of(folder / "images/1_2.png")
    assert (said["prompt"], said["case"], said["seed"], said["plan"]) == (TEXTS[1], 1, 2, "dmd:hybrid(1)")
    assert [(its["name"], its["scale"]) for its in said["controls"]] == [
        ("smile", {"tiny/base": 0.8, "tiny/dmd": 0.8}),
        ("watercolour-kv", {"tiny/base": 1.0, "tiny/dmd": 1.0}),
    ]
    assert set(said["members"]) == {"dmd", "base"} and said["device"] == "cpu" and "torch" in said["versions"]
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"images/{name}.png" for name in ("0_0", "0_1", "1_2", "1_3")]
    assert lines[2] == {"file": "images/1_2.png", **said} and (folder / "sheet.png").is_file()


def test_a_picture_is_drawn_again_bit_for_bit_from_what_it_says(folder, tmp_path, monkeypatch, capsys):
    picture = folder / "images/1_3.png"
    monkeypatch.setattr(
        sys, "argv", ["generate", f"from={picture}", f"out={tmp_path}/again", "wandb=disabled"]
    )
    generate.run()
    assert "bit for bit" in capsys.readouterr().out
    assert (tmp_path / "again/images/1_3.png").read_bytes() == picture.read_bytes()


def test_another_control_of_that_name_does_not_draw_it_again(folder, tmp_path, monkeypatch):
    other = tmp_path / "smile.safetensors"
    formats.save(formats.load(ROOT / "controls/tiny/age.safetensors"), other)
    said = settings_of(folder / "images/0_0.png")
    said["controls"][0]["file"] = str(other)
    monkeypatch.setattr(generate, "settings_of", lambda path: said)
    with pytest.raises(UserError, match="another control than the one that drew"):
        drawn(tmp_path / "again", "again=0_0.png")
    assert not (tmp_path / "again").exists()


def test_what_is_there_is_not_drawn_again_and_prompts_can_be_added(folder, monkeypatch):
    drawings, its = [], generate.Studio.drawn

    def noted(self, plan, batch):
        drawings.extend(batch)
        return its(self, plan, batch)

    monkeypatch.setattr(generate.Studio, "drawn", noted)
    before = (folder / "images/0_1.png").read_bytes()
    (folder / "images/0_1.png").unlink()
    words = ["controls={smile: 0.8, watercolour-kv: 1}", f"prompts={[*TEXTS, 'portrait of a person, beard']}"]
    drawn(folder, *words)
    assert [picture.file for picture in drawings] == [f"images/{name}.png" for name in ("0_1", "2_4", "2_5")]
    assert (folder / "images/0_1.png").read_bytes() == before
    with pytest.raises(UserError, match="holds a run of another config"):
        drawn(folder, "controls={smile: 0.5}")


def test_cases_and_seeds_of_a_published_table_name_the_pictures(tmp_path):
    table = tmp_path / "coco.csv"
    table.write_text("case_number,prompt,evaluation_seed\n40,a hat,9\n7,a person,1234\n")
    folder = drawn(tmp_path / "out", f"prompts=[{table}]", "seeds=1", "plan=lightning")
    assert {path.name for path in (folder / "images").iterdir()} == {"7_1234.png", "40_9.png"}
    table.write_text("case_number,prompt,evaluation_seed\n7,a hat,9\n7,a person,9\n")
    with pytest.raises(UserError, match="same case_number and seed"):
        drawn(tmp_path / "twice", f"prompts=[{table}]", "seeds=1")


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(folder, tmp_path):
    words = [*SMALL, f"out={tmp_path}/two", "controls={smile: 0.8, watercolour-kv: 1}"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29541"]
    command = [sys.executable, *launch, "-m", "controls.generate", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "two/images").iterdir():
        assert np.abs(seen(path).astype(int) - seen(folder / "images" / path.name)).max() <= 1
    assert len((tmp_path / "two/images.jsonl").read_text().splitlines()) == 4


def test_the_matched_scale_is_that_of_the_header_or_of_a_run(tmp_path):
    control = formats.load(SMILE)
    scales = {"tiny/dmd": 1.3, "tiny/dmd:hybrid(1)": 1.1, "tiny/lcm": None}
    targets = {
        name: {"clip": {"scale": {"value": value}}, "probe": {"scale": {"value": 9}}}
        for name, value in scales.items()
    }
    control.card = replace(control.card, transfer={"targets": targets})
    file = tmp_path / "mine.safetensors"
    formats.save(control, file)
    both = {"tiny/base": 1.0, "tiny/dmd": 1.3}  # each its own where the plan itself was not measured
    for plan, wanted in {
        "dmd": {"tiny/dmd": 1.3},
        "dmd:hybrid(1)": dict.fromkeys(both, 1.1),
        "dmd:hybrid(2)": both,
    }.items():
        folder = drawn(tmp_path / plan, f"plan={plan}", f"controls={{{file}: matched}}", "seeds=1")
        assert settings_of(folder / "images/0_0.png")["controls"][0]["scale"] == wanted
    readings = {"clip": {"matched_scale": {"value": 0.7}}}
    cells = [{"control": "smile", "target": "tiny/lcm", "readings": readings}]
    (tmp_path / "results.json").write_text(json.dumps({"cells": cells}))
    words = ["plan=lcm", f"controls={{{file}: matched}}", "seeds=1"]
    folder = drawn(tmp_path / "measured", *words, f"measured={tmp_path}/results.json")
    assert settings_of(folder / "images/0_0.png")["controls"][0]["scale"] == {"tiny/lcm": 0.7}
    with pytest.raises(UserError, match="has no matched scale on tiny/lcm: its header says None"):
        drawn(tmp_path / "none", *words)
    with pytest.raises(UserError, match="does not say its scale on tiny/turbo: .*write_card=true"):
        drawn(tmp_path / "none", "plan=turbo", f"controls={{{file}: matched}}")


def test_what_it_takes_is_said(tmp_path, capsys):
    drawn(tmp_path / "plan", "dry_run=true", "controls={smile: 1}")
    said = capsys.readouterr().out
    assert "4 pictures by tiny/dmd:hybrid(1), 4 network evaluations each" in said
    assert "network evaluations: 4 of base, 12 of dmd" in said and "it fits in" in said
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan=nowhere"], "no member 'nowhere'"),
        (["plan=dmd:hybrid(9)"], "k must be 0 … 4"),
        (["controls={nowhere: 1}"], "no control file at nowhere"),
        (["controls={smile: much}"], "smile has the scale .much.; it must be a number"),
        (["controls={smile: .nan}"], "smile must be finite; got nan"),
        (["again=nowhere.png"], "from=nowhere.png is no picture"),
        (["again=controls/tiny/adapted.png"], "has no settings"),
        (["measured=nowhere.json", "controls={smile: matched}"], "no results.json"),
        (["dtype=fp8"], "no dtype"),
        (["plan=dmd:adapted(1)"], "is of analysis.diversity"),
        (["memory.gpu_gb=24"], "add --dry-run"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, words, says):
    with pytest.raises(UserError, match=says) as raised:
        drawn(tmp_path / "out", *words)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_the_command_line_takes_a_table_of_scales():
    assert load(Config, ["controls={smile: 0.8, watercolour: matched}"]).controls == {
        "smile": 0.8,
        "watercolour": "matched",
    }
