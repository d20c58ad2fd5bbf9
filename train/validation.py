"""A control in training: pictures of it, and how it acts on other members of its family."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from controls import intervals
from controls.effect import change
from controls.lora import Control, fused, strength
from controls.show import sheet
from models.evaluators import chosen, load_evaluators
from models.families import Family, FamilyCard, split
from models.prompts import Prompts
from models.sampler import Member

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


def strip(family: Family, member: Member, prompt: Prompts, cfg, names: Sequence[str], path: Path) -> None:
    """Writes a picture of attached controls: of one, its seeds in rows and its scales in columns; of several,
    a row each, the scales of every seed in columns.
    """
    seeds, scales = cfg.sample_seeds, cfg.sample_scales
    shown = [pictures(family, member, prompt, seeds, name, scales) for name in names]
    if len(names) == 1:
        rows = [(f"seed {seed}", scales, row) for seed, row in zip(seeds, shown[0], strict=True)]
    else:
        rows = [
            (name, scales * len(seeds), grid.flatten(0, 1)) for name, grid in zip(names, shown, strict=True)
        ]
    sheet(rows, path)


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
            at_source = self.effect(plain, self.score(self.source))
        values = {f"effect/{self.source.name}": float(at_source[..., -1].mean())}
        for member in self.others:
            shared = member.denoiser.net is net  # as of a base with its LoRA students
            with (
                strength(net, {control.card.name: 1.0})
                if shared
                else fused(member.denoiser.net, control, 1.0, self.family.card.name)
            ):
                at_member = self.effect(self.plain[member.name], self.score(member))
            retained = intervals.ratio(*(intervals.units(at[..., -1]) for at in (at_member, at_source)))
            values[f"effect/{member.name}"] = float(at_member[..., -1].mean())
            values |= {f"retention/{member.name}/{end}": value for end, value in retained.items()}
        return values

    def score(self, member: Member) -> np.ndarray:
        """How much more the images are the positive than the negative description, (P, S)."""
        images = self.family.draw(member, self.prompts, [9000 + k for k in range(len(self.prompts))])
        return self.evaluator.score(self.evaluator.features(images), *self.words).reshape(-1, SEEDS)

    def effect(self, plain: np.ndarray, edited: np.ndarray) -> np.ndarray:
        return change(np.stack([plain, edited], -1), 0)
