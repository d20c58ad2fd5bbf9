"""Trains a Concept Slider from text on any member of a family: accelerate launch train/slider.py
[config=FILE] [key=value ...]

Without arguments: the smile slider on tiny/base, in some minutes on a CPU. Ends with a strip of faces across
scales.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import UserError, entry, list_of, note, quoted
from controls.lora import strength
from models.families import Family, split
from models.noise import Noise, loss_target
from models.prompts import Prompts
from models.sampler import Member, Plan, Stage, alone, draw_noise, finish
from train import dry_run
from train.rollouts import random_point, rollouts
from train.run import Run, Training


@dataclass
class Pair:
    """One prompt pair of the published format: what to move, and between which two ends.

    An empty text is the empty prompt.
    """

    target: str = ""  # the prompt the slider acts on
    positive: str = ""  # what more of it is
    unconditional: str = ""  # what less of it is
    neutral: str | None = None  # where the movement starts; null, or not given, = the target
    action: str = "enhance"  # enhance: + is towards positive; erase: the other way round
    # what other trainers read from such a file, see OTHERS
    guidance_scale: Any = None
    resolution: Any = None
    batch_size: Any = None
    dynamic_resolution: Any = None
    dynamic_crops: Any = None

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Target, positive, unconditional and neutral."""
        neutral = self.target if self.neutral is None else self.neutral
        return self.target, self.positive, self.unconditional, neutral


REMEMBERED = (
    "recipe guidance_scale steps batch_size gradient_accumulation_steps learning_rate trajectories seed "
    "attributes anchors"
)
OTHERS = {  # keys of a published prompt file, and what they are here
    "guidance_scale": "one guidance_scale for all pairs",
    "batch_size": "one batch_size for all pairs",
    "resolution": "the family's size_px",
    "dynamic_resolution": "nothing",
    "dynamic_crops": "nothing",
}


def smile() -> list[Pair]:
    who = ["a person", "a young person", "an old person"]
    return [Pair(f"portrait of {w}", f"portrait of {w}, smiling", f"portrait of {w}, frowning") for w in who]


@dataclass
class Config(Training):
    name: str = "smile"  # of the control, and of the run folder
    prompts: list[Pair] = field(default_factory=smile)  # target, positive, unconditional, neutral, action
    attributes: list[str] = list_of()  # put before all four prompts, one after the other, to disentangle
    anchors: list[str] = list_of()  # prompts whose pictures must not change
    # g of the objective: how far one unit of scale goes; the published trainer says 4
    guidance_scale: float = 0.75
    steps: int = 500  # optimizer steps
    # fast: points of control-free runs, both sides in turn; published: a fresh run every step, + side only
    recipe: str = "fast"
    trajectories: int = 32  # fast: control-free sampling runs whose x_t are trained on
    # published: length of the sampling run whose x_t is trained on; students keep their own
    denoise_steps: int = 50
    denoise_guidance: float = 3.0  # published: its guidance; students have none
    out: str = "runs/slider"  # the run is written to out/name


def main(cfg: Config) -> Path | None:
    """Trains and returns the path of the control."""
    if cfg.recipe not in RECIPES:
        raise UserError(f"no recipe {cfg.recipe!r}; there are {', '.join(RECIPES)}")
    pairs = spread(cfg)
    if cfg.dry_run:
        return dry_run.show(cfg, lambda member: RECIPES[cfg.recipe].cost(cfg, member))
    differing(cfg, pairs)
    run = Run(cfg, "slider", taught(pairs), [pair.target for pair in pairs])
    lesson = RECIPES[cfg.recipe](cfg, run.family, run.member, pairs)
    with run.training(cfg.prompts[0].target, recipe(cfg)):
        for step in run.steps():
            side = 1 if cfg.recipe == "published" else 1 - 2 * (step % 2)
            for generator in run.parts(step):
                x, noise, conditioning, neutral, direction = lesson(generator)
                with strength(run.net, {cfg.name: float(side)}):
                    x0 = run.member.denoiser(x, noise, conditioning)
                    seen = loss_target(x, x0, noise, run.member.noise_schedule)
                    # Concept Sliders, Gandikota et al. 2023, eq. 8, on both sides of zero
                    run.backward((seen - neutral - side * cfg.guidance_scale * direction).square().mean())
            run.descend(step)
        return run.save()


def spread(cfg: Config) -> list[Pair]:
    """Every pair with every attribute in front, the neutral prompt filled in; an anchor is a pair without a
    direction.

    Says which keys of other trainers are not used. Raises UserError for a pair without two ends, or when
    there is none.
    """
    pairs = []
    for number, pair in enumerate(cfg.prompts, 1):
        if not pair.positive.strip() or pair.positive == pair.unconditional:
            ends = f"got {quoted(pair.positive, 40)} and {quoted(pair.unconditional, 40)}"
            raise UserError(
                f"prompt pair {number} needs a positive text, and an unconditional one that differs from "
                f"it; {ends}"
            )
        if pair.action not in ("enhance", "erase"):
            raise UserError(f"prompt pair {number}: action is enhance or erase, got {quoted(pair.action)}")
        for attribute in cfg.attributes or [""]:
            pairs.append(Pair(*(f"{attribute} {text}".strip() for text in pair.texts), pair.action))
    if not pairs:
        raise UserError(
            "a slider needs at least one prompt pair: prompts=[{target: …, positive: …, unconditional: …}]"
        )
    given = {
        f"{key}={getattr(pair, key)}": meaning
        for pair in cfg.prompts
        for key, meaning in OTHERS.items()
        if getattr(pair, key) is not None
    }
    if given:
        note(
            "the prompts say "
            + ", ".join(f"{quoted(key)} (here: {meaning})" for key, meaning in given.items())
            + ", which is not read there"
        )
    return pairs + [Pair(anchor, anchor, anchor, anchor) for anchor in cfg.anchors]


def differing(cfg: Config, pairs: list[Pair]) -> None:
    """Raises UserError for a pair whose ends are the same to the text encoders: cut off, or words that they
    do not know.
    """
    family = Family(split(cfg.member)[0])
    for pair in pairs[: len(pairs) - len(cfg.anchors)]:
        family.tell_apart(pair.positive, pair.unconditional)


def recipe(cfg: Config) -> dict:
    """What the card remembers: the words that say what the slider does, and how it was trained."""
    first = cfg.prompts[0]
    ends = [first.positive, first.unconditional]
    if first.action != "enhance":
        ends.reverse()
    texts = [
        {key: text or "" for key, text in asdict(pair).items() if key not in OTHERS} for pair in cfg.prompts
    ]
    return {"positive": ends[0], "negative": ends[1], "prompts": texts, **cfg.settings(REMEMBERED)}


Lesson = tuple[
    Tensor, Noise, Prompts, Tensor, Tensor
]  # x, its noise level, target prompts, neutral, direction; tensors (B, C, H, W)


def taught(pairs: list[Pair]) -> list[str]:
    """What the teacher is asked, three prompts per pair."""
    return [text for pair in pairs for text in (pair.neutral, pair.positive, pair.unconditional)]


class Teacher:
    """The member without the control, asked for three prompts in one batch."""

    def __init__(self, family: Family, member: Member, pairs: list[Pair]):
        self.member = member
        self.sign = torch.tensor(
            [1.0 if pair.action == "enhance" else -1.0 for pair in pairs], device=family.device
        )[:, None, None, None]
        self.texts = family.encode(taught(pairs)).conditional()

    @torch.no_grad()
    def __call__(self, x: Tensor, noise, which: Tensor) -> tuple[Tensor, Tensor]:
        """The neutral eps (v of a flow) and the direction, positive minus unconditional, at x (B, C, H, W)
        for pairs `which` (B,).
        """
        # neutral of all rows, then positive, then unconditional
        texts = (which * 3 + torch.arange(3)[:, None]).flatten()
        x = x.repeat(3, 1, 1, 1)
        x0 = self.member.denoiser(x, noise, self.texts[texts])
        neutral, positive, negative = loss_target(x, x0, noise, self.member.noise_schedule).chunk(3)
        return neutral, (positive - negative) * self.sign[which]


class Fast:
    """Lessons from control-free runs: x_t then does not depend on the weights, so one run of T steps gives T
    points, taught once.
    """

    @staticmethod
    def cost(cfg: Config, member: Member) -> dry_run.Cost:
        """Rollouts whose every point is taught by the teacher's three; x, neutral and direction are kept."""
        rollouts, rows = cfg.trajectories * len(member.levels), 3 * min(2 * cfg.batch_size, cfg.trajectories)
        return dry_run.Cost(cfg.trajectories * alone(member).nfe + 3 * rollouts, 3, rows, 3 * rollouts)

    def __init__(self, cfg: Config, family: Family, member: Member, pairs: list[Pair]):
        self.cfg, self.levels, self.device = cfg, member.levels, family.device
        teacher = Teacher(family, member, pairs)
        self.which = torch.arange(cfg.trajectories) % len(pairs)
        prompts = family.encode([pair.target for pair in pairs])
        self.targets = prompts.conditional()

        def see(step, rows):
            return (step.x, *teacher(step.x, step.noise, self.which[rows]))

        # all (N, T, C, H, W), on the CPU, as everywhere what is trained on
        self.x, self.neutral, self.direction = rollouts(
            family, member, prompts, self.which, cfg.seed, 2 * cfg.batch_size, see
        )

    def __call__(self, generator: torch.Generator) -> Lesson:
        rows, step = random_point(self.x, self.cfg.batch_size, generator)
        seen = self.x, self.neutral, self.direction
        x, neutral, direction = (part[rows, step].to(self.device) for part in seen)
        return x, self.levels[step], self.targets[self.which[rows]], neutral, direction


class Published:
    """Lessons as the published trainer makes them: a fresh run from noise, control on, stopped after 1 … T -
    1 of its T steps.

    Unlike there, the network is told the timestep at which the run really stopped, not one up to 19 steps
    away.
    """

    @staticmethod
    def cost(cfg: Config, member: Member) -> dry_run.Cost:
        """Per latent and step half a run, the teacher's three, the student's pass and back."""
        run = 2 * cfg.denoise_steps if member.guidance is not None else len(member.levels)
        return dry_run.Cost(0, run / 2 + 3 + 3, 3 * cfg.batch_size)

    def __init__(self, cfg: Config, family: Family, member: Member, pairs: list[Pair]):
        self.cfg, self.family, self.teacher = cfg, family, Teacher(family, member, pairs)
        self.prompts = family.encode([pair.target for pair in pairs])
        if member.guidance is not None:
            member = replace(
                member, levels=member.in_steps(cfg.denoise_steps, "leading"), guidance=cfg.denoise_guidance
            )
        if len(member.levels) < 2:
            raise UserError(
                "recipe=published stops before the last step, so it needs at least two; give "
                "denoise_steps, or recipe=fast"
            )
        self.member = member

    @torch.no_grad()
    def __call__(self, generator: torch.Generator) -> Lesson:
        stop = int(torch.randint(1, len(self.member.levels), (1,), generator=generator))
        which = torch.randint(len(self.prompts), (1,), generator=generator).expand(self.cfg.batch_size)
        seeds = torch.randint(2**62, (self.cfg.batch_size,), generator=generator).tolist()
        noise = draw_noise(seeds, self.family.latent_shape, stop, self.family.device)
        level = self.member.levels[stop]
        partial = Plan("partial", (Stage(replace(self.member, final=level), self.member.levels[:stop]),))
        with strength(self.member.denoiser.net, {self.cfg.name: 1.0}):
            x = finish(partial, noise, self.prompts[which])
        with strength(self.member.denoiser.net):
            return x, level, self.prompts[which].conditional(), *self.teacher(x, level, which)


RECIPES = {"fast": Fast, "published": Published}


if __name__ == "__main__":
    entry(main, Config)
