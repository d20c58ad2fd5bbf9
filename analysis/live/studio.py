"""What the page draws: base, student and a plan of both, under controls at any scale.

Plain values in, pictures and numbers out; it knows no page. Controls are attached once, so that a moved dial
costs the drawing alone and a dial at 0 is the bare network bit for bit. What was drawn is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analysis.images.sheets import thumbs
from analysis.measures.image_sets import Spread
from configs import UserError, cut
from configs.ranges import RANGES, checked
from controls.lora import Control, attach, strength
from controls.picture_grid import to_image, to_uint8
from models.evaluators import EVALUATORS, UNIT, Evaluator, chosen, load_evaluators
from models.families import Family
from models.plans import plan_of
from models.sampler import draw_noise, sample

SEEDS = 9  # pictures whose variety is measured
GAP_PX = 2  # between them
KEPT_BYTES = 1e9  # of drawings
ENDS = {"lora": (0.0, 1.5)}  # kind of control: how far its dial goes
BOTH_WAYS = (-2.0, 2.0)  # sliders and SliderSpace's directions
ARTICLES = ("a", "an", "the")

T = TypeVar("T")


@dataclass(frozen=True)
class Dial:
    """A control that is turned by hand."""

    name: str
    least: float
    most: float
    makes: str  # what changes, in words


@dataclass(frozen=True)
class Wish:
    """What is to be drawn."""

    prompt: str
    seed: int
    scales: tuple[tuple[str, float], ...] = ()  # of the controls that act, none of them 0


@dataclass(frozen=True)
class Film:
    """x0 at each step, the finished picture at the last."""

    frames: list[Image.Image]
    t: list[float]  # noise levels at which they were seen


@dataclass(frozen=True)
class Variety:
    """Nine seeds of one prompt, and how far apart two of them are in the mean [95 %]."""

    pictures: Image.Image  # three rows of three
    distance: dict[str, float] | None  # value, low, high; None where no evaluator sees pictures
    of_base: float | None  # its share of the base's distance, under the same dials


class Studio:
    """Draws what is wished, one drawing at a time."""

    def __init__(self, family: Family, student: str, plan: str, controls: Sequence[Control], first: Wish):
        """plan: of base and student, as `models.plans.named` reads it. first: what is shown when the page is
        opened. Raises UserError as `named` and `attach` do.
        """
        base = family.card.base
        targets = {"base": base, "student": student, "plan": f"{student}:{plan}"}
        self.family, self.controls = family, list(controls)
        self.plans = {key: plan_of(family, target) for key, target in targets.items()}
        self.names = {"base": base, "student": student, "plan": plan.replace(" ", "")}
        self.nets = list(dict.fromkeys(family.member(name).denoiser.net for name in (base, student)))
        for net in self.nets:
            for control in controls:
                attach(net, control, None, family.card.name)
        self.dials = [dial(control, base) for control in controls]
        self.first, self.lock, self.kept = first, RLock(), {}
        self._evaluator: Evaluator | None = None

    def wish(self, prompt: str, seed: float, scales: Mapping[str, float] | None = None) -> Wish:
        """A wish of plain values. Raises UserError for a seed or a scale that is none, and for a control that
        has no dial.
        """
        known = [dial.name for dial in self.dials]
        for name, scale in (scales or {}).items():
            if name not in known:
                raise UserError(f"no control {cut(name)!r} here; there are {', '.join(known) or 'none'}")
            if not isinstance(scale, int | float) or not np.isfinite(scale):
                raise UserError(f"the scale of {name} must be a number; got {cut(scale, 40)}")
        acting = sorted((name, float(scale)) for name, scale in (scales or {}).items() if scale)
        return replace(bare_wish(prompt, seed), scales=tuple(acting))

    def picture(self, way: str, wish: Wish) -> Image.Image:
        """The finished picture of "base", "student" or "plan"."""

        def make() -> Tensor:
            return to_uint8(self.decoded(self.steps(way, wish)[-1]))[0]

        return to_image(self.once(("picture", way, wish), make))

    def film(self, way: str, wish: Wish) -> Film:
        """What the networks believe at each step; small, where pictures are large."""

        def make() -> Tensor:
            return torch.cat([thumbs(self.decoded(x0)) for x0 in self.steps(way, wish)])

        levels = [level for stage in self.plans[way].stages for level in stage.levels]
        frames = self.once(("film", way, wish), make)
        return Film([to_image(frame) for frame in frames], [level.t for level in levels])

    def variety(self, way: str, wish: Wish) -> Variety:
        """Nine seeds from the wish's on; measured as analysis.diversity does, on this prompt alone."""
        pictures, distance = self.nine(way, wish)
        if distance is None:
            return Variety(squared(pictures), None, None)
        base = distance if way == "base" else self.nine("base", wish)[1]
        share = distance["value"] / base["value"] if base["value"] else None
        return Variety(squared(pictures), distance, share)

    @property
    def evaluator_name(self) -> str:
        """The first evaluator of the family's card, of those that read words where there are such; may be
        empty.
        """
        card = self.family.card
        there = chosen(card) or [name for name in EVALUATORS if getattr(card, name)]
        return there[0] if there else ""

    def nine(self, way: str, wish: Wish) -> tuple[Tensor, dict[str, float] | None]:
        """Small pictures (9, 3, H, W) and the mean distance of two."""

        def make() -> tuple[Tensor, dict[str, float] | None]:
            pictures, features = [], []
            for rows in self.family.drawing.of(lambda rows: self.drawn(way, wish, rows), SEEDS):
                images = self.decoded(rows[-1])
                pictures.append(thumbs(images))
                features += [self.evaluator.features(images)] if self.evaluator_name else []
            if not features:
                return torch.cat(pictures), None
            spread = Spread("cosine" if self.evaluator_name in UNIT else "squared")
            return torch.cat(pictures), spread.add(np.concatenate(features)).distance()

        return self.once(("nine", way, wish), make)

    @property
    def evaluator(self) -> Evaluator:
        """It is loaded when the first variety is measured."""
        if self._evaluator is None:
            name, family = self.evaluator_name, self.family
            self._evaluator = load_evaluators(family.card, family.device, [name])[name]
        return self._evaluator

    def steps(self, way: str, wish: Wish) -> Tensor:
        """x0 at each step, (T, 1, C, H, W); the last is the finished latent."""

        def make() -> Tensor:
            return self.family.drawing.of(lambda rows: self.drawn(way, wish, rows), 1)[0]

        return self.once(("steps", way, wish), make)

    @torch.no_grad()
    def drawn(self, way: str, wish: Wish, rows: Tensor) -> Tensor:
        """The same of several seeds, counted from the wish's, (T, B, C, H, W), on the CPU.

        Raises UserError for what is not finite.
        """
        plan, family = self.plans[way], self.family
        seeds = [wish.seed + row for row in rows.tolist()]
        noise = draw_noise(seeds, family.latent_shape, plan.steps, family.device)
        prompts = family.encode([wish.prompt] * len(seeds))
        with self.turned(dict(wish.scales)):
            steps = list(sample(plan, noise, prompts))
        latents = torch.stack([*(step.x0 for step in steps[:-1]), steps[-1].after]).cpu()
        if not torch.isfinite(latents).all():
            raise UserError(
                f"{self.names[way]} gives numbers that are not finite: smaller scales, or dtype=fp32, may do"
            )
        return latents

    def decoded(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        return self.family.decode(latents.to(self.family.device))

    @contextmanager
    def turned(self, scales: dict[str, float]) -> Iterator[None]:
        """Inside, the controls act on all networks at these scales."""
        with ExitStack() as stack:
            for net in self.nets:
                stack.enter_context(strength(net, scales))
            yield

    def once(self, key: tuple, make: Callable[[], T]) -> T:
        """What was made for this key, or is made now; no two drawings run at once, and what is kept is given
        without waiting for one.

        Of more than KEPT_BYTES what was made first is let go.
        """
        if (there := self.kept.get(key)) is not None:
            return there
        with self.lock:
            if key not in self.kept:
                self.kept[key] = make()
            while size_bytes(self.kept.values()) > KEPT_BYTES and len(self.kept) > 1:
                del self.kept[next(name for name in self.kept if name != key)]
            return self.kept[key]


def bare_wish(prompt: str, seed: float) -> Wish:
    """A wish without controls. Raises UserError for a text or a seed that is none."""
    most = RANGES["seed"][1] - SEEDS
    if not (isinstance(seed, int | float) and 0 <= seed <= most and seed == int(seed)):
        raise UserError(f"seed must be a whole number from 0 to 2^63 - {SEEDS + 1}; got {cut(seed, 40)}")
    return Wish(checked(prompt, "prompt"), int(seed))


def check_plan(name: str) -> None:
    """Raises UserError for a plan that needs a control of its own."""
    if name.replace(" ", "").startswith("adapted("):
        raise UserError(f"plan={name} is of analysis.diversity; here the dials put controls on the student")


def dial(control: Control, base: str) -> Dial:
    """How a control is turned, and what its card says of it."""
    card, said = control.card, control.card.recipe
    makes = between(str(said.get("positive") or ""), str(said.get("negative") or ""))
    if isinstance(said.get("variance"), float):
        makes = f"{100 * said['variance']:.0f} % of a prompt's variety"
    origin = f"from {card.member}" if card.member and card.member != base else ""
    words = ", ".join(part for part in (makes, origin) if part)
    return Dial(card.name, *ENDS.get(card.kind, BOTH_WAYS), cut(words, 80))


def between(positive: str, negative: str) -> str:
    """What two descriptions do not share, without articles: "young ↔ old"; the positive one alone where the
    other says nothing more.
    """
    more, less = ([word for word in text.split() if word not in ARTICLES] for text in (positive, negative))
    while more and less and more[0] == less[0]:
        more, less = more[1:], less[1:]
    while more and less and more[-1] == less[-1]:
        more, less = more[:-1], less[:-1]
    if not more:
        return positive
    return " ".join([*less, "↔", *more] if less else more)


def squared(pictures: Tensor) -> Image.Image:
    """Pictures uint8 (9, 3, H, W) as one, three in a row, white between them."""
    framed = torch.nn.functional.pad(pictures, (0, GAP_PX, 0, GAP_PX), value=255)
    rows = [torch.cat(list(row), -1) for row in framed.split(3)]
    return to_image(torch.cat(rows, -2)[:, :-GAP_PX, :-GAP_PX])


def size_bytes(values) -> int:
    """Of tensors, alone or first in a pair."""
    tensors = [value[0] if isinstance(value, tuple) else value for value in values]
    return sum(tensor.nbytes for tensor in tensors)
