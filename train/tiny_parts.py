"""What the parts of the embedded family share: their config, the log of their losses, one optimizer step."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from train.checkpoint import append, resumable, seeded

WEIGHTS = "models/tiny/weights"


@dataclass
class Config:
    steps: int = 0  # optimizer steps; 0 = the part's own number
    batch_size: int | None = None  # images per step; null = the part's own number
    seed: int = 0  # of weights, data and noise
    faces: int = 20000  # portraits in the training set
    trajectories: int = 1280  # of the teacher, which lightning learns from; a multiple of 80
    # guidance of dmd's teacher, for a student work/dmd-g… beside the family's own; null = dmd itself
    teacher_guidance: float | None = None
    every: int = 250  # steps between checkpoints
    threads: int = 0  # CPU threads; 0 = all
    # torch.compile the networks: about twice as fast, after minutes of compiling; needs a C++ compiler
    compile: bool = False
    device: str = "cpu"  # where the students are trained; the other parts are trained on the CPU
    work: str = "runs/tiny"  # folder of checkpoints and logs
    weights: str = WEIGHTS  # where the finished parts go


class Log:
    """The losses every 25 steps with the seconds since the start, a JSON line each in work/PART.jsonl."""

    def __init__(self, cfg: Config, part: str):
        self.path, self.start = Path(cfg.work) / f"{part}.jsonl", time.time()

    def __call__(self, step: int, **values: Tensor) -> None:
        if step % 25 == 0:
            shown = {key: round(value.item(), 5) for key, value in values.items()}
            append(self.path, {"step": step, "seconds": round(time.time() - self.start, 1), **shown})


class Fit:
    """A part in training, by AdamW over one cycle of learning rates; it can be killed and goes on.

    slow: of the average, a copy of the network that follows its weights, at most by 1 - slow a step; None =
    there is none.
    """

    def __init__(
        self,
        cfg: Config,
        part: str,
        net: nn.Module,
        steps: int,
        learning_rate: float,
        warmup: float = 0.1,
        beta: float = 0.999,
        decay: float = 0.0,
        slow: float | None = None,
    ):
        self.cfg, self.part, self.net, self.total = cfg, part, net, steps
        self.slow, self.log, self.step = slow, Log(cfg, part), 0
        self.average = None if slow is None else shadow(net)
        self.optimizer = torch.optim.AdamW(
            net.parameters(), learning_rate, betas=(0.9, beta), weight_decay=decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, steps, pct_start=warmup
        )

    def steps(self, *salt: int) -> Iterator[torch.Generator]:
        """A generator for each step that is left."""
        state = {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}
        if self.average is not None:
            state["average"] = self.average
        path = Path(self.cfg.work) / f"{self.part}.pt"
        for step in resumable(path, state, self.total, self.cfg.every, self.part):
            self.step = step
            yield seeded(self.cfg.seed, step, *salt)

    def learn(self, loss: Tensor, **shown: Tensor) -> None:
        """One optimizer step. shown: what the log keeps; the loss where nothing is given."""
        step_down(loss, self.net, self.optimizer, self.schedule)
        if self.average is not None:
            follow(self.average, self.net, min(self.slow, self.step / (self.step + 20)))
        self.log(self.step, **(shown or {"loss": loss}))


def fast(net, cfg: Config):
    return torch.compile(net) if cfg.compile else net


def shadow(net: nn.Module) -> nn.Module:
    """A copy whose weights follow the network's, or stay."""
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def follow(average, net, decay: float) -> None:
    """One step of the exponential moving average of the weights."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


def step_down(loss, net, optimizer, schedule, clip: float = 1.0) -> None:
    """One optimizer step with the gradient's norm clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    schedule.step()
