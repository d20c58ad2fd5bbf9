"""--dry-run: what a run will load, ask and take, from configs alone."""

import re
from collections import Counter
from itertools import count
from pathlib import Path

import hub
import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from analysis import diversity, similarity, trace
from configs import ROOT, merge
from models import budget
from models.architectures import blank
from models.cards import card
from models.families import Family
from models.plans import named
from models.sampler import alone, draw_noise, finish
from train import image_slider, lora, slider, sliderspace
from train.run import Run

TRAINERS = {
    slider: "configs/sliders/age-sdxl.yaml",
    image_slider: "configs/image_sliders/sdxl.yaml",
    lora: "configs/loras/dreambooth-sdxl.yaml",
    sliderspace: "configs/sliderspaces/sdxl.yaml",
}


@pytest.fixture
def configs_only(tmp_path, monkeypatch):
    """A Hub cache of SDXL's and Flux's configs, and not one weight."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("sdxl", "flux"):
        hub.write_configs(tmp_path, name)


def evaluations(text: str) -> dict[str, int]:
    """The evaluations that a forecast names, by member."""
    line = re.search(r"network evaluations: (.*)", text)[1]
    return {name: int(count) for count, name in re.findall(r"(\d+) of ([\w-]+)", line)}


def test_the_effort_is_what_the_network_does():
    """The same count on real tensors."""
    family = Family("tiny")
    net, its = family.member("base").denoiser.net, family.architecture
    plain = sdpa_kernel(SDPBackend.MATH)  # a CPU's own attention is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        its.call(net, torch.zeros(1, *family.latent_shape), 500.0, blank(its, net), None)
    assert budget.effort(card("tiny"), "base") == counter.get_total_flops() > 1e8


def test_a_bare_family_knows_shapes_and_costs():
    bare, family = Family("tiny", bare=True), Family("tiny")
    assert bare.latent_shape == family.latent_shape
    plan = named("hybrid(1)", family.member("base"), family.member("dmd"))
    assert (
        plan.nfe_by_member
        == named("hybrid(1)", bare.member("base"), bare.member("dmd")).nfe_by_member
        == {"tiny/base": 2, "tiny/dmd": 3}
    )
    assert budget.nfe_by_member([(plan, 10), (alone(family.member("dmd")), 1)]) == {"base": 20, "dmd": 34}


@pytest.fixture
def made(monkeypatch) -> Counter:
    """How many latents pass the network, forward and back, outside of strips."""
    passes, forward = Counter(), UNet2DConditionModel.forward

    def counted(net, x, *args, **kwargs):
        out = forward(net, x, *args, **kwargs)
        passes["forward"] += len(x)
        if out.sample.requires_grad:
            out.sample.register_hook(lambda gradient: passes.update(back=len(gradient)))
        return out

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    monkeypatch.setattr(Run, "draw", lambda run, path: path)
    return passes


@pytest.fixture
def stops_in_turn(monkeypatch):
    """The published recipe's runs stop after each of their possible steps equally often, as many runs do."""
    randint, turns = torch.randint, count()

    def in_turn(low, high, size, *, generator):
        return torch.tensor([low + next(turns) % (high - low)])

    def drawn(*args, **kwargs):
        return in_turn(*args, **kwargs) if len(args) == 3 else randint(*args, **kwargs)

    monkeypatch.setattr(slider.torch, "randint", drawn)


@pytest.mark.parametrize(
    ("recipe", "member"), [("fast", "dmd"), ("published", "dmd"), ("fast", "base"), ("published", "base")]
)
def test_a_sliders_evaluations_are_those_it_makes(recipe, member, tmp_path, capsys, made, stops_in_turn):
    """A pass back counts as two."""
    words = ["trajectories=4", "steps=6", "batch_size=2", "denoise_steps=4", "wandb=disabled"]
    words += [f"recipe={recipe}", f"member=tiny/{member}", f"out={tmp_path}"]
    slider.main(merge(slider.Config, [*words, "dry_run=true"]))
    foretold = evaluations(capsys.readouterr().out)[member]
    made.clear()  # of what was followed on `meta`
    slider.main(merge(slider.Config, words))
    assert made["back"] == 6 * 2 and foretold == made["forward"] + 2 * made["back"]


@pytest.mark.parametrize(
    "recipe", [slider, *(pytest.param(it, marks=pytest.mark.slow) for it in TRAINERS if it is not slider)]
)
def test_trainers_plan_on_sdxl_without_weights(recipe, configs_only, capsys, tmp_path, monkeypatch):
    words = ["dry_run=true", "dtype=bf16", f"out={tmp_path}/runs"]
    recipe.main(merge(recipe.Config, ROOT / TRAINERS[recipe], words))
    printed = capsys.readouterr().out
    assert (
        evaluations(printed)["base"] > 1000
        and re.search(r"base +2.57 +5.1 +5.1", printed)
        and "million weights" in printed
    )
    assert 5.5 < float(re.search(r"memory at the most: ([\d.]+) GB", printed)[1]) < 60
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (diversity, "configs/paper/fig7.yaml"),
        (trace, "configs/trace/sdxl.yaml"),
        (similarity, "configs/similarity/sdxl.yaml"),
    ],
)
def test_analyses_plan_on_sdxl_without_weights(command, path, configs_only, capsys, tmp_path):
    command.main(merge(command.Config, ROOT / path, ["dry_run=true", f"out={tmp_path}/runs"]))
    printed = capsys.readouterr().out
    assert (
        "TFLOP in the networks" in printed
        and evaluations(printed)["base"] > 100
        and not Path(tmp_path / "runs").exists()
    )


def test_a_plan_on_flux_follows_its_published_schedulers(configs_only, capsys, tmp_path):
    """One evaluation per step, for its guidance is told to it; the hybrid's first level is the student's."""
    words = ["family=flux", "seeds=3", "prompts=[a,b]", "captions=0", "plans=[base(8),student,hybrid(1)]"]
    diversity.main(merge(diversity.Config, [*words, "dry_run=true", f"out={tmp_path}/runs"]))
    printed = capsys.readouterr().out
    assert evaluations(printed) == {"dev": 2 * 3 * (50 + 8 + 1), "schnell": 2 * 3 * (4 + 3)}
    assert len(re.findall(r"(?:dev|schnell) +11.9 +23.8", printed)) == 2 and not (tmp_path / "runs").exists()


def test_counts_of_a_trace_are_those_it_makes(tmp_path, capsys):
    words = [
        "students=[dmd]",
        "seeds=2",
        "prompts=[portrait of a person]",
        "control=''",
        "wandb=disabled",
        f"out={tmp_path}",
    ]
    trace.main(merge(trace.Config, [*words, "dry_run=true"]))
    foretold, family = evaluations(capsys.readouterr().out), Family("tiny")
    before = {name: family.member(name).denoiser.nfe for name in ("base", "dmd")}
    for text in ("base", "student", "base(4)", "hybrid(1)"):
        plan = named(text, family.member("base"), family.member("dmd"))
        finish(plan, draw_noise([1, 2], family.latent_shape, plan.steps), family.encode(["a", "b"]))
    assert foretold == {name: 2 * (family.member(name).denoiser.nfe - before[name]) for name in foretold}
