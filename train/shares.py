"""Which share of a control's effect on its source other members have, on a few images: by every evaluator of
the card that reads words.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs import replacing
from controls import intervals
from controls.effect import own_direction, without
from models.evaluators import Evaluator
from models.families import Family
from models.sampler import Member

Acting = Callable[[], AbstractContextManager]
Features = dict[str, np.ndarray]  # by evaluator, (n, d)


class Shares:
    """The effect of an original on its source, with which those on members are compared, image by image."""

    def __init__(
        self,
        family: Family,
        evaluators: dict[str, Evaluator],
        words: tuple[str, str],
        texts: Sequence[str],
        seed: int,
    ):
        """family: of the members. words: what the control makes, and what it departs from; without them an
        effect lies along the original's own direction. texts: one image each.
        """
        self.family, self.evaluators, self.words = family, evaluators, words
        self.texts, self.seeds = list(texts), [seed + k for k in range(len(texts))]

    def source(
        self, family: Family, member: Member, sides: tuple[Acting, Acting], folder: Path, keys: tuple
    ) -> None:
        """Draws the source of a family, without the original and with it. What is seen is kept in a folder.

        keys: what the source is, and what the original is.
        """
        named = keys[:1], keys  # the source without a control is the same to all
        plain, edited = (
            self.kept(folder, key, partial(self.seen, member, side, family))
            for key, side in zip(named, sides, strict=True)
        )
        # a direction that was fitted to an image always finds an effect in it: so on other images
        self.rows = slice(None) if all(self.words) else slice(1, None, 2)
        self.directions = {name: own_direction(plain[name][::2], edited[name][::2]) for name in plain}
        self.plain, self.edited, self.own = plain, edited, self.effects(plain, edited)

    def kept(self, folder: Path, key: object, seen: Callable[[], Features]) -> Features:
        """What is seen, from a file that is named by the hash of what it depends on: key, and what is known
        here.
        """
        judges = [[type(judge).__name__, judge.identity] for judge in self.evaluators.values()]
        about = [key, str(self.family.dtype), judges, self.texts, self.seeds]
        path = folder / f"source-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"
        try:
            tensors = load_file(path)
            return {name: tensors[name].numpy() for name in self.evaluators}
        except (OSError, SafetensorError):  # not there, or damaged
            features = seen()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            save_file({name: torch.from_numpy(its) for name, its in features.items()}, new)
        return features

    def of(self, before: Features, after: Features) -> dict[str, dict]:
        """The share that a member has, by evaluator, with intervals over images."""
        effects = self.effects(before, after)
        return {name: intervals.ratio(effect, self.own[name]) for name, effect in effects.items()}

    def middle(self, before: Features, after: Features) -> list[float]:
        """The logarithms of the shares, of each evaluator; nothing is a hundredth. Of after the first images
        are enough.
        """
        effects = self.effects({name: its[: len(after[name])] for name, its in before.items()}, after)
        shares = [effect.mean() / self.own[name].mean() for name, effect in effects.items()]
        return [float(np.log(max(share, 0.01))) for share in shares]

    def error(self, before: Features, after: Features, judges: int) -> float:
        """How far the mean of the first evaluators' logarithms may be from that on other prompts [95 %]; the
        images of one prompt are alike, so prompts are the units.
        """
        texts, effects, parts = np.array(self.texts)[self.rows], self.effects(before, after), []
        for name in list(before)[:judges]:
            if not effects[name].mean():
                return math.inf
            parts.append(effects[name] / effects[name].mean() - self.own[name] / self.own[name].mean())
        part = np.mean(parts, 0)
        interval = intervals.mean(np.array([part[texts == text].mean() for text in dict.fromkeys(texts)]))
        return math.inf if interval["high"] is None else interval["high"] - interval["value"]

    def effects(self, before: Features, after: Features) -> dict[str, np.ndarray]:
        """What has changed, (n,), by evaluator."""
        return {name: (self.score(name, after) - self.score(name, before))[self.rows] for name in before}

    def score(self, name: str, features: Features) -> np.ndarray:
        if all(self.words):
            return self.evaluators[name].score(features[name], *self.words)
        return features[name] @ self.directions[name]

    def rest(self, name: str, features: np.ndarray) -> np.ndarray:
        """What should not change, (n, d)."""
        if all(self.words):
            return self.evaluators[name].rest(features, *self.words)
        return without(features, self.directions[name])

    @torch.no_grad()
    def seen(
        self, member: Member, acting: Acting, family: Family | None = None, count: int | None = None
    ) -> Features:
        """The features of an image per text, or of the first few."""
        with acting():
            images = (family or self.family).draw(member, self.texts[:count], self.seeds[:count])
        return {name: evaluator.features(images) for name, evaluator in self.evaluators.items()}
