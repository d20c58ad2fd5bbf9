"""What images are compared with and how well they do: real pictures, captions, Fréchet, Inception-style, CLIP, neighbours, by blocks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from analysis.metrics import Moments, Neighbours, Sharpness, Z
from configs import UserError
from models.evaluators import Evaluator
from models.families import FamilyCard
from models.tiny import world

REAL = 600  # pictures of a known world to compare with
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Batches = Callable[[], Iterator[Tensor]]  # real pictures (B, 3, H, W) in [-1, 1], batch by batch


def against(card: FamilyCard, reference: str, prompts: list[str], captions: int, k: int) -> tuple[list[str], Batches | None]:
    """What the images are told, and the real pictures to compare them with; None where there are none.

    reference: a folder of pictures, with captions in .txt files beside them, or "" for the world's own where it is known. k: neighbours
    that a picture must have. Raises UserError for a folder with too few pictures.
    """
    if reference:
        files = sorted(path for path in Path(reference).glob("*") if path.suffix.lower() in SUFFIXES)
        if len(files) <= k:
            raise UserError(f"reference={reference} must hold more than {k} pictures ({', '.join(SUFFIXES)}); it has {len(files)}")
        words = [path.with_suffix(".txt") for path in files if path.with_suffix(".txt").is_file()]
        told = [path.read_text(encoding="utf-8").strip() for path in words] or prompts
        return cycled(told, captions), lambda: (opened(files[i : i + 32], card.size_px) for i in range(0, len(files), 32))
    if card.probe:  # a world whose truth is known can be asked for its own pictures
        people = world.faces(captions, 558)
        return world.captions(people, 558), lambda: (world.to_unit(part) for part in world.pictures(world.faces(REAL, 559)).split(100))
    return cycled(prompts, captions), None


def cycled(texts: list[str], n: int) -> list[str]:
    """n of the texts, over and over."""
    return [texts[i % len(texts)] for i in range(n)]


def opened(files: list[Path], size_px: int) -> Tensor:
    """The middles of picture files, (B, 3, size_px, size_px) in [-1, 1]. Raises UserError for one that cannot be read."""
    rows = []
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (size_px, size_px), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{file} is not a picture that can be read: {str(error)[:100]}") from None
        rows.append(torch.from_numpy(np.array(fitted)))
    return world.to_unit(torch.stack(rows).permute(0, 3, 1, 2))


class Judge:
    """The quality numbers of blocks of images. A block is a dict of features per evaluator, and of its captions' CLIP `words`."""

    def __init__(self, eyes: dict[str, Evaluator], labels: list[str], real: Batches | None, k: int):
        """labels: classes of the Inception-style score, told apart by CLIP. k: neighbours."""
        self.labels, self.heat = eyes["clip"].texts(labels), eyes["clip"].model.logit_scale.exp().item()
        self.real = {name: np.concatenate([eye.features(batch) for batch in real()]) for name, eye in eyes.items()} if real else {}
        self.moments = {name: Moments().add(features) for name, features in self.real.items()}
        self.neighbours = {name: Neighbours(features, k) for name, features in self.real.items()}

    def numbers(self, blocks: list[dict]) -> dict[str, float]:
        """Inception-style score, CLIP score; per evaluator Fréchet distance, precision, recall, density, coverage."""
        sharp, agreement = Sharpness(), np.concatenate([(block["clip"] * block["words"]).sum(1) for block in blocks])
        for block in blocks:
            sharp.add(softmax(self.heat * block["clip"] @ self.labels.T))
        found = {"inception": sharp.score(), "clip": 100 * float(agreement.mean())}
        for name, features in self.real.items():
            moments, near = Moments(), Neighbours(features, self.neighbours[name].k, radii=self.neighbours[name].radii)
            for block in blocks:
                moments.add(block[name])
                near.add(block[name])
            found |= {f"{key}_{name}": value for key, value in {"frechet": moments.frechet(self.moments[name]), **near.scores()}.items()}
        return found

    def __call__(self, blocks: list[dict]) -> dict[str, dict]:
        """Each number with a 95 % interval from the jackknife over blocks."""
        value, n = self.numbers(blocks), len(blocks)
        without = [self.numbers(blocks[:i] + blocks[i + 1 :]) for i in range(n)]
        errors = {name: ((n - 1) ** 2 / n * np.var([w[name] for w in without], ddof=1)) ** 0.5 for name in value}
        return {name: {"value": v, "low": v - Z * errors[name], "high": v + Z * errors[name]} for name, v in value.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    likely = np.exp(logits - logits.max(-1, keepdims=True))
    return likely / likely.sum(-1, keepdims=True)
