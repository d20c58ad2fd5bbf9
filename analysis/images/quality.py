"""What images are compared with and how well they do: real pictures, captions, Fréchet, Inception-style,
CLIP, neighbours, by blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.measures.image_sets import PRDC, InceptionScore, Moments
from configs import UserError, note
from controls import intervals
from models import picture_folders, promptsets
from models.evaluators import Evaluator
from models.families import FamilyCard
from models.pictures import SUFFIXES, check, load, square
from models.promptsets import PromptSet
from models.tiny import world

REAL = 600  # pictures of a known world to compare with
Batches = Callable[[], Iterator[Tensor]]  # real pictures (B, 3, H, W) in [-1, 1], batch by batch


def against(
    card: FamilyCard, reference: str, chosen: list[str], prompts: list[str], captions: int, k: int
) -> tuple[PromptSet, Batches | None]:
    """What the images are told, and the real pictures to compare them with; None where there are none.

    reference: a folder of pictures, or "" for the world's own where it is known. Images are told what is
    chosen, else the captions of the folder's pictures, or of the world, else the prompts. k: neighbours that
    a picture must have. Raises UserError for a folder with too few pictures.
    """
    prompts, real = promptsets.read(chosen or prompts), None
    if reference:
        folder = picture_folders.read(reference)
        files, captions_beside = folder.files, [caption for caption in folder.captions if caption]
        if len(files) <= k:
            raise UserError(
                f"reference={reference} must hold more than {k} pictures ({', '.join(SUFFIXES)}); it has "
                f"{len(files)}"
            )
        for file in files:
            check(file)  # before hours of drawing
        note(folder.report)
        if captions_beside and not chosen:
            prompts = PromptSet(captions_beside)

        def real():
            return (opened(files[i : i + 32], card.size_px) for i in range(0, len(files), 32))
    elif card.probe:  # a world whose truth is known can be asked for its own pictures
        if not chosen:
            prompts = PromptSet(world.captions(world.faces(captions, 558), 558))

        def real():
            return (world.to_unit(part) for part in world.pictures(world.faces(REAL, 559)).split(100))

    return cycled(prompts, captions), real


def cycled(prompts: PromptSet, n: int) -> PromptSet:
    """n of the texts, over and over, each time with other seeds."""
    turns = [divmod(i, len(prompts.texts)) for i in range(n)]
    return PromptSet(
        [prompts.texts[k] for _, k in turns], prompts.seeds and [prompts.seeds[k] + turn for turn, k in turns]
    )


def opened(files: list[Path], size_px: int) -> Tensor:
    """The middles of picture files, (B, 3, size_px, size_px) in [-1, 1].

    Raises UserError for one that cannot be read.
    """
    return torch.stack([square(load(file), size_px) for file in files])


@dataclass
class Tally:
    """What is kept of a set of images: sums, and for recall a bounded number of features.

    Two tallies add up.
    """

    sharp: InceptionScore
    agreement: Moments  # of the similarity to the caption
    moments: dict[str, Moments]  # per evaluator
    near: dict[str, PRDC]

    def __add__(self, other: "Tally") -> "Tally":
        moments, near = (
            {name: a[name] + b[name] for name in a}
            for a, b in ((self.moments, other.moments), (self.near, other.near))
        )
        return Tally(self.sharp + other.sharp, self.agreement + other.agreement, moments, near)


class Judge:
    """The quality numbers of images, from their features per evaluator and their captions' CLIP `words`."""

    def __init__(self, evaluators: dict[str, Evaluator], labels: list[str], real: Batches | None, k: int):
        """labels: classes of the Inception-style score, told apart by CLIP. k: neighbours."""
        self.labels, self.heat = (
            evaluators["clip"].texts(labels),
            evaluators["clip"].model.logit_scale.exp().item(),
        )
        found: dict[str, list] = {name: [] for name in evaluators}
        for batch in real() if real else ():
            for name, evaluator in evaluators.items():
                found[name].append(evaluator.features(batch))
        self.real = {name: PRDC(np.concatenate(parts), k) for name, parts in found.items() if parts}
        self.moments = {name: Moments().add(near.reference) for name, near in self.real.items()}

    def tally(self) -> Tally:
        """An empty one."""
        near = {name: PRDC(one.reference, one.k, radii=one.radii) for name, one in self.real.items()}
        return Tally(InceptionScore(), Moments(), {name: Moments() for name in self.real}, near)

    def add(self, tally: Tally, block: dict[str, np.ndarray]) -> None:
        """Adds a block: features (n, d) per evaluator, words (n, d)."""
        tally.sharp.add(softmax(self.heat * block["clip"] @ self.labels.T))
        tally.agreement.add((block["clip"] * block["words"]).sum(1, keepdims=True))
        for name in self.real:
            tally.moments[name].add(block[name])
            tally.near[name].add(block[name])

    def numbers(self, tally: Tally) -> dict[str, float]:
        """Inception-style score, CLIP score; per evaluator Fréchet distance, precision, recall, density,
        coverage.
        """
        found = {"inception": tally.sharp.score(), "clip": 100 * float(tally.agreement.mean[0])}
        for name, moments in tally.moments.items():
            scores = {"frechet": moments.frechet(self.moments[name]), **tally.near[name].scores()}
            found |= {f"{key}_{name}": float(value) for key, value in scores.items()}
        return found

    def jackknife(self, tallies: list[Tally]) -> dict[str, dict]:
        """The numbers of all tallies together, with 95 % intervals from leaving out one after the other."""
        whole = self.numbers(reduce(add, tallies))
        without = [self.numbers(reduce(add, tallies[:i] + tallies[i + 1 :])) for i in range(len(tallies))]
        return {
            name: intervals.jackknife(value, [left[name] for left in without])
            for name, value in whole.items()
        }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    likely = np.exp(logits - logits.max(-1, keepdims=True))
    return likely / likely.sum(-1, keepdims=True)
