"""Controls on two members: the direction in which each moves x0, at the same x_t, and what distillation did
to the weights it uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from analysis.images.activations import forced
from analysis.measures.cka import by_prompt, mean
from controls import intervals, overlap
from controls.effect import cosine
from controls.lora import Card, Control, fused
from models.batches import Batches
from models.families import Family
from models.noise import Noise
from models.prompts import Prompts
from models.sampler import Member

Key = tuple[str, Noise, bool]  # member, level, guided


@dataclass
class Start:
    """Clean latents and the noise added to them, the same for every control and member."""

    conditioning: Prompts
    x0: Tensor  # (B, C, H, W)
    eps: Tensor  # (B, C, H, W)
    prompts: np.ndarray  # (B,) which prompt each is of
    batches: Batches
    bare: dict[Key, np.ndarray] = field(
        default_factory=dict
    )  # what members say without a control, kept over the controls


def levels_between(a: Member, b: Member) -> tuple[Noise, ...]:
    """Where two members are compared: the levels of the one with fewer steps, on which it was distilled; the
    second's when equal.
    """
    return a.levels if len(a.levels) < len(b.levels) else b.levels


@torch.no_grad()
def says(member: Member, level: Noise, guided: bool, start: Start) -> np.ndarray:
    """x0 of the member at the start noised to a level, (B, C·H·W); guided: as it is sampled, else the
    conditional branch alone.
    """

    def moved(rows: Tensor) -> Tensor:
        ((at, x),) = forced(member, start.x0[rows], start.eps[rows], [level])
        conditioning = start.conditioning[rows] if guided else start.conditioning[rows].conditional()
        return (
            member.denoiser(x, at, conditioning, member.guidance if guided else None)
            .flatten(1)
            .double()
            .cpu()
        )

    return torch.cat(start.batches.of(moved, len(start.conditioning))).numpy()


def moves(
    family: Family, control: Control, member: Member, levels: Sequence[Noise], start: Start
) -> dict[Key, np.ndarray]:
    """What the control at scale 1 changes in x0, (B, C·H·W) per level, guided and not; what it changes in eps
    differs by a factor alone.
    """
    keys = [(member.name, level, guided) for level in dict.fromkeys(levels) for guided in (False, True)]
    for key in keys:
        if key not in start.bare:
            start.bare[key] = _says(member, key, start, start.bare)
    moved: dict[Key, np.ndarray] = {}
    with fused(member.denoiser.net, control, 1.0, family.card.name):
        for key in keys:
            moved[key] = _says(member, key, start, moved)
    return {key: moved[key] - start.bare[key] for key in keys}


def _says(member: Member, key: Key, start: Start, known: dict[Key, np.ndarray]) -> np.ndarray:
    name, level, guided = key
    return (
        known[name, level, False]
        if guided and member.guidance is None
        else says(member, level, guided, start)
    )


def directions(family: Family, control: Control, start: Start) -> list[dict]:
    """One cell per other member: what the control does there against its source, per step, and its weights
    beside the delta.
    """
    names = list(family.card.members)
    source = family.member(control.card.member)
    targets = [family.member(name) for name in names if name != control.card.member]
    between = {target.name: levels_between(source, target) for target in targets}
    here = moves(family, control, source, [level for levels in between.values() for level in levels], start)
    return [_cell(family, control, source, target, between[target.name], here, start) for target in targets]


def _cell(
    family: Family,
    control: Control,
    source: Member,
    target: Member,
    levels,
    here: dict[Key, np.ndarray],
    start: Start,
) -> dict:
    there = moves(family, control, target, levels, start)
    pairs = {
        g: [(here[source.name, level, g], there[target.name, level, g]) for level in levels]
        for g in (False, True)
    }
    found = overlap.factors(control)
    changed = overlap.delta(source.denoiser.net, target.denoiser.net, list(found))
    return {
        "what": "direction",
        "control": control.card.name,
        "kind": control.card.kind,
        "source": source.name,
        "target": target.name,
        "t": [level.t for level in levels],
        "cosine": [mean(cosine(a, b), start.prompts) for a, b in pairs[False]],
        "gain": [gain(a, b, start.prompts) for a, b in pairs[False]],
        "gain_guided": [gain(a, b, start.prompts) for a, b in pairs[True]],
        "cosine_guided": [mean(cosine(a, b), start.prompts) for a, b in pairs[True]],
        "delta": overlap.against_delta(found, changed),
        "images": len(start.conditioning),
    }


def gain(a: np.ndarray, b: np.ndarray, prompts: np.ndarray) -> dict:
    """How much of the move a is in the move b, <a, b> / <a, a> over all images, with an interval over
    prompts: 1 as much, 0 nothing.
    """
    return intervals.ratio(
        by_prompt((a * b).sum(1), prompts), by_prompt((a * a).sum(1), prompts), positive=True
    )


def overlaps(controls: list[Control]) -> list[dict]:
    """Every two controls in weights: cosine of ΔW and shared subspaces against chance.

    same: trained on the same two descriptions. same_start: training began from the same random A
    (controls.lora.create draws it from seed, layers and rank), which alone makes them read much together.
    """
    found = [(c.card, overlap.factors(c)) for c in controls]
    cells = []
    for i, (one, a) in enumerate(found):
        for two, b in found[i + 1 :]:
            spaces = overlap.subspaces(a, b) or dict.fromkeys(
                ("in", "out", "chance_in", "chance_out"), None
            ) | {"layers": 0}
            cells.append(
                {
                    "what": "overlap",
                    "one": one.name,
                    "two": two.name,
                    "one_source": f"{one.family}/{one.member}",
                    "two_source": f"{two.family}/{two.member}",
                    "same": _concept(one) == _concept(two),
                    "same_start": _start(one) == _start(two),
                    "cosine": overlap.cosine(a, b),
                    **spaces,
                }
            )
    return cells


def concept(card: Card) -> str:
    """What a control is of: its two descriptions, whichever way round; of SliderSpace's directions their
    prompt, one for all of them; else its name.
    """
    words = [card.recipe.get(key) for key in ("positive", "negative")]
    if all(words):
        return " | ".join(sorted(words))
    return f"directions of {card.recipe.get('prompt')}" if card.recipe.get("component") else card.name


def _concept(card: Card) -> tuple:
    words = (card.recipe.get("positive"), card.recipe.get("negative"))
    return words if all(words) else (card.name,)


def _start(card: Card) -> tuple:
    """What `controls.lora.create` draws A from; controls trained side by side, as SliderSpace's, count their
    seeds up.
    """
    return (
        card.layers,
        card.scope,
        card.rank,
        card.recipe.get("seed", 0) + card.recipe.get("component", 1) - 1,
    )
