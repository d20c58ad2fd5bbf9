"""The paper's hybrid beside diffusers' own pipeline of the student, whose U-Net is swapped for the base's."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from diffusers.utils.torch_utils import randn_tensor

from configs import ROOT
from models.families import Family
from models.plans import hybrid
from models.sampler import Denoiser, draw_noise, finish

WEIGHTS = ROOT / "models/tiny/weights"
TEXTS, SEEDS = ["portrait of a person, glasses, brown hair", "portrait of a person, hat"], [5, 17]
STUDENTS = {  # its scheduler, as it is published beside its weights, and how that is called
    "dmd": (LCMScheduler, {"timesteps": [999, 749, 499, 249]}),
    "lcm": (LCMScheduler, {"num_inference_steps": 4}),
    "lightning": (EulerDiscreteScheduler, {"num_inference_steps": 4}),
    "turbo": (EulerAncestralDiscreteScheduler, {"num_inference_steps": 4}),
}


@pytest.fixture(scope="module")
def tiny():
    return Family("tiny", dtype=torch.float32)


@pytest.fixture
def single(monkeypatch):
    """diffusers draws its noise in fp32, whatever it computes in."""
    for module in (pipeline_stable_diffusion_xl, scheduling_lcm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", drawn_in_fp32)


def drawn_in_fp32(shape, generator=None, device=None, dtype=None, layout=None) -> torch.Tensor:
    return randn_tensor(shape, generator, device, torch.float32, layout).to(dtype)


def doubled(folder: str) -> UNet2DConditionModel:
    """A network in fp64: in fp32 the order of sums alone moves latents of some plans by 2e-4."""
    return UNet2DConditionModel.from_pretrained(WEIGHTS / folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("k", [0, 1, 2, 4])
@pytest.mark.parametrize("name", STUDENTS)
def test_hybrid_is_diffusers_own_loop_of_the_student_with_the_weights_swapped(tiny, single, name, k):
    """The paper's Algorithm 1: the student's scheduler, timesteps, start; no guidance; the base's weights."""
    kind, steps = STUDENTS[name]
    own, net = (doubled(folder) for folder in ("base/unet", name))
    base, student = (
        replace(tiny.member(member), denoiser=Denoiser(unet)) for member, unet in (("base", own), (name, net))
    )
    prompts = tiny.encode(TEXTS).to(torch.float64)
    scheduler = kind.from_pretrained(WEIGHTS / name / "scheduler")
    pipe = StableDiffusionXLPipeline(tiny.pipe.vae, None, None, None, None, own if k else net, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def swap(pipe, step: int, t, kept: dict) -> dict:
        pipe.unet = net if step + 1 >= k else own
        return kept

    theirs = pipe(
        prompt_embeds=prompts.tokens,
        pooled_prompt_embeds=prompts.pooled,
        guidance_scale=0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        height=64,
        width=64,
        callback_on_step_end=swap,
        **steps,
    ).images
    plan = hybrid(base, student, k)
    ours = finish(plan, draw_noise(SEEDS, tiny.latent_shape, plan.steps).double(), prompts)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    assert plan.nfe_by_member == Counter({"tiny/base": k, f"tiny/{name}": 4 - k})
