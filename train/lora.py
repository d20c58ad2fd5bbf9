"""Trains a LoRA on pictures of one subject or style: accelerate launch train/lora.py [config=FILE] [key=value
...]

Without arguments: the watercolour style, which the embedded base has never seen, on tiny/base.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError, entry, list_of, note, quoted
from controls.lora import strength
from models.cards import card, split
from models.prompts import Prompts
from models.sampler import Member, alone
from models.tiny import world
from models.tiny.faces import STYLES, styled
from train import dry_run
from train.denoising import random_noise, squared_error
from train.pictures import read
from train.rollouts import random_point, rollouts
from train.run import Run, Training

REMEMBERED = (
    "positive negative data images token prior steps batch_size gradient_accumulation_steps learning_rate "
    "seed"
)


@dataclass
class Config(Training):
    name: str = "watercolour"  # of the control, and of the run folder
    # a folder of pictures, a dataset of the Hub, or tiny:STYLE, a held-out style of the embedded world
    data: str = "tiny:watercolour"
    images: int = 200  # pictures of the embedded world to train on
    # rare word put before half of the captions, so that the LoRA works with and without it
    token: str = "watercolour"
    prompt: str = "portrait of a person"  # caption of pictures that have none; also what the strips draw
    # what the LoRA makes: the card's words for measuring it
    positive: str = "watercolour portrait of a person"
    negative: str = "portrait of a person"  # what it departs from
    prior: float = 0.0  # weight of the prior term: the member goes on drawing `negative` as before; 0 = off
    prior_images: int = 32  # pictures of the member itself that say how
    alpha: float = 4.0  # effective strength is scale * alpha / rank
    # layer set, see controls/layers.py; xattn-strict with scope=lierla is Custom Diffusion's
    layers: str = "full"
    steps: int = 500  # optimizer steps
    sample_scales: list[float] = list_of(0.0, 0.5, 1.0)  # columns of a strip
    out: str = "runs/lora"  # the run is written to out/name


def main(cfg: Config) -> Path | None:
    """Trains and returns the path of the control."""
    if cfg.dry_run:
        return dry_run.show(cfg, partial(cost, cfg))
    images, captions = pictures(cfg, card(split(cfg.member)[0]).size_px)
    captions += [f"{cfg.token} {caption}".strip() for caption in captions]
    class_texts = [[cfg.negative]] if cfg.prior else []
    run = Run(cfg, "lora", captions, *class_texts, [cfg.prompt])
    latents = run.family.to_latents(images).cpu()
    prompts = run.family.encode(captions).conditional()
    memory = Memory(cfg, run) if cfg.prior else None
    with run.training(cfg.prompt, cfg.settings(REMEMBERED)):
        for step in run.steps():
            with strength(run.net, {cfg.name: 1.0}):
                for generator in run.parts(step):
                    loss = denoising(run.member, latents, prompts, cfg.batch_size, generator)
                    run.backward(loss + cfg.prior * memory(generator) if memory else loss)
            run.descend(step)
        return run.save()


def cost(cfg: Config, member: Member) -> dry_run.Cost:
    """Of the prior runs of the member are kept, x and x0 of every step, and each step asks once more."""
    if not cfg.prior:
        return dry_run.Cost(0, 3, kept=cfg.images, pictures=cfg.images)
    rows = min(2 * cfg.batch_size, cfg.prior_images) * (1 if member.guidance is None else 2)
    kept = cfg.images + 2 * cfg.prior_images * len(member.levels)
    return dry_run.Cost(cfg.prior_images * alone(member).nfe, 6, rows, kept, cfg.images)


def pictures(cfg: Config, size_px: int) -> tuple[Tensor, list[str]]:
    """The training images (N, 3, size_px, size_px) in [-1, 1] and their captions without the token."""
    source, _, style = cfg.data.partition(":")
    if source == "tiny":
        if style not in STYLES:
            raise UserError(f"the embedded world's held-out styles are {', '.join(STYLES)}; got {cfg.data!r}")
        people = world.faces(cfg.images, cfg.seed + 1)
        portraits = world.pictures([styled(face, style) for face in people])
        return world.to_unit(portraits), world.captions(people, cfg.seed)
    images, columns = read(cfg.data, size_px)
    if not all(columns["text"]):
        note(f"pictures without a caption are told prompt={quoted(cfg.prompt)}")
    return images, [text or cfg.prompt for text in columns["text"]]


def denoising(
    member: Member, latents: Tensor, prompts: Prompts, batch_size: int, generator: torch.Generator
) -> Tensor:
    """The plain denoising loss at one noise level; half of the captions carry the token."""
    noise = random_noise(member, generator)
    rows = torch.randint(len(latents), (batch_size,), generator=generator)
    captions = rows + len(latents) * torch.randint(2, (batch_size,), generator=generator)
    eps = torch.randn((batch_size, *latents.shape[1:]), generator=generator)
    x0, eps = (part.to(prompts.tokens.device) for part in (latents[rows], eps))
    x = noise.alpha * x0 + noise.sigma * eps
    return squared_error(member, x, noise, prompts[captions], x0)


class Memory:
    """What the member itself draws for the class: the x of its own sampling runs, and what it saw there.

    Prior preservation as in DreamBooth (Ruiz et al. 2023), told by the network's own outputs instead of by
    noise: on a few-step student the plain loss would teach the mean of all pictures at the first step, where
    the student draws one.
    """

    def __init__(self, cfg: Config, run: Run):
        self.member, self.batch_size, prompt = run.member, cfg.batch_size, run.family.encode([cfg.negative])
        self.prompt, which = prompt.conditional(), torch.zeros(cfg.prior_images, dtype=torch.long)

        def seen(step, rows):
            return (step.x, self.member.denoiser(step.x, step.noise, self.prompt[which[rows]]))

        self.x, self.x0 = rollouts(
            run.family, run.member, prompt, which, cfg.seed, 2 * cfg.batch_size, seen
        )  # (N, T, C, H, W)

    def __call__(self, generator: torch.Generator) -> Tensor:
        """The mean squared change at one of the member's own noise levels."""
        rows, step = random_point(self.x, self.batch_size, generator)
        noise, prompts = self.member.levels[step], self.prompt[[0] * self.batch_size]
        x, x0 = (part[rows, step].to(prompts.tokens.device) for part in (self.x, self.x0))
        return squared_error(self.member, x, noise, prompts, x0)


if __name__ == "__main__":
    entry(main, Config)
