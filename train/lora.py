"""Trains a LoRA on pictures of one subject or style: accelerate launch train/lora.py [config=FILE] [key=value ...]

Without arguments: the watercolour style, which the embedded base has never seen, on tiny/base.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError, entry, load
from controls.lora import strength
from models.noise import LAWS, TRAIN_STEPS, to_eps
from models.prompts import Prompts
from models.sample import Member
from models.tiny import world
from models.tiny.faces import STYLES, styled
from train.run import Run, Training


@dataclass
class Config(Training):
    name: str = "watercolour"  # of the control, and of the run folder
    data: str = "tiny:watercolour"  # tiny:STYLE, a held-out style of the embedded world
    images: int = 200  # pictures to train on
    positive: str = "watercolour portrait of a person"  # what the LoRA makes: the card's words for measuring it
    negative: str = "portrait of a person"  # what it departs from
    token: str = "watercolour"  # put before half of the captions, so that the LoRA works with and without it
    alpha: float = 4.0  # effective strength is scale * alpha / rank
    layers: str = "full"  # layer set, see controls/targets.py
    steps: int = 500  # optimizer steps
    sample_scales: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])  # columns of a strip
    prompt: str = "portrait of a person"  # of the strips
    out: str = "runs/lora"  # the run is written to out/name


def main(cfg: Config) -> Path:
    """Trains and returns the path of the control."""
    images, captions = pictures(cfg)
    run = Run(cfg, "lora")
    latents = run.family.to_latents(images)
    prompts = run.family.encode([*captions, *(f"{cfg.token} {caption}" for caption in captions)]).conditional()
    with run.training(cfg.prompt):
        for step in run.steps():
            with strength(run.net, {cfg.name: 1.0}):
                for generator in run.parts(step):
                    run.backward(denoising(run.member, latents, prompts, cfg.batch, generator))
            run.descend(step)
        kept = ("positive", "negative", "data", "images", "token", "steps", "batch", "accumulate", "rate", "seed")
        return run.save({key: getattr(cfg, key) for key in kept})


def pictures(cfg: Config) -> tuple[Tensor, list[str]]:
    """The training images (N, 3, 64, 64) in [-1, 1] and their captions without the token."""
    source, _, style = cfg.data.partition(":")
    if source != "tiny" or style not in STYLES:
        raise UserError(f"data is tiny:STYLE with STYLE one of {', '.join(STYLES)}; got {cfg.data!r}")
    people = world.faces(cfg.images, cfg.seed + 1)
    captions = world.captions(people, cfg.seed)
    return world.to_unit(world.pictures([styled(face, style) for face in people])), captions


def denoising(member: Member, latents: Tensor, prompts: Prompts, batch: int, generator: torch.Generator) -> Tensor:
    """The plain denoising loss at one noise level, eps against eps; half of the captions carry the token."""
    noise = LAWS[member.law][0](float(torch.randint(1, TRAIN_STEPS, (1,), generator=generator)))
    rows = torch.randint(len(latents), (batch,), generator=generator)
    told = rows + len(latents) * torch.randint(2, (batch,), generator=generator)
    eps = torch.randn((batch, *latents.shape[1:]), generator=generator).to(latents)
    x = noise.alpha * latents[rows] + noise.sigma * eps
    return (to_eps(x, member.denoiser(x, noise, prompts[told]), noise) - eps).square().mean()


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
