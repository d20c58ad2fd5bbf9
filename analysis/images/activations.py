"""What the blocks of two networks hold at the same step, streamed into numbers per block and step.

Inputs are `forced`, both networks at the same x_t (the first one's finished latent, noised to the second's
levels), which isolates weights; or `own`, each on its own trajectory, which isolates dynamics: there the
first one's step nearest in noise level stands for it. Always the conditional branch alone. A sample is a
(prompt, seed); its vector is the block's activation averaged over positions.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from math import atan2

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from analysis.measures import cka
from configs import UserError
from controls import intervals
from controls.lora import Control, fused
from controls.overlap import change
from models import budget
from models.blocks import blocks, recording
from models.families import Family
from models.noise import Noise
from models.prompts import Prompts
from models.sampler import Member, Stage, alone, draw_noise, sample

PROCRUSTES_DRAWS = 4  # each costs a singular value decomposition


@dataclass(frozen=True)
class Pair:
    """Two members of one family, or one member without and with a control."""

    first: str
    second: str
    control: Control | None = None
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.second} with {self.control.card.name}@{self.scale:g}" if self.control else self.second

    @property
    def file(self) -> str:
        return self.name.replace(" with ", "-")


@dataclass(frozen=True)
class Chunk:
    """Images of one prompt that go through the networks together."""

    prompt: int
    text: str
    first: int  # the place of its first seed among those of the prompt
    seeds: tuple[int, ...]

    @property
    def file(self) -> str:
        return f"{self.prompt:04}-{self.first:05}.safetensors"


@dataclass(frozen=True)
class Measure:
    """How activations are turned into numbers."""

    kind: str  # set of blocks, see models.blocks
    grid: int  # positions per side of a vector that is compared
    spread_grid: int  # positions per side of a map whose variance over seeds is taken
    neighbours: int
    kept: int  # seeds per prompt kept for what needs all samples at once
    draws: int
    seed: int


def chunks(prompts: Sequence[str], numbers: Sequence[int], batch_size: int) -> list[Chunk]:
    """All images, prompt by prompt, at most batch_size at a time. numbers: seeds, as many for each prompt."""
    each = len(numbers) // len(prompts)
    return [
        Chunk(p, text, start, tuple(numbers[p * each : (p + 1) * each][start : start + batch_size]))
        for p, text in enumerate(prompts)
        for start in range(0, each, batch_size)
    ]


def nearest(levels: Sequence[Noise], wanted: Sequence[Noise]) -> list[int]:
    """For each wanted noise level the index of the nearest in `levels`, by the angle of alpha and sigma."""

    def angle(level):
        return atan2(level.sigma, level.alpha)

    return [min(range(len(levels)), key=lambda i: abs(angle(levels[i]) - angle(level))) for level in wanted]


@torch.no_grad()
def walk(family: Family, name: str, chunk: Chunk) -> dict[str, Tensor]:
    """A member's own run of a chunk: x (B, steps, C, H, W) that it held at each step, and the finished x0 (B,
    C, H, W).
    """
    member = family.member(name)

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        noise = draw_noise(
            [chunk.seeds[row] for row in rows], family.latent_shape, len(member.levels), family.device
        )
        steps = list(sample(alone(member), noise, family.encode([chunk.text] * len(rows))))
        held = torch.stack([step.x for step in steps], 1)
        return held.to("cpu", torch.float16 if family.device.type != "cpu" else torch.float32), steps[
            -1
        ].after.cpu()

    held, finished = (torch.cat(part) for part in zip(*family.drawing.of(run, len(chunk.seeds)), strict=True))
    return {"x": held, "x0": finished}


class Site:
    """One block at one step, in both networks."""

    def __init__(self, measure: Measure) -> None:
        self.measure, self.n = measure, 0
        self.alignment, self.spreads = cka.Alignment(), (cka.Spread(), cka.Spread())
        self.kept: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, maps: tuple[Tensor, Tensor], chunk: Chunk) -> None:
        """Takes in two maps (B, C, spread_grid, spread_grid) of the same images."""
        rows = [F.adaptive_avg_pool2d(m, self.measure.grid).flatten(1).double().cpu().numpy() for m in maps]
        self.alignment.add(*rows)
        self.n += len(rows[0])
        room = max(0, self.measure.kept - chunk.first)
        for side, spread, kept, row in zip(maps, self.spreads, self.kept, rows, strict=True):
            spread.add(side.flatten(1).double().cpu().numpy(), chunk.prompt)
            if room:
                kept.append(row[:room])

    def numbers(self) -> dict:
        """CKA with its interval and null, the standardised one, Procrustes, mutual neighbours, variance over
        seeds, second / first.

        seed_share: of each, seeds / (seeds + prompts) in variance, which a mere change of the activations'
        size leaves as it is.
        """
        measure, (x, y) = self.measure, (np.concatenate(side) for side in self.kept)
        prompts = np.repeat(np.arange(len(x) // measure.kept), measure.kept)
        k, m = cka.gram(x), cka.gram(y)
        around = cka.jackknife(lambda rows: cka.cka(k[np.ix_(rows, rows)], m[np.ix_(rows, rows)]), prompts)
        first, second = (spread.finish() for spread in self.spreads)
        chance = [
            cka.procrustes(x, y[rows]) for rows in cka.permutations(prompts, PROCRUSTES_DRAWS, measure.seed)
        ]
        return {
            "cka": {**around, "value": self.alignment.cka()},
            "null": cka.null(k, m, prompts, measure.draws, measure.seed),
            "standardised": self.alignment.standardised(),
            "procrustes": self.alignment.procrustes(),
            "procrustes_permuted": None if None in chance else float(np.mean(chance)),
            "neighbours": cka.neighbours(x, y, measure.neighbours),
            "neighbours_chance": measure.neighbours / (len(x) - 1),
            "seed_variance": intervals.ratio(second[0], first[0], positive=True),
            "seed_share": [_share(first), _share(second)],
            "samples": self.n,
        }


def _share(spread: tuple[np.ndarray, float]) -> float | None:
    seeds, prompts = spread[0].mean(), spread[1]
    return float(seeds / (seeds + prompts)) if seeds + prompts > 0 else None


@torch.no_grad()
def compare(
    family: Family,
    pair: Pair,
    todo: list[Chunk],
    measure: Measure,
    walked: Callable[[Chunk], dict[str, Tensor]],
    quiet: bool,
) -> list[dict]:
    """Cells of every block and step of a pair, forced and own, and its cross-block maps. walked: what `walk`
    of the first member kept.
    """
    first, second = family.member(pair.first), family.member(pair.second)
    names = shared_blocks(first, second, measure.kind)
    sites = defaultdict(lambda: Site(measure))
    for chunk in tqdm(todo, pair.name, unit="batch", leave=False, disable=quiet):
        for key, maps in looks(family, pair, first, second, names, chunk, walked(chunk), measure.spread_grid):
            sites[key].add(maps, chunk)
    about = {"comparison": pair.name, "first": first.name, "second": second.name}
    levels, near = second.levels, nearest(first.levels, second.levels)
    cells = []
    for (inputs, step, block), site in sites.items():
        t_first = first.levels[near[step]].t if inputs == "own" else levels[step].t
        cells.append(
            {
                "what": "block",
                **about,
                "inputs": inputs,
                "block": block,
                "step": step,
                "t": levels[step].t,
                "t_first": t_first,
                **site.numbers(),
            }
        )
    nets = first.denoiser.net, second.denoiser.net
    if not pair.control:
        cells += [
            {"what": "weights", **about, "block": name, "change": change(*nets, name)} for name in names
        ]
    return cells + [
        {
            "what": "cross",
            **about,
            "step": s,
            "t": levels[s].t,
            "blocks": names,
            "cka": cross(sites, s, names),
        }
        for s in range(len(levels))
    ]


@torch.no_grad()
def sums(family: Family, name: str, measure: Measure) -> float:
    """Bytes of the sums that a comparison with a member keeps in system memory, by configs alone; family: a
    bare one.

    Per block, step and kind of inputs `cka.Alignment` has three times four matrices of channels x
    channels.
    """
    sizes = [count * measure.grid**2 for count in channels(measure.kind, *budget.about(family.card, name))]
    return 3.0 * 4 * 8 * sum(size**2 for size in sizes) * 2 * len(family.member(name).levels)


@cache
def channels(kind: str, *about: Hashable) -> tuple[int, ...]:
    """Of each block's activations; about: what an evaluation depends on."""
    net, evaluate = budget.unweighted(*about, torch.bfloat16)
    with recording(net, blocks(net, kind), 1) as seen, torch.device("meta"):
        evaluate()
    return tuple(activation.shape[1] for activation in seen.values())


def shared_blocks(first: Member, second: Member, kind: str) -> list[str]:
    """The blocks that both members have. Raises UserError where they differ."""
    names, theirs = (blocks(member.denoiser.net, kind) for member in (first, second))
    if names != theirs:
        raise UserError(
            f"{first.name} and {second.name} have different blocks ({len(names)} and {len(theirs)}): "
            f"nothing to compare"
        )
    return names


def looks(
    family: Family,
    pair: Pair,
    first: Member,
    second: Member,
    names: list[str],
    chunk: Chunk,
    walked: dict[str, Tensor],
    grid: int,
) -> Iterator[tuple[tuple[str, int, str], tuple[Tensor, Tensor]]]:
    """((inputs, step, block), (first map, second map)) of one chunk; maps (B, C, grid, grid)."""
    levels = second.levels
    at = [first.levels[i] for i in nearest(first.levels, levels)]
    held = walked["x"][:, nearest(first.levels, levels)]

    def both(rows: Tensor) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """What the blocks of both hold at every state, own ones first."""
        seeds = [chunk.seeds[row] for row in rows]
        conditioning = family.encode([chunk.text] * len(rows))
        x0, eps = walked["x0"][rows].to(family.device), spare_noise(family, first, seeds)
        own = [(level, held[rows, place].to(x0)) for place, level in enumerate(at)]
        here = look(first, own + forced(first, x0, eps, levels), conditioning, names, grid)
        with (
            fused(second.denoiser.net, pair.control, pair.scale, family.card.name)
            if pair.control
            else nullcontext()
        ):
            noise = draw_noise(seeds, family.latent_shape, len(levels), family.device)
            theirs = [(step.noise, step.x) for step in sample(alone(second), noise, conditioning)]
            there = look(second, theirs + forced(second, x0, eps, levels), conditioning, names, grid)
        return here, there

    here, there = (joined(side) for side in zip(*family.drawing.of(both, len(chunk.seeds)), strict=True))
    for place, (a, b) in enumerate(zip(here, there, strict=True)):
        inputs, step = ("own", place) if place < len(levels) else ("forced", place - len(levels))
        for name in names:
            yield (inputs, step, name), (a[name], b[name])


def joined(batches: Sequence[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Maps of several batches, state by state and block by block, as those of one."""
    return [
        {name: torch.cat([batch_size[k][name] for batch_size in batches]) for name in state}
        for k, state in enumerate(batches[0])
    ]


def spare_noise(family: Family, member: Member, seeds: Sequence[int]) -> Tensor:
    """Noise of each image, (B, C, H, W), that the member's own run did not use."""
    return draw_noise(seeds, family.latent_shape, len(member.levels) + 1, family.device)[:, -1]


def forced(member: Member, x0: Tensor, eps: Tensor, levels: Sequence[Noise]) -> list[tuple[Noise, Tensor]]:
    """Clean latents noised to these levels, in the member's own noise schedule: for every member the same
    picture and the same noise.
    """
    return [(level, level.alpha * x0 + level.sigma * eps) for level in Stage.of(member, levels).levels]


def look(
    member: Member, states: list[tuple[Noise, Tensor]], conditioning: Prompts, names: list[str], grid: int
) -> list[dict[str, Tensor]]:
    """What the blocks hold at each state, by the conditional branch alone."""
    found = []
    with recording(member.denoiser.net, names, grid) as seen:
        for level, x in states:
            member.denoiser(x, level, conditioning.conditional())
            found.append(dict(seen))
    return found


def cross(sites: dict, step: int, names: list[str]) -> list[list[float | None]]:
    """Debiased CKA of every block of the first (rows) with every block of the second at one step, forced
    inputs, kept samples.
    """
    grams = [
        [cka.gram(np.concatenate(sites["forced", step, name].kept[side])) for name in names]
        for side in (0, 1)
    ]
    return [[None if value is None else round(value, 4) for value in row] for row in cka.cross(*grams)]
