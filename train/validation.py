"""A control in training: pictures of it, and how it acts on other members of its family."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from controls import retention
from controls.effect import change
from controls.lora import Control, fused, strength
from controls.show import sheet
from models.evaluators import chosen, load_evaluators
from models.families import Family, FamilyCard, split
from models.prompts import Prompts
from models.sampler import Member

SCALES = np.array([0.0, 1.0])  # at which others are watched
SEEDS = 2  # images per prompt


@torch.no_grad()
def pictures(
    family: Family, member: Member, prompt: Prompts, seeds: list[int], control: str, scales: list[float]
) -> Tensor:
    """What a member draws with an attached control: one prompt, (S seeds, K scales, 3, H, W) in [-1, 1]."""
    columns = []
    for scale in scales:
        with strength(member.denoiser.net, {control: scale}):
            columns.append(family.draw(member, prompt[[0] * len(seeds)], seeds))
    return torch.stack(columns, 1)


def strip(
    family: Family,
    member: Member,
    prompt: Prompts,
    seeds: list[int],
    control: str,
    scales: list[float],
    path: Path,
) -> Path:
    """Writes a picture of an attached control: seeds in rows, scales in columns. Returns its path."""
    shown = pictures(family, member, prompt, seeds, control, scales)
    return sheet([(f"seed {seed}", scales, row) for seed, row in zip(seeds, shown, strict=True)], path)


def overview(
    family: Family,
    member: Member,
    prompt: Prompts,
    seeds: list[int],
    names: list[str],
    scales: list[float],
    path: Path,
) -> Path:
    """Writes one picture of several attached controls: a row each, the scales of every seed in columns.

    Returns its path.
    """
    rows = [
        (name, scales * len(seeds), pictures(family, member, prompt, seeds, name, scales).flatten(0, 1))
        for name in names
    ]
    return sheet(rows, path)


def watched_by(cfg, card: FamilyCard) -> list[str]:
    """The prompts of watched members, one per image."""
    return [prompt for prompt in card.prompts[: cfg.watch_prompts] for _ in range(SEEDS)]


class Watch:
    """Draws a few paired images with and without the control on the member it is trained on and on others,
    and measures its effect.
    """

    def __init__(self, cfg, family: Family, source: Member, recipe: dict):
        """Loads the watched members, encodes their prompts. Raises UserError for what cannot be watched."""
        self.family, self.source = family, source
        self.words = recipe.get("positive", ""), recipe.get("negative", "")
        if not all(self.words):
            raise UserError("watch measures by words: give positive=… and negative=…")
        others = [split(name) for name in cfg.watch]
        strange = [f"{other}/{name}" for other, name in others if other != split(cfg.member)[0]]
        if strange:
            raise UserError(f"watch takes members of the family {family.card.name}; got {', '.join(strange)}")
        self.others = [
            family.member(name) for _, name in others if f"{family.card.name}/{name}" != source.name
        ]
        (self.evaluator,) = load_evaluators(family.card, family.device, chosen(family.card)[:1]).values()
        texts = watched_by(cfg, family.card)
        if not texts:
            raise UserError(f"the card of family {family.card.name} has no prompts to watch by")
        self.prompts = family.encode(texts)
        self.plain = {member.name: self.score(member) for member in self.others}

    def __call__(self, control: Control) -> dict[str, float | None]:
        """The effect at scale 1 on every member, the retention on the others: retention/tiny/dmd/value."""
        net = self.source.denoiser.net
        with strength(net):
            plain = self.score(self.source)
        with strength(net, {control.card.name: 1.0}):
            here = self.effect(plain, self.score(self.source))
        found = {f"effect/{self.source.name}": float(here[..., -1].mean())}
        for member in self.others:
            shared = member.denoiser.net is net  # as of a base with its LoRA students
            with (
                strength(net, {control.card.name: 1.0})
                if shared
                else fused(member.denoiser.net, control, 1.0, self.family.card.name)
            ):
                there = self.effect(self.plain[member.name], self.score(member))
            kept = retention.retention(here, there, SCALES)
            found[f"effect/{member.name}"] = float(there[..., -1].mean())
            found |= {f"retention/{member.name}/{end}": value for end, value in kept.items()}
        return found

    def score(self, member: Member) -> np.ndarray:
        """How much more the images are the positive than the negative description, (P, S)."""
        images = self.family.draw(member, self.prompts, [9000 + k for k in range(len(self.prompts))])
        return self.evaluator.score(self.evaluator.features(images), *self.words).reshape(-1, SEEDS)

    def effect(self, plain: np.ndarray, edited: np.ndarray) -> np.ndarray:
        return change(np.stack([plain, edited], -1), 0)
