"""Training: killed runs continue to the same bits, and a slider moves its own attribute."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.commands import configured, refused

from configs import ROOT, UserError, merge
from controls import formats
from models.families import Family
from models.sampler import Denoiser, draw_noise
from train import lora, slider, tiny
from train.checkpoint import resumable, seeded
from train.run import Run

SMALL = [
    "member=tiny/dmd",  # in 4 steps without guidance
    "steps=6",
    "batch_size=2",
    "trajectories=3",
    "sample_every=0",
    "save_every=2",
    "sample_seeds=[1]",
    "sample_scales=[0,1]",
    "wandb=disabled",
]


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


def trained(tmp_path, *words):
    return load_file(slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}", *words])))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small slider, trained without a break."""
    return trained(tmp_path_factory.mktemp("whole"))


def interrupted(monkeypatch, call, after: int) -> bool:
    """Whether a call was killed at the given one of the moments in which a training computes, descends or
    writes its state.
    """
    left = after

    def dying(original):
        def moment(*args, **kwargs):
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return moment

    with monkeypatch.context() as patch:
        for place, name in ((Run, "backward"), (Run, "descend"), (torch, "save"), (Run, "show")):
            patch.setattr(place, name, dying(getattr(place, name)))
        try:
            call()
        except KeyboardInterrupt:
            return True
    return False


def test_a_slider_killed_at_random_points_continues_bit_for_bit(tmp_path, monkeypatch, whole):
    points = random.Random(0)
    kills = [interrupted(monkeypatch, lambda: trained(tmp_path), points.randint(1, 12)) for _ in range(4)]
    assert sum(kills) >= 3, "it is finished too early to say"
    assert same(trained(tmp_path), whole)


@pytest.mark.parametrize(
    ("optimizer", "extra", "learning_rate"),
    [("prodigy", "prodigyopt", 1.0), ("adamw8bit", "bitsandbytes", 1e-3)],
)
def test_the_extras_train_and_continue(tmp_path, monkeypatch, optimizer, extra, learning_rate):
    pytest.importorskip(extra)
    words = [f"optimizer={optimizer}", f"learning_rate={learning_rate}", "steps=4"]
    undisturbed = trained(tmp_path / "whole", *words)
    assert interrupted(monkeypatch, lambda: trained(tmp_path / "killed", *words), 10)
    assert any(tensor.any() for name, tensor in undisturbed.items() if "lora_B" in name)
    assert same(trained(tmp_path / "killed", *words), undisturbed)


@pytest.mark.parametrize("student", ["dmd", "lcm", "lightning"])
def test_students_are_trained_on_their_own_timesteps(tmp_path, monkeypatch, student):
    asked, original = set(), Denoiser.__call__

    def spy(self, x, noise, *rest):
        asked.add(noise.t)
        return original(self, x, noise, *rest)

    monkeypatch.setattr(Denoiser, "__call__", spy)
    control = trained(tmp_path, f"member=tiny/{student}", "steps=2")
    assert any(tensor.any() for name, tensor in control.items() if "lora_B" in name)
    assert asked == {level.t for level in Family("tiny").member(student).levels}


def test_erasing_is_enhancing_the_other_way_round():
    family, pair = Family("tiny"), slider.smile()[0]
    pairs = slider.spread(slider.Config(prompts=[pair, replace(pair, action="erase")]))
    teacher, member = slider.Teacher(family, family.member("dmd"), pairs), family.member("dmd")
    x = draw_noise([1, 1], family.latent_shape, 0)[:, 0]
    neutral, direction = teacher(x, member.levels[0], torch.tensor([0, 1]))
    assert (
        torch.allclose(direction[0], -direction[1], atol=1e-5)
        and direction.any()
        and torch.allclose(neutral[0], neutral[1], atol=1e-5)
    )


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    cfg = merge(slider.Config, [*SMALL, f"out={tmp_path}", "steps=1"])
    slider.main(cfg)
    with pytest.raises(UserError, match="steps: 1 -> 2"):
        slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}", "steps=2"]))


def test_pairs_are_spread_over_attributes_and_anchors():
    pairs = slider.spread(
        slider.Config(prompts=[slider.Pair("a", "b", "c")], attributes=["x", "y"], anchors=["z"])
    )
    assert pairs[1:] == [slider.Pair("y a", "y b", "y c", "y a"), slider.Pair("z", "z", "z", "z")]
    with pytest.raises(UserError, match="positive"):
        slider.spread(slider.Config(prompts=[slider.Pair("a")]))
    with pytest.raises(UserError, match="enhance or erase"):
        slider.spread(slider.Config(prompts=[slider.Pair("a", "b", "c", action="more")]))


@pytest.mark.parametrize(
    ("given", "neutral"),
    [({}, "a"), ({"neutral": None}, "a"), ({"neutral": ""}, ""), ({"neutral": "d"}, "d")],
)
def test_an_empty_text_is_the_empty_prompt(given, neutral):
    cfg = merge(slider.Config, {"prompts": [{"target": "a", "positive": "b", "unconditional": "", **given}]})
    assert slider.spread(cfg) == [slider.Pair("a", "b", "", neutral)]
    assert slider.recipe(cfg)["prompts"] == [
        {
            "target": "a",
            "positive": "b",
            "unconditional": "",
            "neutral": given.get("neutral") or "",
            "action": "enhance",
        }
    ]


def test_a_published_prompt_file_is_read_and_what_is_ignored_is_said(tmp_path, capsys):
    (tmp_path / "prompts.yaml").write_text("""prompts:
- target: ""
  positive: "high detail"
  unconditional: "blurry"
  neutral: ""
  action: "enhance"
  guidance_scale: 4
  resolution: 512
  dynamic_resolution: false
  batch_size: 1
""")
    (pair,) = slider.spread(merge(slider.Config, tmp_path / "prompts.yaml"))
    said = capsys.readouterr().out
    assert pair == slider.Pair("", "high detail", "blurry", "") and said.count("\n") == 1
    for words in (
        "'guidance_scale=4' (here: one guidance_scale for all pairs)",
        "'batch_size=1' (here: one batch_size for all pairs)",
        "'resolution=512'",
        "'dynamic_resolution=False'",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ({"target": "a"}, "pair 1 needs a positive text"),
        ({"target": "a", "positive": " ", "unconditional": "b"}, "needs a positive text"),
        ({"target": "a", "positive": "b", "unconditional": "b"}, "differs from it; got 'b' and 'b'"),
        ({"positive": "b", "action": "remove"}, "enhance or erase, got 'remove'"),
        ({"positive": "x" * 100_000}, "a text of 100,000 characters"),
        ({"positive": "a\0b"}, "is none"),
        ({"positive": "a\ud800b"}, "is none"),
        ({"positive": "b", "negative": "c"}, "negative"),
    ],
)
def test_pairs_that_are_none(pair, says):
    with pytest.raises(UserError, match=says) as error:
        slider.spread(merge(slider.Config, {"prompts": [pair]}))
    assert len(str(error.value).encode()) < 600


@pytest.mark.slow
def test_two_processes_learn_what_one_with_twice_the_batches_learns(tmp_path):
    one = trained(tmp_path / "one", "gradient_accumulation_steps=2")
    words = [*SMALL, f"out={tmp_path}/two"]
    # torchrun, for on a CPU `accelerate launch --num_processes=2` starts one process
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29531",
        "train/slider.py",
        *words,
    ]
    done = subprocess.run(
        launch, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two/smile/control.safetensors")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_the_published_recipe_trains_and_continues(tmp_path, monkeypatch):
    words = ["recipe=published", "denoise_steps=5", "member=tiny/base", "steps=3", "save_every=1"]
    undisturbed = trained(tmp_path / "whole", *words)
    assert interrupted(monkeypatch, lambda: trained(tmp_path / "killed", *words), 10)
    assert any(tensor.any() for name, tensor in undisturbed.items() if "lora_B" in name)
    assert same(trained(tmp_path / "killed", *words), undisturbed)


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
    plain, thrifty = (
        trained(tmp_path / "a", "steps=2"),
        trained(tmp_path / "b", "steps=2", "gradient_checkpointing=true"),
    )
    assert all(torch.allclose(plain[name], thrifty[name], atol=1e-5) for name in plain)


def test_watching_measures_other_members_and_changes_nothing(tmp_path, monkeypatch, whole):
    encoders, original = [], Run.descend

    def spy(self, step):
        encoders.extend([self.family.pipe.text_encoder, self.family.pipe.text_encoder_2])
        original(self, step)

    monkeypatch.setattr(Run, "descend", spy)
    watched = trained(tmp_path, "watch=[tiny/lcm]", "watch_every=3", "watch_prompts=2", "sample_every=3")
    assert same(watched, whole)
    first, second = map(json.loads, (tmp_path / "smile/watch.jsonl").read_text().splitlines())
    assert (
        {"step", "effect/tiny/dmd", "effect/tiny/lcm", "retention/tiny/lcm/low"}
        <= first.keys()
        == second.keys()
    )
    assert (tmp_path / "smile/samples/step-00003.png").is_file() and (
        tmp_path / "smile/samples/final.png"
    ).is_file()
    assert encoders == [None] * 12, (
        "text encoders are let go before the first step, and strips and watching need none"
    )


def test_the_average_lags_behind(tmp_path, whole):
    average = trained(tmp_path, "ema=0.9")

    def size(control):
        return sum(t.square().sum() for n, t in control.items() if "lora_B" in n).sqrt()

    assert 0 < size(average) < size(whole)


@pytest.mark.parametrize(
    ("module", "word", "says"),
    [
        (slider, "stepz=3", "steps"),
        (slider, "steps=many", "steps"),
        (slider, "member=nowhere/base", "tiny"),
        (slider, "member=tiny/hyper", "lightning"),
        (slider, "layers=everything", "noxattn"),
        (slider, "optimizer=sgd", "prodigy"),
        (slider, "lr_scheduler=cosign", "constant"),
        (slider, "recipe=slow", "published"),
        (slider, "watch=[sdxl/turbo]", "tiny"),
        (slider, "gradient_accumulation_steps=0", "at least 1"),
        (slider, "name=smile.2", "dot"),
        (lora, "images=0", "at least 1"),
        (lora, "data=tiny:oil", "watercolour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(module, word, says, tmp_path):
    words = ["trajectories=1" if module is slider else "images=2", word, f"out={tmp_path}", "wandb=disabled"]
    refused(configured(module, words), says)


def test_the_command_itself_exits_with_2():
    words = [sys.executable, "-m", "analysis.report", "nowhere"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "nowhere" in done.stderr


def test_a_part_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny.py", "unet"])
    with pytest.raises(UserError, match="vae, base"):
        tiny.main()


def test_a_lora_trains_without_its_prior_term(tmp_path):
    """The default: no class of pictures is encoded, for none is kept."""
    words = ["steps=1", "images=4", "batch_size=2", "sample_seeds=[1]", "sample_scales=[0,1]"]
    assert lora.Config().prior == 0
    path = lora.main(merge(lora.Config, [*words, "wandb=disabled", f"out={tmp_path}"]))
    assert any((weight != 0).any() for name, weight in formats.load(path).tensors.items() if "lora_B" in name)
