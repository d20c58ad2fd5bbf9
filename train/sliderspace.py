"""Finds what a model can vary about a prompt, as sliders: accelerate launch train/sliderspace.py
[config=FILE] [key=value ...]

Without arguments: eight directions of "portrait of a person" on tiny/base. SliderSpace (Gandikota et al.
2025, arXiv 2502.01639): the principal components of CLIP features of x0 over seeds and steps, and one
low-rank control that moves x0 along each.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError, entry, list_of
from controls.lora import strength
from models.evaluators import Clip
from models.sampler import Member, alone
from train import dry_run
from train.rollouts import random_point, rollouts
from train.run import Run, Training

REMEMBERED = "prompt steps batch_size gradient_accumulation_steps learning_rate trajectories seed"


@dataclass
class Config(Training):
    name: str = "space"  # of the controls, name-1 … name-n, and of the run folder
    prompt: str = "portrait of a person"  # whose variety is taken apart
    directions: int = 8  # controls to train
    trajectories: int = 64  # sampling runs whose x0 are looked at
    rank: int = 1  # of the low-rank pairs
    steps: int = 640  # optimizer steps, shared by the directions in turn
    learning_rate: float = 5e-3  # learning rate
    sample_scales: list[float] = list_of(-1.0, 0.0, 1.0)  # columns of the picture, for every seed
    sample_seeds: list[int] = list_of(11, 12)  # its seeds, side by side; a row per direction
    out: str = "runs/sliderspace"  # the run is written to out/name


@dataclass
class Space:
    """Where the control-free runs of the prompt went, and how CLIP's features of their x0 vary."""

    x: Tensor  # (N, T, C, H, W)
    features: Tensor  # (N, T, d) of x0, unit length
    directions: Tensor  # (n, d) unit length, by falling variance
    spreads: list[float]  # standard deviation of the features along each
    shares: list[float]  # of the variance that each explains


def main(cfg: Config) -> Path | None:
    """Trains and returns the run folder with one file per direction."""
    if cfg.watch:
        raise UserError(
            "watch measures by words, which directions do not have; python -m analysis.transfer measures "
            "them without"
        )
    if cfg.dry_run:
        return dry_run.show(cfg, partial(cost, cfg))
    run = Run(cfg, "sliderspace", [cfg.prompt])
    clip = Clip(run.family.card.clip, run.family.device)
    prompt = run.family.encode([cfg.prompt])
    space = explore(cfg, run, clip, prompt)
    names = [f"{cfg.name}-{k + 1}" for k in range(cfg.directions)]
    conditioning = prompt.conditional()[[0] * cfg.batch_size]
    with run.training(cfg.prompt, cfg.settings(REMEMBERED), names):
        for step in run.steps():
            k = step % cfg.directions
            for generator in run.parts(step):
                rows, level = random_point(space.x, cfg.batch_size, generator)
                x, before = (part[rows, level].to(run.family.device) for part in (space.x, space.features))
                with strength(run.net, {names[k]: 1.0}):
                    x0 = run.member.denoiser(x, run.member.levels[level], conditioning)
                    moved = clip.embed(run.family.pixels(x0)) - before
                    run.backward(astray(moved, space.directions[k], space.spreads[k]))
            run.descend(step)
        run.settle()
        for k, name in enumerate(names if run.main else []):
            more = {
                "component": k + 1,
                "variance": space.shares[k],
                "direction": [round(v, 6) for v in space.directions[k].tolist()],
            }
            run.write(run.control(name, **more), run.folder / f"{name}.safetensors")
        if run.main:
            print(f"picture of every direction across scales: {run.draw(run.folder / 'samples/final.png')}")
    return run.folder


def cost(cfg: Config, member: Member) -> dry_run.Cost:
    """Runs of which every point is seen once more, by CLIP, through the VAE, as each step is."""
    rollouts, rows = cfg.trajectories * len(member.levels), min(2 * cfg.batch_size, cfg.trajectories)
    before = cfg.trajectories * alone(member).nfe + rollouts
    together = rows * (1 if member.guidance is None else 2)
    shown = {"evaluators": ("clip",), "controls": cfg.directions}
    return dry_run.Cost(before, 3, together, rollouts, pictures=rows, learning=True, **shown)


def astray(moved: Tensor, direction: Tensor, spread: float) -> Tensor:
    """How far features moved (B, d) by a control at scale 1 are from one spread along its direction (d,).

    1 - cosine is SliderSpace's loss, which does not say how far to go: without the second term the controls
    learn to move almost nothing.
    """
    return (
        1 - F.cosine_similarity(moved, direction[None], eps=1e-4) + (moved @ direction / spread - 1).square()
    ).mean()


@torch.no_grad()
def explore(cfg: Config, run: Run, clip: Clip, prompt) -> Space:
    """Runs the member, reads its x0 at every step by CLIP, and takes the principal components of what differs
    between seeds.

    The mean of each step is taken off first, or the first component would be the step itself. Raises
    UserError for too few runs.
    """
    which = torch.zeros(cfg.trajectories, dtype=torch.long)

    def see(step, rows):
        x0 = run.member.denoiser(step.x, step.noise, prompt.conditional()[which[rows]])
        return step.x, clip.embed(run.family.pixels(x0))

    x, features = rollouts(run.family, run.member, prompt, which, cfg.seed, 2 * cfg.batch_size, see)
    apart = (features - features.mean(0)).flatten(0, 1)
    if cfg.directions > min(apart.shape):
        raise UserError(
            f"{cfg.directions} directions need as many trajectories and features; there are "
            f"{min(apart.shape)}"
        )
    _, values, directions = torch.linalg.svd(apart, full_matrices=False)
    shares = (values.square() / values.square().sum()).tolist()
    spreads = (values / len(apart) ** 0.5).tolist()
    directions = directions[: cfg.directions].to(run.family.device)
    return Space(x, features, directions, spreads[: cfg.directions], shares[: cfg.directions])


if __name__ == "__main__":
    entry(main, Config)
