"""Adds controls into one: python -m controls.merge A B … OUT [key=value ...]

The sum of their weight changes, each times its own factor, is factored anew at the rank asked for; what that
loses is printed.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs import UserError, entry, list_of, load, plain, plain_name, versions
from controls import formats
from controls.layers import CUSTOM
from controls.lora import HALVES, Card, Control


@dataclass
class Config:
    weights: list[float] = list_of()  # a factor per control; empty = 1 each
    rank: int = 0  # of the result; 0 = the sum of the ranks, which loses nothing
    name: str = "merged"  # of the result


def merge(
    controls: list[Control], weights: list[float], rank: int, name: str
) -> tuple[Control, dict[str, float], float]:
    """The sum as one control with alpha = rank, and the share of the change's norm that the rank loses: per
    layer, and overall.

    Raises UserError for controls of different families, and where they have one layer in different shapes.
    """
    families = sorted({control.card.family for control in controls})
    if len(families) > 1:
        raise UserError(f"only controls of one family can be merged; these are of {', '.join(families)}")
    rank = rank or sum(control.card.rank for control in controls)
    parts, tensors, lost, norms = defaultdict(list), {}, {}, {}
    for control, weight in zip(controls, weights, strict=True):
        for layer in control.layers:
            parts[layer].append((control.factor(weight), *control.pair(layer)))
    for layer, pairs in sorted(parts.items()):
        if len({(a.shape[1:], b.shape[:1], b.shape[2:]) for _, a, b in pairs}) > 1:
            raise UserError(f"the controls have {layer} in different shapes: are they of one network?")
        tall_a = torch.cat([a.double().flatten(1) for _, a, _ in pairs])  # (R, in)
        wide_b = torch.cat([factor * b.double().flatten(1) for factor, _, b in pairs], 1)  # (out, R)
        small_a, small_b, lost[layer], norms[layer] = factored(tall_a, wide_b, rank)
        _, a, b = pairs[0]
        tensors[layer + HALVES[0]] = small_a.float().view(rank, *a.shape[1:])
        tensors[layer + HALVES[1]] = small_b.float().view(-1, rank, *b.shape[2:])
    card = labelled(controls, weights, set(parts), rank, name)
    whole = math.hypot(*norms.values())
    return (
        Control(card, tensors),
        lost,
        math.hypot(*(lost[layer] * norms[layer] for layer in lost)) / whole if whole else 0.0,
    )


def labelled(controls: list[Control], weights: list[float], layers: set[str], rank: int, name: str) -> Card:
    """The card of a sum: what all controls agree on, the layer set of the one that has all layers, and each
    one's part.
    """
    cards = [control.card for control in controls]
    parts = [
        {
            "name": card.name,
            "weight": weight,
            "trained on": f"{card.family}/{card.member}",
            "recipe": card.recipe,
        }
        for card, weight in zip(cards, weights, strict=True)
    ]
    kinds, hashes = {card.kind for card in cards}, {card.base_hash for card in cards}
    whole = next((control.card for control in controls if set(control.layers) == layers), None)
    return replace(
        cards[0],
        name=name,
        rank=rank,
        alpha=float(rank),
        recipe={"merged": parts},
        transfer={},
        versions=versions(),
        kind=kinds.pop() if len(kinds) == 1 else "lora",
        base_hash=hashes.pop() if len(hashes) == 1 else "",
        layers=whole.layers if whole else CUSTOM,
        scope=whole.scope if whole else CUSTOM,
    )


def factored(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best pair of a rank for b @ a: A (rank, in), B (out, rank), the share of the norm lost, and the
    norm; by QR and an R×R core.

    a: (R, in). b: (out, R). Filled up with zeros where the rank is more than there is.
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(rb @ ra.T)
    kept, root = min(rank, len(s)), s[:rank].sqrt()
    small_a, small_b = torch.zeros(rank, a.shape[1]).to(a), torch.zeros(b.shape[0], rank).to(b)
    small_a[:kept] = root[:, None] * (v[:kept] @ qa.T)
    small_b[:, :kept] = (qb @ u[:, :kept]) * root
    return small_a, small_b, float(s[rank:].norm() / s.norm()) if s.norm() else 0.0, float(s.norm())


def run() -> None:
    files, words = plain(sys.argv[1:])
    cfg = load(Config, words)
    if len(files) < 2:
        raise UserError(
            f"say what to merge and where to: python -m controls.merge A B OUT; got "
            f"{' '.join(files) or 'nothing'}"
        )
    plain_name(cfg.name)
    controls, weights = [formats.load(file) for file in files[:-1]], cfg.weights or [1.0] * (len(files) - 1)
    if len(weights) != len(controls) or cfg.rank < 0:
        raise UserError(
            f"{len(controls)} controls need as many weights, and a rank of 0 or more; got {weights}, "
            f"{cfg.rank}"
        )
    merged, lost, overall = merge(controls, weights, cfg.rank, cfg.name)
    formats.save(merged, files[-1])
    worst = max(lost, key=lost.get)
    what = f"{files[-1]}: {len(lost)} layers, rank {merged.card.rank}"
    print(f"{what}; lost {overall:.2%} of the change, at worst {lost[worst]:.2%}, in {worst}")


if __name__ == "__main__":
    entry(run)
