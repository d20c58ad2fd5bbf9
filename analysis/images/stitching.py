"""Two members stitched where the up half begins: which half carries the picture."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from analysis.measures.cka import mean
from controls.effect import cosine
from models.blocks import stitched
from models.evaluators import Evaluator
from models.families import Family
from models.sampler import Member

SHOWN = 4  # images that the picture shows


def joined(down: Member, up: Member) -> Member:
    """A member whose first half is `down`'s and whose second is `up`'s, sampled as `up` is, for that half
    makes the prediction.
    """
    return replace(
        up,
        name=f"{down.name}+{up.name}",
        denoiser=replace(up.denoiser, net=stitched(down.denoiser.net, up.denoiser.net)),
    )


def led(network: Member, plan: Member) -> Member:
    """A member's network in another's plan: what its half is fairly compared with."""
    return replace(plan, name=f"{network.name} as {plan.name}", denoiser=network.denoiser)


def stitch(
    family: Family,
    first: str,
    second: str,
    texts: list[str],
    seeds: list[int],
    evaluators: dict[str, Evaluator],
) -> tuple[list[dict], Tensor]:
    """Cells of both members alone and of both ways to stitch them, and pictures uint8 (4, n, 3, H, W) of the
    first seed of some prompts.

    agreement: CLIP cosine of image and prompt. to_up, to_down: Euclidean distance, per evaluator, to the
    image that the whole network of that half draws from the same seed in the same plan, so that the sampler
    decides nothing. nearer: to_up - to_down, paired by image. texts: one per image.
    """
    a, b = family.member(first), family.member(second)
    ways = [
        (first, first, a),
        (second, second, b),
        (first, second, joined(a, b)),
        (second, first, joined(b, a)),
    ]
    images = [family.draw(member, texts, seeds) for _, _, member in ways]
    seen = [features(image, evaluators) for image in images]
    above = [seen[0], seen[1], seen[1], seen[0]]
    below = [
        seen[0],
        seen[1],
        *(features(family.draw(m, texts, seeds), evaluators) for m in (led(a, b), led(b, a))),
    ]
    prompts, said = np.unique(texts, return_inverse=True)[1], evaluators["clip"].texts(texts)
    cells = []
    for (down, up, _), images_seen, up_seen, down_seen in zip(ways, seen, above, below, strict=True):
        to_up, to_down = distances(images_seen, up_seen), distances(images_seen, down_seen)
        cells.append(
            {
                "what": "stitch",
                "comparison": second,
                "down": down,
                "up": up,
                "images": len(texts),
                "agreement": mean(cosine(images_seen["clip"], said), prompts),
                "to_up": {name: mean(far, prompts) for name, far in to_up.items()},
                "to_down": {name: mean(far, prompts) for name, far in to_down.items()},
                "nearer": {name: mean(to_up[name] - to_down[name], prompts) for name in evaluators},
                "between": {name: mean(far, prompts) for name, far in distances(up_seen, down_seen).items()},
            }
        )
    firsts = [texts.index(text) for text in dict.fromkeys(texts)][:SHOWN]
    return cells, torch.stack([_bytes(image[firsts]) for image in images])


def features(images: Tensor, evaluators: dict[str, Evaluator]) -> dict[str, np.ndarray]:
    """What every evaluator sees in images, (B, d) each."""
    return {evaluator_name: evaluator.features(images) for evaluator_name, evaluator in evaluators.items()}


def distances(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Euclidean distance of paired features, (B,) per evaluator."""
    return {name: np.linalg.norm(a[name] - b[name], axis=1) for name in a}


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)
