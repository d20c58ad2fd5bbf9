"""Training: killed runs continue to the same bits, and a slider moves its own attribute."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from configs import ROOT, UserError, entry, load, merge
from train import lora, slider
from train.checkpoint import resumable, seeded

SMALL = ["steps=6", "batch=2", "trajectories=3", "sample_every=0", "save_every=2", "sample_seeds=[1]", "sample_scales=[0,1]",
         "wandb=disabled"]  # fmt: skip


def test_resumable_continues_where_it_was(tmp_path):
    def train(stop):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(net.parameters(), 0.1)
        for step in resumable(tmp_path / f"{name}.pt", {"net": net, "optimizer": optimizer}, 10, 3):
            if step == stop:
                return None
            x = torch.randn(4, 3, generator=seeded(0, step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return net.weight.detach()

    name = "whole"
    whole = train(stop=None)
    for kill in (1, 4, 8):
        name = f"killed-{kill}"
        assert train(stop=kill) is None
        assert torch.equal(train(stop=None), whole)


def test_a_killed_slider_continues_bit_for_bit(tmp_path, monkeypatch):
    whole = slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}/whole"]))
    cfg, original, calls = merge(slider.Config, [*SMALL, f"out={tmp_path}/killed"]), slider.difference, 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(slider, "difference", dies)
    with pytest.raises(KeyboardInterrupt):
        slider.main(cfg)
    monkeypatch.setattr(slider, "difference", original)
    continued = slider.main(cfg)
    ours, theirs = load_file(whole), load_file(continued)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    cfg = merge(slider.Config, [*SMALL, f"out={tmp_path}", "steps=1"])
    slider.main(cfg)
    with pytest.raises(UserError, match="steps: 1 -> 2"):
        slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}", "steps=2"]))


def test_both_sides_and_erase():
    pair = slider.Pair("a", "b", "c")
    assert slider.spread([pair], ["x", "y"])[1] == slider.Pair("y a", "y b", "y c", "y a")
    with pytest.raises(UserError, match="positive"):
        slider.spread([slider.Pair("a")], [])
    with pytest.raises(UserError, match="enhance or erase"):
        slider.spread([slider.Pair("a", "b", "c", action="more")], [])


@pytest.mark.parametrize(
    ("module", "word", "says"),
    [
        (slider, "stepz=3", "steps"),
        (slider, "steps=many", "steps"),
        (slider, "member=nowhere/base", "tiny"),
        (slider, "member=tiny/turbo", "lightning"),
        (slider, "layers=everything", "noxattn"),
        (lora, "data=tiny:oil", "watercolour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(module, word, says, tmp_path, capsys):
    words = [word, f"out={tmp_path}", "trajectories=1" if module is slider else "images=2", "wandb=disabled"]
    with pytest.raises(SystemExit) as stop:
        entry(lambda: module.main(load(module.Config, words)))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and says in said[0]


def test_the_command_itself_exits_with_2():
    done = subprocess.run([sys.executable, "train/tiny.py", "unet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "vae" in done.stderr
