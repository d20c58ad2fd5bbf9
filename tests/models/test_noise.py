"""Noise levels against diffusers' schedulers and closed forms."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from configs import UserError
from models.noise import (
    ALL,
    CLEAN,
    NOISE_SCHEDULES,
    TRAIN_STEPS,
    Band,
    Noise,
    ancestral,
    flow,
    flow_at,
    timesteps,
    to_eps,
    to_x0,
    vp,
    vp_at,
)

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
VP_KINDS = {  # what a network of each kind should answer, from x0, eps and the level
    "eps": lambda x0, eps, noise: eps,
    "v": lambda x0, eps, noise: noise.alpha * eps - noise.sigma * x0,
    "sample": lambda x0, eps, noise: x0,
}


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An x0 and an eps, (2, 4, 8, 8), float64."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, 4, 8, 8, generator=rng, dtype=torch.float64))


def test_vp_is_the_alphas_cumprod_of_sdxl():
    kept = DDIMScheduler(**SDXL).alphas_cumprod.double().numpy()
    levels = [vp(t) for t in range(TRAIN_STEPS)]
    assert np.allclose([level.alpha**2 for level in levels], kept, rtol=1e-5)
    assert np.allclose(
        [level.sigma**2 for level in levels], 1 - kept, rtol=1e-3
    )  # diffusers' float32 next to 1
    assert kept[999] == pytest.approx(0.00466, abs=1e-5)  # not 0: the last step still sees the image


def test_between_training_steps_vp_is_diffusers_euler():
    scheduler = EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    ratios = [vp(t).ratio for t in timesteps("linspace", 7)]
    assert np.allclose(ratios, scheduler.sigmas[:-1], rtol=1e-4)  # diffusers works in float32 next to 1


@pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.2, 14.0])
def test_a_level_is_found_by_its_ratio(noise_schedule, ratio):
    at, at_ratio = NOISE_SCHEDULES[noise_schedule]
    level = at_ratio(ratio)
    assert level.ratio == pytest.approx(ratio, rel=1e-4)
    assert at(level.t).ratio == pytest.approx(level.ratio)


def test_the_laws_keep_their_promise():
    for t in np.linspace(0, 999, 23):
        assert math.hypot(vp(t).alpha, vp(t).sigma) == pytest.approx(1)
        assert flow(t).alpha + flow(t).sigma == pytest.approx(1)


def test_pure_noise_and_its_neighbours():
    assert flow(1000) == Noise(1000.0, 0.0, 1.0) and flow(1000).ratio == math.inf
    assert flow_at(math.inf) == flow(1000)
    assert vp_at(math.inf) == vp(999)  # SDXL's schedule does not reach pure noise
    assert CLEAN.ratio == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_diffusers_flow_matching(shift):
    sigmas = [1.0, 0.75, 0.5, 0.25]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=sigmas)
    levels = [flow(TRAIN_STEPS * s, shift) for s in sigmas]
    assert np.allclose([level.sigma for level in levels], scheduler.sigmas[:-1])
    assert np.allclose([level.t for level in levels], scheduler.timesteps)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 20, 25, 30, 48, 50, 61, 100, 333])
def test_timesteps_are_those_of_diffusers(spacing, offset, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    # DDIM rounds linspace, Euler and ours do not; with 61 steps diffusers' trailing goes on to a 62nd at -1
    assert [round(t) for t in timesteps(spacing, steps)] == scheduler.timesteps.tolist()[:steps]


def test_linspace_is_eulers():
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(6)
    assert np.allclose(timesteps("linspace", 6), scheduler.timesteps)


def test_the_published_timesteps_of_four_steps():
    assert timesteps("leading", 4) == [751, 501, 251, 1]
    assert timesteps("trailing", 4) == [999, 749, 499, 249]
    assert timesteps("trailing", 1) == [999]
    scheduler = LCMScheduler(**SDXL)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UserError, match="1 … 1000"):
        timesteps("leading", steps)


def test_unknown_spacing():
    with pytest.raises(UserError, match="leading, trailing, linspace"):
        timesteps("karras", 4)


@pytest.mark.parametrize("prediction_type", VP_KINDS)
@pytest.mark.parametrize("t", [0, 1, 249, 749, 999])
def test_x0_comes_back_from_every_kind(prediction_type, t):
    (x0, eps), noise = pair(), vp(t)
    x = noise.alpha * x0 + noise.sigma * eps
    found = to_x0(x, VP_KINDS[prediction_type](x0, eps, noise), noise, prediction_type)
    assert torch.allclose(found, x0) and torch.allclose(to_eps(x, found, noise), eps)


@pytest.mark.parametrize("t", [1, 500, 1000])
def test_x0_comes_back_from_a_flow(t):
    (x0, eps), noise = pair(), flow(t)
    x = noise.alpha * x0 + noise.sigma * eps
    assert torch.allclose(to_x0(x, eps - x0, noise, "flow"), x0)


def test_unknown_kind():
    x, _ = pair()
    with pytest.raises(UserError, match="eps, v, flow, sample"):
        to_x0(x, x, vp(500), "epsilon")


def test_ancestral_eta():
    """k-diffusion's sigma_up and sigma_down are eta and sqrt(1 - eta^2) of the next sigma."""
    now, after = vp(749), vp(499)
    up = math.sqrt(after.ratio**2 * (now.ratio**2 - after.ratio**2) / now.ratio**2)
    assert ancestral(now, after) * after.ratio == pytest.approx(up)
    assert ancestral(now, CLEAN) == 1 and ancestral(now, now) == 0 and ancestral(flow(1000), flow(500)) == 1


def test_a_band_holds_the_levels_between_its_ends():
    """Pure noise of a flow, whose sigma / alpha is infinite, too, where nothing bounds it from above."""
    levels = [vp(999), vp(499), vp(99), flow(1000)]
    assert [[level in band for level in levels] for band in (Band.of(1.0, None), Band.of(None, 1.0))] == [
        [True, True, False, True],
        [False, False, True, False],
    ]
    assert [level in Band.of(0.5, 3.0) for level in levels] == [False, True, False, False]
    assert Band.of(None, None) == ALL and all(level in ALL for level in levels)
    for above, below in ((2.0, 1.0), (-1.0, None), (None, 0.0)):
        with pytest.raises(UserError, match="above < below"):
            Band.of(above, below)
