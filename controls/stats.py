"""Effects to numbers with intervals: slope, retention, matched scale, monotonicity, verdict.

An effect is an array (P prompts, S seeds, K scales), float64; the scales ascend and contain 0, where the effect is 0. Every interval
comes from one bootstrap that draws prompts, then seeds within each drawn prompt: images of one prompt are alike, and a bootstrap over
images covers a ratio in 80 % of cases instead of 95 %. The draws depend only on (P, S, n, seed), so that source and target are paired.
An interval is a dict {"value", "low", "high"} of floats or None, ready for JSON.
"""

import numpy as np

LEVEL = 0.95
MARGIN = (0.8, 1.25)  # a retention inside counts as kept; symmetric in the logarithm, as in bioequivalence testing
UNDEFINED = {"value": None, "low": None, "high": None}


def resamples(prompts: int, seeds: int, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of n hierarchical bootstrap draws: prompts, then seeds within each drawn prompt.

    Returns rows (n, P, 1) and columns (n, P, S), so that effect[rows, columns] is (n, P, S, K).
    """
    random = np.random.default_rng(seed)
    return random.integers(prompts, size=(n, prompts, 1)), random.integers(seeds, size=(n, prompts, seeds))


def curves(effect: np.ndarray, n: int = 2000, seed: int = 0) -> np.ndarray:
    """The mean effect per scale of n bootstrap draws, (n, K)."""
    prompts, seeds, _ = effect.shape
    rows, columns = resamples(prompts, seeds, n, seed)
    flat = rows * seeds + columns                                                                # (n, P, S)
    weights = np.stack([np.bincount(draw, minlength=prompts * seeds) for draw in flat.reshape(n, -1)])  # (n, P·S)
    return weights @ effect.reshape(prompts * seeds, -1) / (prompts * seeds)


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The central percentile interval of draws (n,), whose ends are draws: infinite ones are allowed."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def slope(scales: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Effect per unit of scale: least squares through the origin.

    scales: (K,). curve: (..., K). Returns (...).
    """
    scales = np.asarray(scales, dtype=np.float64)
    return np.asarray(curve) @ scales / (scales @ scales)


def estimate(effect: np.ndarray, scales: np.ndarray, n: int = 2000, seed: int = 0) -> dict:
    """The slope and the effect at each scale, with intervals.

    Returns {"slope": interval, "effect": [interval per scale]}. Raises ValueError when effect and scales do not fit.
    """
    scales = _checked(scales, effect)
    mean, draws = effect.mean((0, 1)), curves(effect, n, seed)
    points = [_reading(value, column) for value, column in zip(mean, draws.T, strict=True)]
    return {"slope": _reading(slope(scales, mean), slope(scales, draws)), "effect": points}


def retention(source: np.ndarray, target: np.ndarray, scales: np.ndarray, n: int = 2000, seed: int = 0) -> dict:
    """How much of the source's slope is left on the target: their ratio, with the interval of the paired bootstrap.

    source, target: (P, S, K), same prompts, seeds and scales. All None where the interval of the source's slope contains 0.
    """
    scales = _checked(scales, source, target)
    below, above = slope(scales, curves(source, n, seed)), slope(scales, curves(target, n, seed))
    if _contains(interval(below), 0):
        return dict(UNDEFINED)
    with np.errstate(divide="ignore"):
        return _reading(slope(scales, target.mean((0, 1))) / slope(scales, source.mean((0, 1))), above / below)


def matched_scale(source: np.ndarray, target: np.ndarray, scales: np.ndarray, n: int = 2000, seed: int = 0) -> dict:
    """The smallest positive scale at which the target's mean effect equals the source's at scale 1.

    Mean curves are taken as piecewise linear. None stands for "beyond the largest scale"; all None where the interval of the source's
    effect at 1 contains 0. Raises ValueError when the scales end before 1.
    """
    scales = _checked(scales, source, target)
    if scales[-1] < 1:
        raise ValueError(f"a matched scale needs the source's effect at scale 1, but the scales end at {scales[-1]:g}")
    wanted = _at_one(scales, curves(source, n, seed))
    if _contains(interval(wanted), 0):
        return dict(UNDEFINED)
    value = crossing(scales, target.mean((0, 1))[None], _at_one(scales, source.mean((0, 1))[None]))[0]
    return _reading(value, crossing(scales, curves(target, n, seed), wanted))


def crossing(scales: np.ndarray, curve: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The smallest scale >= 0 at which each piecewise-linear curve (N, K) meets its level (N,); infinite where it never does."""
    positive = scales >= 0
    x, gap = scales[positive], curve[:, positive] - level[:, None]
    left, right = gap[:, :-1], gap[:, 1:]
    meets = left * right <= 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(left == right, 0, left / (left - right))
    places = np.where(meets, x[:-1] + share * np.diff(x), np.inf)
    return places.min(1)


def monotonicity(effect: np.ndarray, scales: np.ndarray) -> float:
    """Kendall's tau-b between scale and effect, averaged over (prompt, seed): 1 always rising, -1 always falling.

    A trajectory that never changes counts as 0.
    """
    scales = _checked(scales, effect)
    i, j = np.triu_indices(len(scales), 1)
    rises = np.sign(effect[..., j] - effect[..., i])                                             # (P, S, pairs)
    untied = np.abs(rises).sum(-1)
    tau = rises.sum(-1) / np.sqrt(np.maximum(untied, 1) * len(i))
    return float(tau.mean())


def verdict(retention: dict, margin: tuple[float, float] = MARGIN) -> str:
    """One word for a retention interval; the first row that holds decides.

    | word      | when                                                           |
    |-----------|----------------------------------------------------------------|
    | undefined | no retention: the source's own slope cannot be told from 0     |
    | reversed  | high < 0                                                       |
    | dead      | low <= 0 <= high, and high below the margin                    |
    | kept      | the whole interval inside the margin [0.8, 1.25]               |
    | weaker    | high < 1                                                       |
    | stronger  | low > 1                                                        |
    | unclear   | otherwise: too wide to tell; more prompts would help           |
    """
    low, high = retention["low"], retention["high"]
    if retention["value"] is None or low is None or high is None:
        return "undefined"
    rows = {
        "reversed": high < 0,
        "dead": low <= 0 and high < margin[0],
        "kept": margin[0] <= low and high <= margin[1],
        "weaker": high < 1,
        "stronger": low > 1,
    }
    return next((word for word, holds in rows.items() if holds), "unclear")


def _checked(scales: np.ndarray, *effects: np.ndarray) -> np.ndarray:
    """The scales as float64, once they and the effects are known to fit each other."""
    scales = np.asarray(scales, dtype=np.float64)
    if scales.ndim != 1 or np.any(np.diff(scales) <= 0) or 0 not in scales or len(scales) < 2:
        raise ValueError(f"scales must ascend, contain 0 and be at least two, not {scales.tolist()}")
    for effect in effects:
        if effect.ndim != 3 or effect.shape != effects[0].shape or effect.shape[-1] != len(scales):
            shapes = ", ".join(str(e.shape) for e in effects)
            raise ValueError(f"effects must be (prompts, seeds, {len(scales)} scales) and paired, not {shapes}")
        if not np.isfinite(effect).all() or np.any(effect[..., scales == 0]):
            raise ValueError("effects must be finite, and exactly 0 at scale 0")
    return scales


def _at_one(scales: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The value of each piecewise-linear curve (N, K) at scale 1, (N,)."""
    k = int(np.clip(np.searchsorted(scales, 1), 1, len(scales) - 1))
    share = (1 - scales[k - 1]) / (scales[k] - scales[k - 1])
    return (1 - share) * curve[:, k - 1] + share * curve[:, k]


def _contains(ends: tuple[float, float], value: float) -> bool:
    return ends[0] <= value <= ends[1]


def _reading(value: float, draws: np.ndarray) -> dict:
    """An interval dict; what is not finite becomes None."""
    numbers = zip(("value", "low", "high"), (float(value), *interval(draws)), strict=True)
    return {name: number if np.isfinite(number) else None for name, number in numbers}
