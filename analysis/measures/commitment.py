"""The numbers of a trace: how far x0 is from the final image, when that stays little, what it begins and
abandons, where a control acts.
"""

from typing import Protocol

import numpy as np

from configs import UserError
from controls import intervals
from controls.effect import cosine
from models.evaluators import READERS, UNIT, Evaluator


class Settings(Protocol):
    """What of a trace's config decides its numbers."""

    prompts: list[str]
    seeds: int  # images per prompt
    tolerance: float  # a distance below which x0 is the final image
    threshold: float  # a fall of a score that counts
    concepts: list[str]


EXAMPLES = 4  # images of a plan that show what it abandoned


def concept(text: str) -> tuple[str, str, str]:
    """(name, positive, negative) of "name: positive | negative". Raises UserError."""
    name, _, pair = text.partition(":")
    positive, _, negative = pair.partition("|")
    if not (name.strip() and positive.strip() and negative.strip()):
        raise UserError(
            f"a concept is written 'name: positive description | negative description'; got {text!r}"
        )
    return name.strip(), positive.strip(), negative.strip()


def between(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of features over the last axis: 1 - cosine where they are of unit length, else Euclidean."""
    return 1 - cosine(a, b) if name in UNIT else np.linalg.norm(a - b, axis=-1)


def apart(name: str, features: np.ndarray) -> float:
    """How far two finished images of one prompt are apart on average; features (P, S, T, d)."""
    rows, columns = np.triu_indices(features.shape[1], 1)
    return float(between(name, features[:, rows, -1], features[:, columns, -1]).mean())


def estimate(values: np.ndarray) -> list[dict]:
    """Means over prompts and seeds of values (P, S, K), with their intervals over prompts."""
    return [intervals.mean(column) for column in intervals.units(values).T]


def committed(cfg: Settings, own: dict, unit: dict[str, float]) -> dict:
    """How far x0 is from the final image at each step, in units of how far two seeds of the base are apart;
    from when on that stays little.

    own: features (P, S, T, d) by evaluator, and t (T,). left: the share of images that had been within the
    tolerance and left it again; their commitment is the return after which they stay.
    """
    numbers: dict = {"distance": {}, "commitment": {}}
    for name, one in unit.items():
        far = between(name, own[name], own[name][:, :, -1:]) / one  # (P, S, T)
        first = staying(far <= cfg.tolerance)  # (P, S)
        left = (far <= cfg.tolerance).argmax(-1) < first
        numbers["distance"][name] = estimate(far)
        values = estimate(np.stack([(first + 1) / far.shape[-1], own["t"][first], left], -1))
        numbers["commitment"][name] = dict(zip(("share", "t", "left"), values, strict=True))
    return numbers


def staying(within: np.ndarray) -> np.ndarray:
    """The first step from which all are true to the end, (…, T) -> (…,); the last step where none is."""
    until_end = np.logical_and.accumulate(within[..., ::-1], -1)[..., ::-1]
    return np.where(until_end[..., -1], until_end.argmax(-1), within.shape[-1] - 1)


def abandoned(
    cfg: Settings, own: dict, evaluators: dict[str, Evaluator], ends: dict[str, np.ndarray]
) -> dict:
    """Where a concept's score of x0 falls before the end: the share of images, and the deepest falls with
    their steps.

    By the attribute probe where there is one, in its own units; else by the first evaluator that reads words,
    in units of the middle 90 % of all finished images.
    """
    name = next((name for name in ("probe", *evaluators) if name in evaluators and name in READERS), "")
    falls, rises, examples = [], [], []
    for word, positive, negative in map(concept, cfg.concepts if name else ()):
        score = evaluators[name].score(own[name], positive, negative)  # (P, S, T)
        if name != "probe":
            low, high = np.quantile(evaluators[name].score(ends[name], positive, negative), (0.05, 0.95))
            score = (score - low) / (high - low)
        peak = score.max(-1)
        falls.append((peak - score[..., -1] >= cfg.threshold) & (peak >= 0.5))
        rises.append(falls[-1] & (peak - score[..., 0] >= cfg.threshold))
        for p, s in zip(*np.nonzero(falls[-1]), strict=True):
            examples.append(
                {
                    "concept": word,
                    "prompt": cfg.prompts[p],
                    "image": int(p * cfg.seeds + s),
                    "score": score[p, s].tolist(),
                    "fall": float(peak[p, s] - score[p, s, -1]),
                    "rises_first": bool(rises[-1][p, s]),
                }
            )
    if not falls:
        return {"evaluator": name, "falls": None, "rises_and_falls": None, "examples": []}
    share = estimate(np.stack([np.any(falls, 0), np.any(rises, 0)], -1).astype(float))
    examples.sort(key=lambda e: (-e["rises_first"], -e["fall"]))
    return {
        "evaluator": name,
        "falls": share[0],
        "rises_and_falls": share[1],
        "count": len(examples),
        "examples": examples[:EXAMPLES],
    }


def followed(evaluator: Evaluator, name: str, states: dict, pair: tuple[str, str]) -> dict:
    """The effect of a control on x0 at each step, when half of it is there, and what is left of it when it is
    on in some bands alone.

    half: of each prompt's own mean curve, then averaged over prompts.
    """
    score = {bands: evaluator.score(found[name], *pair) for bands, found in states.items()}
    effect = score[None] - score[()]  # (P, S, T)
    by_prompt, steps = effect.mean(1), states[()]["t"]  # (P, T), (T,)
    half = (by_prompt >= 0.5 * by_prompt[:, -1:]).argmax(-1)  # (P,)
    parts = []
    for bands in (b for b in score if b):
        left = score[bands][..., -1] - score[()][..., -1]
        parts.append({"bands": list(bands), "share": intervals.ratio(left.mean(1), by_prompt[:, -1])})
    return {
        "effect": estimate(effect),
        "half": {"share": intervals.mean((half + 1) / len(steps)), "t": intervals.mean(steps[half])},
        "parts": parts,
    }
