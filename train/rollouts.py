"""Where a member goes by itself: what is seen at every step of sampling runs without a control, to be trained
on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.batches import Batches
from models.families import Family
from models.prompts import Prompts
from models.sampler import Member, Step, alone, draw_noise, sample

See = Callable[[Step, Tensor], tuple[Tensor, ...]]


@torch.no_grad()
def rollouts(
    family: Family, member: Member, prompts: Prompts, which: Tensor, seed: int, batch_size: int, see: See
) -> tuple[Tensor, ...]:
    """What `see(step, rows)` returns of runs `rows`, as tensors (N, T, …) on the CPU: run n of N has prompt
    which[n] and a noise of its own.
    """

    def run(rows: Tensor) -> list[Tensor]:
        noise = draw_noise(
            [seed * 100_003 + int(row) for row in rows],
            family.latent_shape,
            len(member.levels),
            family.device,
        )
        steps = [see(step, rows) for step in sample(alone(member), noise, prompts[which[rows]])]
        return [torch.stack(part, 1).cpu() for part in zip(*steps, strict=True)]

    return tuple(torch.cat(part) for part in zip(*Batches(batch_size).of(run, len(which)), strict=True))


def random_point(x: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Where in the rollouts (N, T, …) a batch is taken: some of the runs, all at one step."""
    step = int(torch.randint(x.shape[1], (1,), generator=generator))
    return torch.randint(len(x), (batch_size,), generator=generator), step
