"""Intervals: the only ones of the project.

Numbers of independent units in, a dict {"value", "low", "high"} of floats or None out.

Images of one prompt are alike, so prompts are the units: an interval of a mean is Student's over the prompts'
means, that of a ratio Fieller's, that of a number which only a whole set has the jackknife's over prompts or
blocks, by Student's quantile too. With fewer than two units there is none. In simulation they cover in 93 to
97 % of cases (its tests), where the percentile interval of a bootstrap over prompts covers in 85 to 92
(LOG.md). Claims over a table are corrected for its size by `holm`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import (
    stdtr,
    stdtrit,
)  # Student's distribution and its inverse; scipy.stats takes half a second to import

LEVEL = 0.95
MARGIN = (
    0.8,
    1.25,
)  # a ratio inside counts as the same; symmetric in the logarithm, as in bioequivalence testing
UNDEFINED = {"value": None, "low": None, "high": None}


def units(values: np.ndarray) -> np.ndarray:
    """What is independent: the means over seeds (P, ...) of values (P, S, ...)."""
    return np.asarray(values, dtype=np.float64).mean(1)


def adjusted(values: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Values (n, m) of independent units without what chance put into them: a regression estimator with a
    known mean (Cochran 1977, sec. 7.1), as values whose mean and its error are those of the estimate.

    chance: (n, k), for each unit how far something that goes with the values happened to be from what is
    expected, so 0 in expectation; k of it are fitted, for which deviations are enlarged. Below 5 units a
    fitted one the values themselves.
    """
    n, k = chance.shape
    if n < 5 * (k + 1) - 3:
        return values
    fitted = np.linalg.lstsq(np.c_[np.ones(n), chance], values, rcond=None)[0]
    rest = values - chance @ fitted[1:]
    middle = rest.mean(0)
    return middle + (rest - middle) * np.sqrt((n - 1) / (n - 1 - k) * (1 + k / n))


def mean(values: np.ndarray, level: float = LEVEL) -> dict:
    """The mean of independent values (n,) with Student's interval; no interval for a single one."""
    middle, error, t = centre(np.asarray(values, dtype=np.float64), level)
    return _interval(middle, middle - t * error, middle + t * error)


def ratio(above: np.ndarray, below: np.ndarray, level: float = LEVEL, positive: bool = False) -> dict:
    """mean(above) / mean(below) of paired independent values (n,), with Fieller's interval (Fieller 1954).

    All None where the interval of the denominator contains 0, for then the ratio has no bounds. positive: of
    a denominator that is positive by its nature, as a distance or a variance is, the ratio itself is known
    all the same.
    """
    n, (a, _, t), (b, error, _) = len(below), centre(above, level), centre(below, level)
    if not abs(b) > t * error:
        return _interval(a / b if positive and b else np.nan, np.nan, np.nan)
    (aa, ab), (_, bb) = t**2 * np.cov(above, below) / n if n > 1 else np.zeros((2, 2))
    middle, span = a * b - ab, b**2 - bb
    root = np.sqrt(max(middle**2 - span * (a**2 - aa), 0.0))
    return _interval(a / b, (middle - root) / span, (middle + root) / span)


def jackknife(value: float, without: Sequence[float], level: float = LEVEL) -> dict:
    """The interval of a number that only a whole set has, from the numbers (n,) without one of its n units
    after the other.

    Student's quantile, since n is small (Tukey 1958). No ends with fewer than three units: leaving one out
    must leave a set.
    """
    n, without = len(without), np.asarray(without, dtype=np.float64)
    if n < 3:
        return _interval(value, np.nan, np.nan)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    span = quantile(level, n - 1) * error
    return _interval(value, value - span, value + span)


def equivalence(target: np.ndarray, source: np.ndarray, margin: tuple[float, float] = MARGIN) -> float:
    """p of two one-sided tests (TOST) that mean(target) / mean(source) lies within the margin; paired values
    (n,).

    As tests of the linear contrasts target - margin · source, which need no ratio (Sasabuchi 1980; Hauschke
    et al. 1999). Doubled, so that p <= .05 exactly where the 95 % interval of the ratio lies within the
    margin: at .05 each, skewed slopes claimed it in 5.5 % of cases.
    """
    if len(source) < 2:
        return 1.0
    sign = 1.0 if np.mean(source) >= 0 else -1.0
    low, high = (_t(sign * (target - edge * source)) for edge in margin)
    p = max(stdtr(len(source) - 1, -low), stdtr(len(source) - 1, high))
    return float(min(2 * p, 1.0))


def within(interval: dict, precision: float) -> bool:
    """Whether an interval reaches no further than so much to either side of its middle."""
    return interval["low"] is not None and interval["high"] - interval["low"] <= 2 * precision


def below(target: np.ndarray, source: np.ndarray, share: float) -> float:
    """p of the test that mean(target) / mean(source) lies below a share; paired values (n,).

    Doubled, so that p <= .05 exactly where the 95 % interval of the ratio ends below the share.
    """
    if len(source) < 2:
        return 1.0
    sign = 1.0 if np.mean(source) >= 0 else -1.0
    return float(min(2 * stdtr(len(source) - 1, _t(sign * (target - share * source))), 1.0))


def difference(target: np.ndarray, source: np.ndarray) -> float:
    """p of the two-sided test that the means of paired values (n,) are equal."""
    if len(source) < 2:
        return 1.0
    return float(2 * stdtr(len(source) - 1, -abs(_t(target - source))))


def holm(p: list[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979): those at most at a level hold together."""
    order, adjusted, worst = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def spending(looks: int) -> list[float]:
    """The shares of an error that each of several looks at growing data may spend: they rise, since the last
    ones see most, and add up to 1.
    """
    return [2 * (look + 1) / (looks * (looks + 1)) for look in range(looks)]


def over_looks(p: Sequence[float], shares: Sequence[float]) -> float:
    """The p value of a test that was made at each of the first looks: the least p over its error's share.

    Valid whatever made one stop looking (Bonferroni over looks with unequal weights; alpha spending, Lan &
    DeMets 1983).
    """
    return min(1.0, *(value / share for value, share in zip(p, shares, strict=False)))


def centre(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, its standard error and Student's quantile of independent values (n, ...); infinite for a single
    one.
    """
    n = len(values)
    if n < 2:
        return values.mean(0), np.full(values.shape[1:], np.inf), 1.0
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(n), quantile(level, n - 1)


@cache
def quantile(level: float, freedom: int) -> float:
    """Student's: within so many standard errors of the mean lies `level` of what is drawn."""
    return float(stdtrit(freedom, (1 + level) / 2))


def _t(values: np.ndarray) -> float:
    """Student's t of independent values (n,) against 0; the limit where they are all the same."""
    middle, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    scale = 1e-12 * (1 + abs(values).max())
    if error > scale:
        return float(middle / error)
    return float(np.inf * np.sign(middle)) if abs(middle) > scale else 0.0


def _interval(value: float, low: float, high: float) -> dict:
    """An interval dict; what is not finite becomes None."""
    numbers = zip(("value", "low", "high"), (float(value), float(low), float(high)), strict=True)
    return {name: number if np.isfinite(number) else None for name, number in numbers}
