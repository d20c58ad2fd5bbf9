"""--dry-run: what a run will load, ask and take, from configs alone."""

import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from support import hub
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from analysis import diversity, similarity, trace
from configs import ROOT, UserError, merge
from models import budget
from models.architectures import blank
from models.cards import card
from models.families import Family
from models.plans import named
from models.sampler import alone, draw_noise, finish
from train import image_slider, lora, slider, sliderspace

TRAINERS = {
    slider: ["config=configs/sliders/age-sdxl.yaml"],
    image_slider: ["config=configs/image_sliders/sdxl.yaml"],
    lora: ["config=configs/loras/dreambooth-sdxl.yaml"],
    sliderspace: ["config=configs/sliderspaces/sdxl.yaml"],
}


@pytest.fixture
def configs_only(tmp_path, monkeypatch):
    """A Hub cache of SDXL's and Flux's configs, and not one weight."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("sdxl", "flux"):
        hub.write_configs(tmp_path, name)


def asked(text: str) -> dict[str, int]:
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
        == {"tiny/base": 1, "tiny/dmd": 3}
    )
    assert budget.nfe_by_member([(plan, 10), (alone(family.member("dmd")), 1)]) == {"base": 10, "dmd": 34}


@pytest.mark.parametrize(
    "kind", ["fast", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("published", "watched"))]
)
def test_a_sliders_evaluations_are_those_it_makes(kind, tmp_path, capsys):
    watched = ["watch=[tiny/lcm]", "watch_every=5", "watch_prompts=1", "sample_every=5"]
    words = [
        *(watched if kind == "watched" else ["sample_every=0"]),
        f"recipe={'published' if kind == 'published' else 'fast'}",
        "member=tiny/dmd",
        "trajectories=3",
        "steps=11",
        "batch_size=2",
        "wandb=disabled",
    ]
    slider.main(merge(slider.Config, [*words, "dry_run=true"]))
    said = sum(asked(capsys.readouterr().out).values())
    made = []

    def count(module, args, output) -> None:
        if isinstance(module, UNet2DConditionModel):
            sample = output[0]
            made.append(len(sample) * (3 if sample.requires_grad else 1))  # a pass back is counted as two

    hook = register_module_forward_hook(count)
    try:
        slider.main(merge(slider.Config, [*words, f"out={tmp_path}"]))
    finally:
        hook.remove()
    # the published recipe runs to a step drawn by chance, of which the mean is said
    assert said == pytest.approx(sum(made), rel=0.05 if kind == "published" else 0)


@pytest.mark.parametrize(
    "recipe", [slider, *(pytest.param(it, marks=pytest.mark.slow) for it in TRAINERS if it is not slider)]
)
def test_trainers_plan_on_sdxl_without_weights(recipe, configs_only, capsys, tmp_path, monkeypatch):
    words = [word for word in TRAINERS[recipe] if not word.startswith("config=")]
    path = ROOT / TRAINERS[recipe][0].removeprefix("config=")
    recipe.main(merge(recipe.Config, path, [*words, "dry_run=true", "dtype=bf16", f"out={tmp_path}/runs"]))
    said = capsys.readouterr().out
    assert (
        asked(said)["base"] > 1000 and re.search(r"base +2.57 +5.1 +5.1", said) and "million weights" in said
    )
    assert 5.5 < float(re.search(r"memory at the most: ([\d.]+) GB", said)[1]) < 60
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (diversity, ["config=configs/paper/fig7.yaml"]),
        (trace, ["config=configs/trace/sdxl.yaml"]),
        (similarity, ["config=configs/similarity/sdxl.yaml"]),
    ],
)
def test_analyses_plan_on_real_families_without_weights(command, words, configs_only, capsys, tmp_path):
    path, *rest = words
    command.main(
        merge(
            command.Config,
            ROOT / path.removeprefix("config="),
            [*rest, "dry_run=true", f"out={tmp_path}/runs"],
        )
    )
    said = capsys.readouterr().out
    assert (
        "TFLOP in the networks" in said and asked(said)["base"] > 100 and not Path(tmp_path / "runs").exists()
    )


@pytest.mark.slow
def test_a_flows_plan_counts_without_weights(configs_only, capsys, tmp_path):
    """Its noise levels are in its scheduler's config."""
    words = [
        "family=flux",
        "seeds=3",
        "plans=[base(8),hybrid(1)]",
        "prompts=[a,b]",
        "captions=0",
        f"out={tmp_path}/runs",
    ]
    diversity.main(merge(diversity.Config, [*words, "dry_run=true"]))
    schnell = len(Family("flux", bare=True).member("schnell").levels)
    images = 2 * 3
    assert asked(capsys.readouterr().out) == {
        "dev": images * (50 + 8 + 1),  # alone, in 8 steps, the first of the hybrid
        "schnell": images * (schnell + schnell - 1),
    }


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
    said, family = asked(capsys.readouterr().out), Family("tiny")
    before = {name: family.member(name).denoiser.nfe for name in ("base", "dmd")}
    for text in ("base", "student", "base(4)", "hybrid(1)"):
        plan = named(text, family.member("base"), family.member("dmd"))
        finish(plan, draw_noise([1, 2], family.latent_shape, plan.steps), family.encode(["a", "b"]))
    assert said == {name: 2 * (family.member(name).denoiser.nfe - before[name]) for name in said}


def test_a_plan_for_another_gpu_is_not_run(tmp_path):
    with pytest.raises(UserError, match="memory.gpu_gb=24 is what a dry run plans for: add --dry-run"):
        slider.main(merge(slider.Config, ["memory.gpu_gb=24", f"out={tmp_path}", "wandb=disabled"]))
    assert not list(tmp_path.iterdir())
