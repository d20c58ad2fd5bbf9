"""The denoising loss that recipes share: random noise levels, and what a network does not see."""

import torch
from torch import Tensor

from models.noise import NOISE_SCHEDULES, TRAIN_STEPS, Noise, loss_target
from models.prompts import Prompts
from models.sampler import Member


def random_noise(member: Member, generator: torch.Generator) -> Noise:
    """One of the training steps' levels, but the first, in the member's own schedule."""
    level_at = NOISE_SCHEDULES[member.noise_schedule][0]
    return level_at(float(torch.randint(1, TRAIN_STEPS, (1,), generator=generator)))


def squared_error(member: Member, x: Tensor, noise: Noise, conditioning: Prompts, x0: Tensor) -> Tensor:
    """The mean square of what the network sees at x (B, C, H, W) minus what x0 implies."""
    predicted, aim = (
        loss_target(x, clean, noise, member.noise_schedule)
        for clean in (member.denoiser(x, noise, conditioning), x0)
    )
    return (predicted - aim).square().mean()
