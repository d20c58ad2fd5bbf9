"""Two members stitched where the up half begins: which half carries the picture."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from analysis.alignment import mean
from controls.effect import cosine
from models.blocks import stitched
from models.evaluators import Evaluator
from models.families import Family
from models.sample import Member

SHOWN = 4  # images that the picture shows


def joined(down: Member, up: Member) -> Member:
    """A member whose first half is `down`'s and whose second is `up`'s, sampled as `up` is, for that half makes the prediction."""
    net = stitched(down.denoiser.net, up.denoiser.net)
    return replace(up, name=f"{down.name}+{up.name}", denoiser=replace(up.denoiser, net=net))


def combinations(family: Family, first: str, second: str) -> list[tuple[str, str, Member]]:
    """(down, up, member): both members alone, then both ways to stitch them."""
    a, b = family.member(first), family.member(second)
    return [(first, first, a), (second, second, b), (first, second, joined(a, b)), (second, first, joined(b, a))]


def stitch(family: Family, first: str, second: str, texts: list[str], seeds: list[int], eyes: dict[str, Evaluator], batch: int):
    """Cells of both members alone and of both ways to stitch them, and pictures uint8 (4, n, 3, H, W) of the first seed of some prompts.

    agreement: CLIP cosine of image and prompt. to_up, to_down: Euclidean distance, per evaluator, to the image that the member of that half
    draws alone from the same seed. texts: one per image.
    """
    ways = combinations(family, first, second)
    images = [family.draw(member, texts, seeds, batch) for _, _, member in ways]
    seen = [{who: eye.features(image) for who, eye in eyes.items()} for image in images]
    alone = {first: seen[0], second: seen[1]}
    prompts = np.unique(texts, return_inverse=True)[1]
    said = eyes["clip"].texts(texts)
    cells = [
        {"what": "stitch", "comparison": second, "down": down, "up": up, "images": len(texts),
         "agreement": mean(cosine(found["clip"], said), prompts),
         "to_up": {who: mean(_apart(found[who], alone[up][who]), prompts) for who in eyes},
         "to_down": {who: mean(_apart(found[who], alone[down][who]), prompts) for who in eyes},
         "between": {who: mean(_apart(alone[first][who], alone[second][who]), prompts) for who in eyes}}
        for (down, up, _), found in zip(ways, seen, strict=True)
    ]  # fmt: skip
    firsts = [texts.index(text) for text in dict.fromkeys(texts)][:SHOWN]
    return cells, torch.stack([_bytes(image[firsts]) for image in images])


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=1)
