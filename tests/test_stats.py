"""The numbers: closed forms, symmetries, and how often an interval covers the truth."""

import numpy as np
import pytest

from analysis import metrics
from controls import effect, stats

SCALES = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])


def line(strength: float, prompts: int = 6, seeds: int = 3, spread: float = 0.0, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Effects strength · scale, (P, S, K), the strength varying over prompts and the noise over images."""
    random = np.random.default_rng(seed)
    strengths = strength * (1 + spread * random.normal(size=(prompts, 1, 1)))
    return (strengths + noise * random.normal(size=(prompts, seeds, 1))) * SCALES


def test_resamples_stay_within_and_repeat():
    rows, columns = stats.resamples(5, 3, n=50, seed=1)
    assert rows.shape == (50, 5, 1) and columns.shape == (50, 5, 3)
    assert rows.min() == 0 and rows.max() == 4 and columns.min() == 0 and columns.max() == 2
    assert np.array_equal(rows, stats.resamples(5, 3, n=50, seed=1)[0])


def test_curves_are_means_over_the_resampled_images():
    values = line(1, spread=0.3, noise=0.2)
    rows, columns = stats.resamples(6, 3, n=40)
    assert np.allclose(stats.curves(values, n=40), values[rows, columns].mean((1, 2)))


def test_interval_is_percentiles():
    low, high = stats.interval(np.arange(1000.0))
    assert (low, high) == (25, 974)
    assert stats.interval(np.array([1.0, 2.0] + [np.inf] * 98))[1] == np.inf


def test_slope_of_a_line_and_of_an_even_curve():
    assert stats.slope(SCALES, 0.3 * SCALES) == pytest.approx(0.3)
    assert stats.slope(SCALES, SCALES**2) == pytest.approx(0)
    assert stats.slope(SCALES, np.ones((4, 7, 5))).shape == (4, 7)


def test_estimate():
    found = stats.estimate(line(0.5, spread=0.2), SCALES)
    assert found["slope"]["low"] < found["slope"]["value"] < found["slope"]["high"]
    assert found["effect"][2] == {"value": 0, "low": 0, "high": 0}
    assert len(found["effect"]) == 5


def test_retention_of_itself_is_one():
    values = line(0.5, spread=0.2, noise=0.1)
    assert stats.retention(values, values, SCALES) == {"value": 1, "low": 1, "high": 1}


def test_retention_is_a_ratio():
    values = line(0.5, spread=0.2, noise=0.02)
    assert stats.retention(values, -0.4 * values, SCALES)["high"] == pytest.approx(-0.4)
    assert stats.retention(values, 3 * values, SCALES) == pytest.approx(stats.retention(7 * values, 21 * values, SCALES))


def test_retention_needs_an_effect_on_the_source():
    assert stats.retention(line(0.01, noise=1), line(1), SCALES) == stats.UNDEFINED
    assert stats.retention(0 * line(1), line(1), SCALES) == stats.UNDEFINED
    assert stats.matched_scale(0 * line(1), line(1), SCALES) == stats.UNDEFINED


def test_retention_interval_covers_the_truth():
    """Prompts differ in strength and in how much of it is kept; the interval holds the true ratio about 95 times of 100."""
    random, hits, tries = np.random.default_rng(5), 0, 150
    for _ in range(tries):
        strength = 0.05 * (1 + 0.3 * random.normal(size=(12, 1, 1)))
        kept = 0.7 * (1 + 0.2 * random.normal(size=(12, 1, 1)))
        source, target = (effect.change(s * SCALES + 0.03 * random.normal(size=(12, 4, 5)), 2) for s in (strength, strength * kept))
        found = stats.retention(source, target, SCALES, n=300)
        hits += found["low"] <= 0.7 <= found["high"]
    assert 0.90 <= hits / tries <= 0.995


def test_matched_scale_inverts_the_strength():
    assert stats.matched_scale(line(1), line(1), SCALES) == {"value": 1, "low": 1, "high": 1}
    assert stats.matched_scale(line(1), line(0.8), SCALES)["value"] == pytest.approx(1.25)
    assert stats.matched_scale(line(-1), line(-2), SCALES)["value"] == pytest.approx(0.5)


def test_matched_scale_out_of_reach_is_none():
    assert stats.matched_scale(line(1), line(0.3), SCALES) == stats.UNDEFINED
    assert stats.matched_scale(line(1), line(-1), SCALES) == stats.UNDEFINED
    edge = stats.matched_scale(line(1), line(0.55, spread=0.6, seed=3), SCALES)
    assert edge["low"] is not None and edge["high"] is None


def test_crossing_takes_the_smallest_positive_scale():
    hump = np.array([[9.0, 9.0, 0.0, 2.0, 0.0]])
    assert stats.crossing(SCALES, hump, np.array([1.0])) == pytest.approx([0.5])
    assert stats.crossing(SCALES, np.array([[0.0, 0, 0, 1, 1]]), np.array([1.0])) == pytest.approx([1.0])


def test_monotonicity_is_kendalls_tau():
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    values = effect.change(np.random.default_rng(0).integers(0, 4, size=(6, 3, 5)), 2)
    expected = [np.nan_to_num(kendalltau(SCALES, v).statistic) for v in values.reshape(-1, 5)]
    assert stats.monotonicity(values, SCALES) == pytest.approx(np.mean(expected))


def test_monotonicity_at_the_ends():
    assert stats.monotonicity(line(1), SCALES) == 1
    assert stats.monotonicity(line(-1), SCALES) == -1
    assert stats.monotonicity(0 * line(1), SCALES) == 0


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-0.5, -0.1, "reversed"),
        (-0.1, 0.2, "dead"),
        (-0.1, 0.9, "weaker"),
        (0.85, 0.99, "kept"),
        (0.8, 1.25, "kept"),
        (0.5, 0.9, "weaker"),
        (1.1, 1.4, "stronger"),
        (0.7, 1.1, "unclear"),
        (-0.2, 1.5, "unclear"),
        (None, None, "undefined"),
    ],
)
def test_verdict(low, high, word):
    assert stats.verdict({"value": None if low is None else (low + high) / 2, "low": low, "high": high}) == word


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="paired"):
        stats.retention(line(1), line(1, seeds=2), SCALES)
    with pytest.raises(ValueError, match="contain 0"):
        stats.estimate(line(1), SCALES + 0.5)
    with pytest.raises(ValueError, match="exactly 0"):
        stats.estimate(line(1) + 1, SCALES)
    with pytest.raises(ValueError, match="end at"):
        stats.matched_scale(line(1), line(1), SCALES / 4)


def test_change_is_zero_at_scale_zero():
    assert effect.change(np.array([[[-1.0, 1, 3]]]), 1).tolist() == [[[-2, 0, 2]]]


def test_own_directions_come_from_the_other_prompts():
    features = np.zeros((3, 2, 2, 2))
    features[0, :, 1] = [1, 0]
    features[1:, :, 1] = [0, 2]
    found = effect.own_directions(features, 0)
    assert found[0].tolist() == pytest.approx([0, 1]) and found[1].tolist() == pytest.approx([0.4472, 0.8944], abs=1e-4)


def test_percent_change_is_a_ratio_of_means():
    assert effect.percent_change(np.array([0.3, 0.3]), np.array([0.1, 0.4])) == pytest.approx(20)
    assert effect.percent_change(np.array([0.3]), np.array([0.0])) is None
    assert effect.percent_change(np.array([0.3]), np.array([-0.2])) is None


def test_preservation_leaves_the_plain_image_out():
    features = np.array([[[[1.0, 0], [1, 0], [0, 1]]]])
    assert effect.preservation(features, 1) == pytest.approx(0.5)
    assert effect.preservation(np.ones((2, 2, 3, 4)), 1) == pytest.approx(1)


def test_diversity_is_the_mean_pairwise_distance():
    x = np.random.default_rng(0).normal(size=(9, 4))
    pairs = [(a, b) for i, a in enumerate(x) for b in x[:i]]
    assert metrics.diversity(x, "euclidean")["value"] == pytest.approx(np.mean([np.linalg.norm(a - b) for a, b in pairs]))
    assert metrics.diversity(x)["value"] == pytest.approx(np.mean([1 - effect.cosine(a, b) for a, b in pairs]))
    assert metrics.diversity(x)["value"] == pytest.approx(metrics.diversity(5 * x)["value"])
    with pytest.raises(ValueError, match="unknown"):
        metrics.diversity(x, "manhattan")


def test_diversity_interval_is_the_jackknife():
    x = np.random.default_rng(1).normal(size=(8, 3))
    without = np.array([metrics.diversity(np.delete(x, i, 0))["value"] for i in range(8)])
    error = np.sqrt(7 / 8 * ((without - without.mean()) ** 2).sum())
    found = metrics.diversity(x)
    assert found["high"] - found["value"] == pytest.approx(metrics.Z * error)


def test_frechet_closed_forms():
    random = np.random.default_rng(0)
    root = random.normal(size=(4, 4))
    cov, mu = root @ root.T, random.normal(size=4)
    assert metrics.frechet(mu, cov, mu, cov) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(mu, cov, mu + 2, cov) == pytest.approx(16)
    a, b = np.diag([1.0, 4]), np.diag([9.0, 4])
    assert metrics.frechet(np.zeros(2), a, np.zeros(2), b) == pytest.approx(4)
    other = np.diag([1.0, 2, 3, 4])
    assert metrics.frechet(mu, cov, mu, other) == pytest.approx(metrics.frechet(mu, other, mu, cov))
