"""The numbers of a trace: how far x0 is from the final image, when that is little, what it begins and abandons, where a control acts."""

from typing import TYPE_CHECKING

import numpy as np

from analysis.metrics import spanned
from configs import UserError
from controls import stats
from controls.effect import cosine
from models.evaluators import READERS, UNIT, Evaluator

if TYPE_CHECKING:
    from analysis.trace import Config

EXAMPLES = 4  # images of a plan that show what it abandoned


def concept(text: str) -> tuple[str, str, str]:
    """(name, positive, negative) of "name: positive | negative". Raises UserError."""
    name, _, pair = text.partition(":")
    positive, _, negative = pair.partition("|")
    if not (name.strip() and positive.strip() and negative.strip()):
        raise UserError(f"a concept is written 'name: positive description | negative description'; got {text!r}")
    return name.strip(), positive.strip(), negative.strip()


def between(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of features over the last axis: 1 - cosine where they are of unit length, else Euclidean."""
    return 1 - cosine(a, b) if name in UNIT else np.linalg.norm(a - b, axis=-1)


def apart(name: str, features: np.ndarray) -> float:
    """How far two finished images of one prompt are apart on average; features (P, S, T, d)."""
    rows, columns = np.triu_indices(features.shape[1], 1)
    return float(between(name, features[:, rows, -1], features[:, columns, -1]).mean())


def estimate(cfg: "Config", values: np.ndarray) -> list[dict]:
    """Means over prompts and seeds of values (P, S, K), with intervals from the bootstrap over prompts and seeds."""
    draws = stats.curves(values, cfg.draws, cfg.seed)
    return [spanned(value, column) for value, column in zip(values.mean((0, 1)), draws.T, strict=True)]


def committed(cfg: "Config", own: dict, unit: dict[str, float]) -> dict:
    """How far x0 is from the final image at each step, in units of how far two seeds of the base are apart; when that is little."""
    found: dict = {"distance": {}, "commitment": {}}
    for name, one in unit.items():
        far = between(name, own[name], own[name][:, :, -1:]) / one                               # (P, S, T)
        first = (far <= cfg.tolerance).argmax(-1)                                                # (P, S)
        found["distance"][name] = estimate(cfg, far)
        share, t = estimate(cfg, np.stack([(first + 1) / far.shape[-1], own["t"][first]], -1))
        found["commitment"][name] = {"share": share, "t": t}
    return found


def abandoned(cfg: "Config", own: dict, eyes: dict[str, Evaluator], ends: dict[str, np.ndarray]) -> dict:
    """Where a concept's score of x0 falls before the end: the share of images, and the deepest falls with their steps.

    By the attribute probe where there is one, in its own units; else by the first evaluator that reads words, in units of the middle 90 %
    of all finished images.
    """
    name = next((name for name in ("probe", *eyes) if name in eyes and name in READERS), "")
    falls, rises, examples = [], [], []
    for word, positive, negative in map(concept, cfg.concepts if name else ()):
        score = eyes[name].score(own[name], positive, negative)                                  # (P, S, T)
        if name != "probe":
            low, high = np.quantile(eyes[name].score(ends[name], positive, negative), (0.05, 0.95))
            score = (score - low) / (high - low)
        peak = score.max(-1)
        falls.append((peak - score[..., -1] >= cfg.threshold) & (peak >= 0.5))
        rises.append(falls[-1] & (peak - score[..., 0] >= cfg.threshold))
        for p, s in zip(*np.nonzero(falls[-1]), strict=True):
            examples.append({"concept": word, "prompt": cfg.prompts[p], "image": int(p * cfg.seeds + s), "score": score[p, s].tolist(),
                             "fall": float(peak[p, s] - score[p, s, -1]), "rises_first": bool(rises[-1][p, s])})  # fmt: skip
    if not falls:
        return {"evaluator": name, "falls": None, "rises_and_falls": None, "examples": []}
    share = estimate(cfg, np.stack([np.any(falls, 0), np.any(rises, 0)], -1).astype(float))
    examples.sort(key=lambda e: (-e["rises_first"], -e["fall"]))
    return {"evaluator": name, "falls": share[0], "rises_and_falls": share[1], "count": len(examples), "examples": examples[:EXAMPLES]}


def followed(cfg: "Config", eye: Evaluator, name: str, states: dict, pair: tuple[str, str]) -> dict:
    """The effect of a control on x0 at each step, when half of it is there, and what is left of it when it is on in some bands alone."""
    score = {bands: eye.score(found[name], *pair) for bands, found in states.items()}
    effect = score[None] - score[()]                                                             # (P, S, T)
    enters = lambda curve: (curve >= 0.5 * curve[..., -1:]).argmax(-1)  # noqa: E731
    steps, draws = states[()]["t"], stats.curves(effect, cfg.draws, cfg.seed)
    first, firsts = int(enters(effect.mean((0, 1)))), enters(draws)
    found = {"effect": estimate(cfg, effect), "half": {"share": spanned((first + 1) / len(steps), (firsts + 1) / len(steps)),
                                                       "t": spanned(steps[first], steps[firsts])}, "parts": []}  # fmt: skip
    low, high = stats.interval(draws[:, -1])
    for bands in (b for b in score if b):
        final = np.stack([score[bands][..., -1] - score[()][..., -1], effect[..., -1]], -1)
        sums, means = stats.curves(final, cfg.draws, cfg.seed), final.mean((0, 1))
        kept = dict(stats.UNDEFINED) if low <= 0 <= high else spanned(means[0] / means[1], sums[:, 0] / sums[:, 1])
        found["parts"].append({"bands": list(bands), "share": kept})
    return found
