"""A base and a student whose networks answer at once, and prompts for them."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from models.prompts import Prompts
from models.sampler import Denoiser, Member, levels_of

LEVELS = levels_of("vp", "", 0, [999, 749, 499, 249])


class Echo(torch.nn.Module):
    """Answers with a share of its input plus the first number of its prompt."""

    def __init__(self, share: float):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(share), requires_grad=False)

    def forward(self, x, t, tokens, added_cond_kwargs):
        return SimpleNamespace(sample=self.share * x + tokens[:, 0, 0].reshape(-1, 1, 1, 1))


def toys(eta: float = 1.0, start: str = "unit") -> tuple[Member, Member]:
    base = Member("toy/base", Denoiser(Echo(0.9)), levels_of("vp", "trailing", 10), guidance=3.0)
    student = Member("toy/student", Denoiser(Echo(0.6)), LEVELS, eta=eta, start=start, teacher_guidance=8.0)
    return base, student


def prompts(batch: int = 2) -> Prompts:
    plain = Prompts(
        torch.linspace(0, 1, 12 * batch).reshape(batch, 3, 4), torch.ones(batch, 4), torch.zeros(batch, 6)
    )
    return replace(plain, negative=replace(plain, tokens=torch.zeros(batch, 3, 4)))
