"""The embedded family as others use it: diffusers alone, without our code, against our sampler."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)

from configs import ROOT
from controls import formats
from controls.lora import attach, detach, strength
from models.families import Family
from models.sampler import alone, draw_noise, finish
from models.tiny import world
from models.tiny.evaluators import Probe, column
from models.tiny.faces import styled

WEIGHTS = ROOT / "models/tiny/weights"
PROMPT = "portrait of a person, smiling, glasses"
CALLS = {
    "base": {"num_inference_steps": 10, "guidance_scale": 3.0},
    "dmd": {"timesteps": [999, 749, 499, 249], "guidance_scale": 0},
    "dmd8": {"timesteps": [999, 749, 499, 249], "guidance_scale": 0},
    "lcm": {"num_inference_steps": 4, "guidance_scale": 0},
    "lightning": {"num_inference_steps": 4, "guidance_scale": 0},
    "turbo": {"num_inference_steps": 4, "guidance_scale": 0},
}
SCHEDULERS = {"lightning": EulerDiscreteScheduler, "turbo": EulerAncestralDiscreteScheduler}


@pytest.fixture(scope="module")
def family():
    return Family("tiny", dtype=torch.float32)


def pipeline(member: str) -> DiffusionPipeline:
    """What a user of the published students writes."""
    if member == "base":
        pipe = DiffusionPipeline.from_pretrained(WEIGHTS / "base")
    else:
        kind = SCHEDULERS.get(member, LCMScheduler)
        unet = UNet2DConditionModel.from_pretrained(WEIGHTS / member)
        scheduler = kind.from_pretrained(WEIGHTS / member, subfolder="scheduler")
        pipe = DiffusionPipeline.from_pretrained(WEIGHTS / "base", unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: DiffusionPipeline, member: str, seeds: list[int]) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        [PROMPT] * len(seeds),
        height=64,
        width=64,
        generator=generators,
        output_type="latent",
        **CALLS[member],
    ).images


def ours(family: Family, member: str, seeds: list[int]) -> torch.Tensor:
    model = family.member(member)
    noise = draw_noise(seeds, family.latent_shape, len(model.levels))
    with torch.no_grad():
        return finish(alone(model), noise, family.encode([PROMPT] * len(seeds)))


@pytest.mark.parametrize("member", CALLS)
def test_diffusers_alone_draws_what_we_draw(family, member):
    pipe = pipeline(member)
    assert (theirs(pipe, member, [1, 2]) - ours(family, member, [1, 2])).abs().max() < 1e-4


@pytest.mark.parametrize("member", CALLS)
def test_a_shipped_slider_in_diffusers_is_ours(family, member):
    pipe, net, file = (
        pipeline(member),
        family.member(member).denoiser.net,
        ROOT / "controls/tiny/smile.safetensors",
    )
    bare = theirs(pipe, member, [1])
    pipe.load_lora_weights(file, adapter_name="smile")
    changed = theirs(pipe, member, [1])
    attach(net, formats.load(file), family="tiny")
    try:
        with strength(net, smile=1.0):
            mine = ours(family, member, [1])
    finally:
        detach(net)
    assert (changed - bare).abs().max() > 0.05, "the slider does something"
    assert (changed - mine).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("control", "attribute"),
    [("smile", "smile"), *(pytest.param(name, name, marks=pytest.mark.slow) for name in ("age", "eyes"))],
)
def test_each_slider_moves_its_own_attribute_on_the_base(family, control, attribute):
    member, seen = family.member("base"), []
    prompts = ["portrait of a person"] * 8
    noise = draw_noise(range(100, 108), family.latent_shape, len(member.levels))
    probe = Probe.load(WEIGHTS / "probe")
    attach(member.denoiser.net, formats.load(ROOT / f"controls/tiny/{control}.safetensors"), family="tiny")
    try:
        for scale in (-1.0, 0.0, 1.0):
            with torch.no_grad(), strength(member.denoiser.net, {control: scale}):
                seen.append(
                    probe(family.decode(finish(alone(member), noise, family.encode(prompts)))).mean(0)
                )
    finally:
        detach(member.denoiser.net)
    low, middle, high = seen
    at = column(attribute)
    assert low[at] < middle[at] < high[at] and high[at] - low[at] > 0.2
    assert (high - low)[column("hat")].abs() < 0.4


@pytest.mark.parametrize("member", CALLS)
def test_faces_obey_the_prompt(family, member):
    """A floor, far below what the certificate measures: a broken weights file falls through it."""
    probe = Probe.load(WEIGHTS / "probe")
    seen = probe(family.decode(ours(family, member, list(range(12)))))
    assert (seen[:, column("glasses")] > 0.5).float().mean() >= 0.7
    assert (seen[:, column("smile")] > 0).float().mean() >= 0.7


def test_the_weights_stay_light():
    total = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file())
    assert total <= 45 * 2**20
    unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "base", subfolder="unet")
    assert 3e6 <= sum(p.numel() for p in unet.parameters()) <= 5e6


@torch.no_grad()
def test_which_styles_the_vae_can_draw(family):
    """What no LoRA of a style can exceed: what the probe sees of its own pictures, encoded and decoded."""
    people, probe = world.faces(32, 9), Probe.load(WEIGHTS / "probe")
    kept = {}
    for style in ("watercolour", "crayon"):
        pictures = world.to_unit(world.pictures([styled(face, style) for face in people]))
        back = family.decode(family.to_latents(pictures))
        kept[style] = probe(back)[:, column(f"style {style}")].mean().item()
    assert kept["watercolour"] > 0.9 and kept["crayon"] < 0.1
