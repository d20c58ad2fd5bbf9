"""Training: killed runs continue to the same bits, and a slider moves its own attribute."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from configs import ROOT, UserError, entry, load, merge
from train import lora, slider
from train.checkpoint import resumable, seeded
from train.run import Run

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
    cfg, original, calls = merge(slider.Config, [*SMALL, f"out={tmp_path}/killed"]), Run.backward, 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(Run, "backward", dies)
    with pytest.raises(KeyboardInterrupt):
        slider.main(cfg)
    monkeypatch.setattr(Run, "backward", original)
    continued = slider.main(cfg)
    ours, theirs = load_file(whole), load_file(continued)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    cfg = merge(slider.Config, [*SMALL, f"out={tmp_path}", "steps=1"])
    slider.main(cfg)
    with pytest.raises(UserError, match="steps: 1 -> 2"):
        slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}", "steps=2"]))


def test_pairs_are_spread_over_attributes_and_anchors():
    pairs = slider.spread(slider.Config(prompts=[slider.Pair("a", "b", "c")], attributes=["x", "y"], anchors=["z"]))
    assert pairs[1:] == [slider.Pair("y a", "y b", "y c", "y a"), slider.Pair("z", "z", "z", "z")]
    with pytest.raises(UserError, match="positive"):
        slider.spread(slider.Config(prompts=[slider.Pair("a")]))
    with pytest.raises(UserError, match="enhance or erase"):
        slider.spread(slider.Config(prompts=[slider.Pair("a", "b", "c", action="more")]))


def trained(tmp_path, *words):
    return load_file(slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}", *words])))


def test_two_processes_learn_what_one_with_twice_the_batches_learns(tmp_path):
    one = trained(tmp_path / "one", "accumulate=2")
    words = [*SMALL, f"out={tmp_path}/two"]
    # torchrun, for on a CPU `accelerate launch --num_processes=2` starts one process
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531", "train/slider.py", *words]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two/smile/control.safetensors")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_the_published_recipe_trains_and_continues(tmp_path, monkeypatch):
    words = ["recipe=published", "denoise_steps=5", "member=tiny/base", "steps=3", "save_every=1"]
    whole = trained(tmp_path / "whole", *words)
    original, calls = Run.descend, []

    def dies(self, step):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Run, "descend", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", *words)
    monkeypatch.setattr(Run, "descend", original)
    continued = trained(tmp_path / "killed", *words)
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_gradient_that_is_not_finite_stops_with_the_state_before_it(tmp_path, monkeypatch, capsys):
    original, calls = Run.backward, []

    def poisoned(self, loss):
        calls.append(loss)
        original(self, loss * float("nan") if len(calls) == 4 else loss)

    monkeypatch.setattr(Run, "backward", poisoned)
    with pytest.raises(UserError, match="not finite at step 3"):
        trained(tmp_path)
    saved = torch.load(tmp_path / "smile/state.pt", weights_only=True)
    assert saved["done"] == 3 and all(tensor.isfinite().all() for tensor in saved["weights"].values())


def test_checkpointing_changes_nothing_but_memory(tmp_path):
    plain, thrifty = trained(tmp_path / "a", "steps=2"), trained(tmp_path / "b", "steps=2", "checkpointing=true")
    assert all(torch.allclose(plain[name], thrifty[name], atol=1e-5) for name in plain)


def test_watching_measures_other_members_and_changes_nothing(tmp_path):
    plain = trained(tmp_path / "a", "steps=2")
    watched = trained(tmp_path / "b", "steps=2", "watch=[tiny/dmd]", "watch_every=2", "watch_prompts=2")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    seen = json.loads((tmp_path / "b/smile/watch.jsonl").read_text())
    assert {"step", "effect/tiny/base", "effect/tiny/dmd", "retention/tiny/dmd/low"} <= seen.keys()


def test_the_average_lags_behind(tmp_path):
    last, average = trained(tmp_path / "a"), trained(tmp_path / "b", "ema=0.9")
    size = lambda control: sum(t.square().sum() for n, t in control.items() if "lora_B" in n).sqrt()  # noqa: E731
    assert 0 < size(average) < size(last)


@pytest.mark.parametrize(
    ("module", "word", "says"),
    [
        (slider, "stepz=3", "steps"),
        (slider, "steps=many", "steps"),
        (slider, "member=nowhere/base", "tiny"),
        (slider, "member=tiny/turbo", "lightning"),
        (slider, "layers=everything", "noxattn"),
        (slider, "optimizer=sgd", "prodigy"),
        (slider, "schedule=cosign", "constant"),
        (slider, "recipe=slow", "published"),
        (slider, "watch=[sdxl/turbo]", "tiny"),
        (slider, "accumulate=0", "at least 1"),
        (lora, "images=0", "at least 1"),
        (lora, "data=tiny:oil", "watercolour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(module, word, says, tmp_path, capsys):
    words = ["trajectories=1" if module is slider else "images=2", word, f"out={tmp_path}", "wandb=disabled"]
    with pytest.raises(SystemExit) as stop:
        entry(lambda: module.main(load(module.Config, words)))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and says in said[0]


def test_the_command_itself_exits_with_2():
    done = subprocess.run([sys.executable, "train/tiny.py", "unet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "vae" in done.stderr
