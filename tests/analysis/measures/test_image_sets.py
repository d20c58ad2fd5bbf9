"""Streaming metrics against closed forms, brute force and simulation; their memory and time."""

import tracemalloc

import numpy as np
import pytest

from analysis.measures import image_sets
from analysis.measures.image_sets import PRDC, InceptionScore, Moments, Spread
from controls.intervals import quantile


def some(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + 1


@pytest.mark.parametrize("sizes", [[12], [1, 4, 7], [3] * 4])
def test_spread_is_the_diversity_of_the_whole_set(sizes):
    x, spread = some(12), Spread()
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        spread.add(part)
    assert spread.distance() == pytest.approx(image_sets.diversity(x))


def test_squared_spread_is_the_variance_and_its_jackknife():
    x = some(9)
    found = Spread("squared", origin=x[0]).add(x).distance()
    assert found["value"] == pytest.approx(x.var(0, ddof=1).sum())
    without = np.array([np.delete(x, i, 0).var(0, ddof=1).sum() for i in range(9)])
    assert (found["high"] - found["value"]) / quantile(0.95, 8) == pytest.approx(
        np.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum())
    )


@pytest.mark.parametrize(("kind", "images"), [("cosine", 8), ("cosine", 20), ("squared", 60)])
def test_the_jackknife_covers_the_truth(kind, images):
    """Normal features around a common middle, as images of one prompt are; a variance of few is skewed."""
    random, middle, width = (
        np.random.default_rng(3),
        np.eye(8)[0] * 2,
        np.array([1, 2, 1, 0.5, 0.5, 0.5, 0.3, 0.3]),
    )
    truth = Spread(kind).add(middle + width * random.normal(size=(200_000, 8))).distance()["value"]
    found = [
        Spread(kind).add(middle + width * random.normal(size=(images, 8))).distance() for _ in range(1000)
    ]
    assert 0.92 <= np.mean([f["low"] <= truth <= f["high"] for f in found]) <= 0.98


def test_the_jackknife_is_cautious_where_no_image_is_special():
    """Isotropic features: two of them are orthogonal on average, and a pairwise mean is degenerate."""
    random = np.random.default_rng(2)
    found = [Spread().add(random.normal(size=(20, 8))).distance() for _ in range(600)]
    assert np.mean([f["low"] <= 1 <= f["high"] for f in found]) >= 0.95


def test_vendi_closed_forms():
    assert Spread().add(np.ones((7, 3))).vendi() == pytest.approx(1)
    assert Spread().add(5 * np.eye(7)).vendi() == pytest.approx(7)
    assert Spread().add(np.repeat(np.eye(4), [3, 3, 3, 3], 0)).vendi() == pytest.approx(4)
    shares = np.array([0.5, 0.25, 0.25])  # unequal shares: exp of their entropy
    assert Spread().add(np.repeat(np.eye(3), [4, 2, 2], 0)).vendi() == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum())
    )


def test_vendi_is_that_of_the_kernel():
    x = some(15, 4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 15)
    values = values[values > 1e-12]
    assert Spread().add(x[:4]).add(x[4:]).vendi() == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_moments_are_those_of_the_whole_set():
    x = some(40)
    a, b = Moments().add(x[:15]), Moments().add(x[15:])
    assert np.allclose((a + b).mean, x.mean(0)) and np.allclose((a + b).covariance, np.cov(x.T))
    assert np.allclose(((a + b) - a).covariance, b.covariance)
    assert (a + b).frechet(a) == pytest.approx(
        image_sets.frechet(x.mean(0), np.cov(x.T), x[:15].mean(0), np.cov(x[:15].T))
    )


def test_frechet_of_two_shifted_scaled_sets():
    """Diagonal normals: |mu_a - mu_b|² + Σ (s_a - s_b)²."""
    x = some(200_000, 3)
    a, b = Moments().add(x), Moments().add(3 * x + np.array([1.0, 0, 0]))
    expected = ((x.mean(0) - (3 * x + np.array([1.0, 0, 0])).mean(0)) ** 2).sum() + (
        (2 * x.std(0, ddof=1)) ** 2
    ).sum()
    assert a.frechet(b) == pytest.approx(expected, rel=1e-6)


def test_sharpness_closed_forms():
    assert InceptionScore().add(np.full((5, 4), 0.25)).score() == pytest.approx(1)
    assert InceptionScore().add(np.eye(4)).add(np.eye(4)).score() == pytest.approx(4)
    p = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    by_hand = np.exp(np.mean([(row * np.log(row / p.mean(0))).sum() for row in p]))
    assert InceptionScore().add(p[:20]).add(p[20:]).score() == pytest.approx(by_hand)
    assert (InceptionScore().add(p[:20]) + InceptionScore().add(p[20:])).score() == pytest.approx(by_hand)


def brute(reference, images, k):
    """Precision, recall, density, coverage in plain loops."""

    def apart(a, b):
        return float(np.linalg.norm(a - b))

    def ball(points):
        return [sorted(apart(p, q) for q in points)[k] for p in points]

    real, made = ball(reference), ball(images)
    hits = np.array(
        [[apart(r, x) <= radius for x in images] for r, radius in zip(reference, real, strict=True)]
    )
    back = np.array(
        [[apart(r, x) <= radius for r in reference] for x, radius in zip(images, made, strict=True)]
    )
    return {
        "precision": hits.any(0).mean(),
        "recall": back.any(0).mean(),
        "density": hits.sum() / (k * len(images)),
        "coverage": hits.any(1).mean(),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_against_plain_loops(k):
    reference, images = some(30, 3), some(25, 3, seed=1) * 0.7 + 0.5
    found = PRDC(reference, k).add(images[:10]).add(images[10:]).scores()
    assert found == pytest.approx(brute(reference, images, k))
    assert 0 < found["recall"] < 1 and 0 < found["precision"]
    apart = [PRDC(reference, k).add(part) for part in (images[:10], images[10:])]
    assert (apart[0] + apart[1]).scores() == pytest.approx(found)


def test_neighbours_at_the_ends():
    reference = some(20)
    same = PRDC(reference, 3).add(reference.copy()).scores()
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and same["density"] >= 1
    far = PRDC(reference, 3).add(reference + 100).scores()
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    with pytest.raises(ValueError, match="k = 20"):
        PRDC(reference, 20)


@pytest.mark.parametrize("make", [Spread, Moments, InceptionScore, lambda: PRDC(some(50, 32), 3)])
def test_memory_does_not_grow_with_the_number_of_images(make):
    """What is held after 20 and after 200 batches is the same."""

    def run(batches: int) -> int:
        random = np.random.default_rng(0)
        tracemalloc.start()
        kept = make()
        for _ in range(batches):
            batch = random.random((64, 32))
            kept.add(batch / batch.sum(1, keepdims=True))
        del batch
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    run(20)  # what numpy keeps for itself
    assert run(200) <= run(20) + 4096


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ValueError, match="at least 3"):
        Spread().add(some(2)).distance()
    with pytest.raises(ValueError, match="unknown"):
        Spread("manhattan")
    with pytest.raises(ValueError, match="cosine"):
        Spread("squared").add(some(3)).vendi()
