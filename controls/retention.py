"""Effects to numbers with intervals: retention and its verdict, slope, matched scale, the shape of a
dose-response curve.

An effect is an array (P prompts, S seeds, K scales), float64; the scales ascend and contain 0, where the
effect is 0. An interval is one of `controls.intervals`, over prompts.
"""

import numpy as np
from scipy.interpolate import make_interp_spline
from scipy.special import stdtrit

from controls.intervals import (
    LEVEL,
    UNDEFINED,
    below,
    centre,
    difference,
    equivalence,
    mean,
    ratio,
    units,
    within,
)

DEAD = 0.2  # a retention below is as good as none
WEAK = 0.1  # of what the words themselves achieve: a control that does less on its own source has no effect
SATURATED = 0.5  # of its first slope: where a curve has less left, it is saturated
GRID = 401  # points at which a curve is read between its scales


def slope(scales: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Effect per unit of scale: least squares through the origin.

    scales: (K,). curve: (..., K). Returns (...).
    """
    scales = np.asarray(scales, dtype=np.float64)
    return np.asarray(curve) @ scales / (scales @ scales)


def window(effect: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Where a control's mean curve is not yet saturated, as a mask (K,) of scales, 0 among them.

    On each side of 0 as far as every step still has SATURATED times the slope of the first one.
    """
    scales, curve = _checked(scales, effect), effect.mean((0, 1))
    inside, zero = scales == 0, int(np.flatnonzero(scales == 0)[0])
    for side in (range(zero, len(scales) - 1), range(zero - 1, -1, -1)):
        slopes = [(curve[k + 1] - curve[k]) / (scales[k + 1] - scales[k]) for k in side]
        for k, rise in zip(side, slopes, strict=True):
            if rise * np.sign(slopes[0]) < SATURATED * abs(slopes[0]):
                break
            inside[k + 1 if k >= zero else k] = True
    return inside


def estimate(effect: np.ndarray, scales: np.ndarray, inside: np.ndarray | None = None) -> dict:
    """The slope over the scales `inside` (all, unless given) and the effect at each scale, with intervals.

    Returns {"slope": interval, "effect": [interval per scale]}. Raises ValueError when effect and scales do
    not fit.
    """
    scales = _checked(scales, effect)
    inside = np.ones(len(scales), bool) if inside is None else inside
    return {
        "slope": mean(units(slope(scales[inside], effect[..., inside]))),
        "effect": [mean(column) for column in units(effect).T],
    }


def tests(source: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """p of every claim that a verdict can make of mean(target) / mean(source); paired values (n,)."""
    return {
        "reversed": below(target, source, 0.0),
        "dead": below(target, source, DEAD),
        "equivalence": equivalence(target, source),
        "difference": difference(target, source),
    }


def slope_retention(
    source: np.ndarray, target: np.ndarray, scales: np.ndarray, inside: np.ndarray | None = None
) -> dict:
    """How much of the source's slope is left on the target: the small-signal number beside the headline's.

    source, target: (P, S, K), same prompts, seeds and scales; `inside` is the source's `window` unless given.
    All None where the interval of the source's slope contains 0.
    """
    below, above = slopes(source, target, scales, inside)
    return ratio(above, below)


def slopes(
    source: np.ndarray, target: np.ndarray, scales: np.ndarray, inside: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The slopes of source and target per independent unit, (n,) each, over the scales `inside`: the source's
    `window` unless given.
    """
    scales = _checked(scales, source, target)
    inside = window(source, scales) if inside is None else inside
    return tuple(units(slope(scales[inside], effect[..., inside])) for effect in (source, target))


def matched_scale(source: np.ndarray, target: np.ndarray, scales: np.ndarray) -> dict:
    """The positive scale, of several the one nearest to 1, at which the target's mean effect equals the
    source's at scale 1.

    Curves are cubic splines through the scales, which are linear in the effects. The interval holds the
    scales around it at which a test of equal effects does not reject. None stands for "beyond the largest
    scale"; all None where the interval of the source's effect at 1 contains 0. "reach" says what comes
    nearest: the largest share of the wanted effect, and at which scale. Raises ValueError when the scales end
    before 1.
    """
    scales = _checked(scales, source, target)
    if scales[-1] < 1:
        raise ValueError(
            f"a matched scale needs the source's effect at scale 1, but the scales end at {scales[-1]:g}"
        )
    grid = np.linspace(0, scales[-1], GRID)
    wanted, there = (
        units(source) @ _spline(scales, np.array([1.0]))[0],
        units(target) @ _spline(scales, grid).T,
    )  # (n,), (n, G)
    start = mean(wanted)
    if start["low"] is None or start["low"] <= 0 <= start["high"]:
        return {**UNDEFINED, "reach": None}
    shares = there.mean(0) / wanted.mean()
    best = int(shares.argmax())
    reach = {"share": float(shares[best]), "scale": float(grid[best])}
    gap, error, quantile = centre(there - wanted[:, None], LEVEL)  # (G,)
    where, alike = crossing(grid, gap), np.abs(gap) <= quantile * error + 1e-12
    near = int(np.abs(grid - where).argmin()) if where is not None else best
    if where is None and not alike[near]:
        return {**UNDEFINED, "reach": reach}
    low, high = near, near
    while low > 0 and alike[low - 1]:
        low -= 1
    while high < GRID - 1 and alike[high + 1]:
        high += 1
    ends = (
        min(grid[low], where or np.inf),
        None if high == GRID - 1 and where != grid[-1] else max(grid[high], where or 0.0),
    )
    return {
        "value": where,
        "low": float(ends[0]),
        "high": ends[1] if ends[1] is None else float(ends[1]),
        "reach": reach,
    }


def height(kept: float | None, source: np.ndarray, target: np.ndarray) -> float:
    """By what a target's curve, known from few prompts, is to be multiplied to have the retention that many
    prompts show at one scale: the few give a curve its shape, the many its height.

    source, target: effects (P, S) of the few at that scale. 1 where either retention is none or not positive.
    """
    few = target.mean() / source.mean() if source.mean() else 0.0
    return kept / few if kept is not None and kept > 0 and few > 0 else 1.0


def crossing(grid: np.ndarray, gap: np.ndarray) -> float | None:
    """The place nearest to 1 at which a gap (G,) on a grid (G,) passes through 0, between points on a line;
    None where it never does.
    """
    k = np.flatnonzero(gap[:-1] * gap[1:] <= 0)
    rise = gap[k] - gap[k + 1]
    places = grid[k] + np.where(rise == 0, 0, gap[k] / np.where(rise == 0, 1, rise)) * (grid[k + 1] - grid[k])
    return float(places[np.abs(places - 1).argmin()]) if len(k) else None


def shape(effect: np.ndarray, scales: np.ndarray) -> dict:
    """A dose-response curve in numbers.

    area: interval of the integral of the effect over the scales, negative ones counted the other way round.
    saturation: the positive scale beyond which the mean curve has less than SATURATED of its first slope,
    None where it goes on. monotonicity: Kendall's tau-b between scale and effect per (prompt, seed),
    averaged. signs: share of effects on the side of 0 that their scale is on. smoothness of the mean curve: 1
    where each step takes the share of the change that it has of the scales, 0 where one step takes all.
    """
    scales, curve = _checked(scales, effect), effect.mean((0, 1))
    last = scales[window(effect, scales)][-1]
    steps, widths = np.abs(np.diff(curve)), np.diff(scales) / np.ptp(scales)
    shares, worst = steps / steps.sum() if steps.any() else widths, 1 - widths.min()
    return {
        "area": mean(units(np.trapezoid(effect * np.sign(scales), scales))),
        "saturation": None if last == scales[-1] else float(last),
        "monotonicity": monotonicity(effect, scales),
        "signs": float((np.sign(effect) == np.sign(scales))[..., scales != 0].mean()),
        "smoothness": float(1 - np.abs(shares - widths).sum() / 2 / worst) if worst else 1.0,
    }


def monotonicity(effect: np.ndarray, scales: np.ndarray) -> float:
    """Kendall's tau-b between scale and effect, averaged over (prompt, seed): 1 always rising, -1 always
    falling.

    A trajectory that never changes counts as 0.
    """
    scales = _checked(scales, effect)
    i, j = np.triu_indices(len(scales), 1)
    rises = np.sign(effect[..., j] - effect[..., i])  # (P, S, pairs)
    untied = np.abs(rises).sum(-1)
    tau = rises.sum(-1) / np.sqrt(np.maximum(untied, 1) * len(i))
    return float(tau.mean())


def at(values: np.ndarray, scales: np.ndarray, scale: float) -> np.ndarray:
    """Values (..., K) between their scales, on straight lines: (...)."""
    k = int(np.clip(np.searchsorted(scales, scale), 1, len(scales) - 1))
    share = (scale - scales[k - 1]) / (scales[k] - scales[k - 1])
    return (1 - share) * values[..., k - 1] + share * values[..., k]


def differ(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether two retentions differ, by the same prompts: effects on source and target (n,) of each.

    Where the ratios' difference has a 95 % interval without 0, by the delta method: the mean of each prompt's
    (target - retention · source) / mean(source), whose variance is that of a ratio.
    """
    parts = [(above - above.mean() / below.mean() * below) / below.mean() for below, above in (one, other)]
    gap = one[1].mean() / one[0].mean() - other[1].mean() / other[0].mean()
    interval = mean(parts[0] - parts[1])
    if interval["low"] is None:
        return False
    return bool(abs(gap) > (interval["high"] - interval["low"]) / 2)


def spread(source: np.ndarray, target: np.ndarray) -> dict | None:
    """How far retention varies between prompts, and between seeds of a prompt; None below two prompts.

    source, target: effects (P, S) at one scale. The standard deviations of target - retention · source in
    units of the source's effect: they make the interval of a retention wide, so that a measurement can be
    planned by them. With one seed per prompt all of it counts as the prompts'.
    """
    if len(source) < 2 or not source.mean():
        return None
    rest = (target - target.mean() / source.mean() * source) / source.mean()
    seeds = float(rest.var(1, ddof=1).mean()) if rest.shape[1] > 1 else 0.0
    between = rest.mean(1).var(ddof=1) - seeds / rest.shape[1]
    return {"prompts": float(np.sqrt(max(between, 0))), "seeds": float(np.sqrt(seeds))}


def detectable(prompts: int, seeds: int, spread: dict, error: float = 1 - LEVEL, power: float = 0.8) -> float:
    """The smallest difference of a retention from 1 that a design tells from 0 in `power` of cases, two-sided
    with a probability `error` of a mistake: .05 of a cell alone, a share of that where a table is corrected.
    """
    freedom = prompts - 1
    if freedom < 1:
        return float("inf")
    one = np.sqrt(spread["prompts"] ** 2 / prompts + spread["seeds"] ** 2 / (prompts * seeds))
    return float((stdtrit(freedom, 1 - error / 2) + stdtrit(freedom, power)) * one)


def verdict(retention: dict, p: dict[str, float]) -> str:
    """One word for a retention, by the p of `tests`, corrected for the size of the table and for looks; the
    first row that holds decides.

    | word      | when                                                                        |
    |-----------|-----------------------------------------------------------------------------|
    | undefined | no retention: the source's own effect cannot be told from none              |
    | reversed  | p <= .05 that it lies below 0                                               |
    | dead      | p <= .05 that it lies below DEAD                                            |
    | kept      | p <= .05 that it lies within MARGIN                                         |
    | weaker    | p <= .05 that it differs from 1, and it is below                            |
    | stronger  | p <= .05 that it differs from 1, and it is above                            |
    | unclear   | otherwise: more prompts would help                                          |
    """
    if None in retention.values():
        return "undefined"
    shown = {claim: value <= 1 - LEVEL + 1e-12 for claim, value in p.items()}
    rows = {
        "reversed": shown["reversed"],
        "dead": shown["dead"],
        "kept": shown["equivalence"],
        "weaker": shown["difference"] and retention["value"] < 1,
        "stronger": shown["difference"] and retention["value"] > 1,
    }
    return next((word for word, holds in rows.items() if holds), "unclear")


def decided(word: str, retention: dict) -> bool:
    """Whether more images would hardly change a verdict: one is reached, and `weaker` is not on its way to
    dead, or known well enough.
    """
    dying = word == "weaker" and retention["low"] <= DEAD and not within(retention, DEAD / 2)
    return word not in ("unclear", "undefined") and not dying


def _checked(scales: np.ndarray, *effects: np.ndarray) -> np.ndarray:
    """The scales as float64, once they and the effects are known to fit each other."""
    scales = np.asarray(scales, dtype=np.float64)
    if scales.ndim != 1 or np.any(np.diff(scales) <= 0) or 0 not in scales or len(scales) < 2:
        raise ValueError(f"scales must ascend, contain 0 and be at least two, not {scales.tolist()}")
    for effect in effects:
        if effect.ndim != 3 or effect.shape != effects[0].shape or effect.shape[-1] != len(scales):
            shapes = ", ".join(str(e.shape) for e in effects)
            raise ValueError(
                f"effects must be (prompts, seeds, {len(scales)} scales) and paired, not {shapes}"
            )
        if not np.isfinite(effect).all() or np.any(effect[..., scales == 0]):
            raise ValueError("effects must be finite, and exactly 0 at scale 0")
    return scales


def _spline(scales: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The cubic spline through values at the scales, read at places (G,), as a matrix (G, K): it is linear in
    the values.
    """
    return make_interp_spline(scales, np.eye(len(scales)), k=min(3, len(scales) - 1))(places)
