"""Metrics over sets of images, from features: diversity and distance between two sets.

`Spread`, `Moments` and `InceptionScore` take features batch by batch and hold sums, so that their memory does
not grow with the number of images and their time is linear in it; what they give is exact.
"""

from dataclasses import dataclass

import numpy as np

from configs import list_of
from controls.intervals import LEVEL, jackknife, quantile


def distances(features: np.ndarray, kind: str = "cosine") -> np.ndarray:
    """All pairwise distances of features (N, d), as (N, N) with a zero diagonal.

    kind: "cosine" (1 - cos) or "euclidean". Raises ValueError for another.
    """
    x = np.asarray(features, dtype=np.float64)
    if kind == "cosine":
        x = _unit(x)
        table = 1 - x @ x.T
    elif kind == "euclidean":
        x = x - x.mean(0)  # near the origin, |a|² + |b|² - 2ab loses no digits to a common offset
        squares = (x**2).sum(1)
        table = np.sqrt(np.clip(squares[:, None] + squares - 2 * x @ x.T, 0, None))
    else:
        raise ValueError(f"distance {kind!r} is unknown; use cosine or euclidean")
    np.fill_diagonal(table, 0)
    return table


def diversity(features: np.ndarray, kind: str = "cosine") -> dict:
    """Mean distance of two different images of a set, with a 95 % interval from the jackknife over images.

    features: (N, d), N >= 3. Returns {"value", "low", "high"}. A pairwise mean is a U-statistic: its pairs
    are not independent, so what is left out is an image with all its pairs. Unbiased in N.
    """
    n = len(features)
    if n < 3:
        raise ValueError(f"the diversity of a set needs at least 3 images, not {n}")
    table = distances(features, kind)
    value = table.sum() / (n * (n - 1))
    without = (table.sum() - 2 * table.sum(1)) / ((n - 1) * (n - 2))  # (N,)
    return jackknife(value, without)


def frechet(mu_a: np.ndarray, cov_a: np.ndarray, mu_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance of two normal distributions, |mu_a - mu_b|² + tr(A + B - 2 (A^½ B A^½)^½).

    mu: (d,). cov: (d, d), symmetric. Never negative. Source: Heusel et al. 2017, eq. 6, in its symmetric
    form.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    inner = np.linalg.eigvalsh(root @ cov_b @ root)
    apart = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    return float(max(np.sum((mu_a - mu_b) ** 2) + apart, 0))


@dataclass
class Moments:
    """Count, sum and second moment of features, added batch by batch; sums of the same set may be added and
    taken away.
    """

    n: int = 0
    total: np.ndarray | float = 0.0  # (d,)
    second: np.ndarray | float = 0.0  # (d, d), sum of x xᵀ

    def add(self, features: np.ndarray) -> "Moments":
        """features: (n, d). Returns self."""
        x = np.asarray(features, dtype=np.float64)
        self.n, self.total, self.second = self.n + len(x), self.total + x.sum(0), self.second + x.T @ x
        return self

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.total + other.total, self.second + other.second)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.n - other.n, self.total - other.total, self.second - other.second)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased one, (d, d)."""
        return (self.second - np.outer(self.total, self.mean)) / (self.n - 1)

    def frechet(self, other: "Moments") -> float:
        """Fréchet distance of the two normal distributions with these moments."""
        return frechet(self.mean, self.covariance, other.mean, other.covariance)


class Spread:
    """How far apart the images of a set are: mean pairwise distance, its jackknife, and the Vendi score, from
    sums alone.

    kind: "cosine", 1 - cos; or "squared", half the squared Euclidean distance, whose mean is the total
    variance. Both are |a - b|² / 2, of unit vectors and of the features as they are. `origin` (d,) is taken
    off squared features, for digits' sake.
    """

    def __init__(self, kind: str = "cosine", origin: np.ndarray | float = 0.0):
        if kind not in ("cosine", "squared"):
            raise ValueError(f"distance {kind!r} is unknown; use cosine or squared")
        self.kind, self.origin = kind, origin
        self.moments, self.weighted, self.squares, self.fourths = Moments(), 0.0, 0.0, 0.0

    def add(self, features: np.ndarray) -> "Spread":
        """features: (n, d). Returns self."""
        x = np.asarray(features, dtype=np.float64)
        x = _unit(x) if self.kind == "cosine" else x - self.origin
        lengths = (x**2).sum(1)
        self.moments.add(x)
        self.weighted = self.weighted + lengths @ x
        self.squares, self.fourths = self.squares + lengths.sum(), self.fourths + (lengths**2).sum()
        return self

    def distance(self) -> dict:
        """Mean distance of two different images, its interval from the jackknife over images.

        An image's distances to the others sum to a_i = (n |x_i|² + Q - 2 x_i · S) / 2, Q = Σ |x|², S = Σ x;
        what is left out is a_i. Raises ValueError for fewer than 3 images.
        """
        n, s, q = self.moments.n, self.moments.total, self.squares
        if n < 3:
            raise ValueError(f"the diversity of a set needs at least 3 images, not {n}")
        value = (n * q - s @ s) / (n * (n - 1))
        squares = n**2 * self.fourths + n * q**2 + 4 * s @ self.moments.second @ s
        squares = squares + 2 * n * q * q - 4 * n * self.weighted @ s - 4 * q * s @ s
        variance = max(squares / 4 - (n * q - s @ s) ** 2 / n, 0)  # Σ (a_i - mean a)²
        span = quantile(LEVEL, n - 1) * np.sqrt((n - 1) / n * variance) * 2 / ((n - 1) * (n - 2))
        return {"value": float(value), "low": float(value - span), "high": float(value + span)}

    def vendi(self) -> float:
        """The Vendi score of the cosine kernel, exp of the entropy of K / n: 1 for one image over and over, n
        for orthogonal ones.

        Never compare it across n. K / n and Σ x xᵀ / n have the same eigenvalues. Source: Friedman & Dieng
        2023, arXiv 2210.02410. Raises ValueError for squared distances.
        """
        if self.kind != "cosine":
            raise ValueError("the Vendi score needs a kernel of ones on its diagonal: use cosine")
        values = np.linalg.eigvalsh(self.moments.second / self.moments.n)
        values = values[values > 1e-12]
        return float(np.exp(-(values * np.log(values)).sum()))


@dataclass
class InceptionScore:
    """An Inception-style score from class probabilities, added batch by batch: exp of the mean KL(p(y|x) |
    p(y)). Salimans et al. 2016.
    """

    n: int = 0
    total: np.ndarray | float = 0.0  # (classes,)
    entropy: float = 0.0  # sum of Σ p log p

    def add(self, probabilities: np.ndarray) -> "InceptionScore":
        """probabilities: (n, classes), rows that sum to 1. Returns self."""
        p = np.asarray(probabilities, dtype=np.float64)
        self.n, self.total = self.n + len(p), self.total + p.sum(0)
        self.entropy += float((p * np.log(np.clip(p, 1e-300, None))).sum())
        return self

    def __add__(self, other: "InceptionScore") -> "InceptionScore":
        return InceptionScore(self.n + other.n, self.total + other.total, self.entropy + other.entropy)

    def score(self) -> float:
        """1 where all images look alike to the classifier, the number of classes where each is sure and all
        are met.
        """
        marginal = self.total / self.n
        return float(
            np.exp(self.entropy / self.n - (marginal * np.log(np.clip(marginal, 1e-300, None))).sum())
        )


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """Each point's distance to its k-th nearest other point, (N,). Raises ValueError unless k < N."""
    if not 1 <= k < len(features):
        raise ValueError(
            f"the k-th neighbour needs 1 <= k < {len(features)}, the number of images; got k = {k}"
        )
    return np.sqrt(np.partition(_squares(features, features), k, axis=1)[:, k])


@dataclass
class PRDC:
    """Precision, recall, density and coverage of images against a reference, added batch by batch.

    Holds the reference (R, d) and, for recall, which needs the images' own neighbourhoods, no more than the
    first R images. Sources: Kynkäänniemi et al. 2019, arXiv 1904.06991 (precision, recall); Naeem et al.
    2020, arXiv 2002.09797 (density, coverage).
    """

    reference: np.ndarray  # (R, d)
    k: int = 5
    n: int = 0
    inside: int = 0  # images in some ball of the reference
    balls: int = 0  # balls that hold an image, summed over images
    first: list[np.ndarray] = list_of()
    radii: np.ndarray | None = None  # of the reference, (R,); found where not given

    met: np.ndarray | None = None  # which of the reference have an image in their ball, (R,)

    def __post_init__(self):
        self.radii = radii(self.reference, self.k) if self.radii is None else self.radii
        self.met = np.zeros(len(self.reference), dtype=bool) if self.met is None else self.met

    def add(self, features: np.ndarray) -> "PRDC":
        """features: (n, d). Returns self."""
        within = _squares(self.reference, features) <= self.radii[:, None] ** 2  # (R, n)
        room = len(self.reference) - self.n
        self.first += [np.asarray(features[:room], dtype=np.float64)] if room > 0 else []
        self.n, self.inside, self.balls = (
            self.n + len(features),
            self.inside + int(within.any(0).sum()),
            self.balls + int(within.sum()),
        )
        self.met = self.met | within.any(1)
        return self

    def __add__(self, other: "PRDC") -> "PRDC":
        """Both sets of images against the same reference."""
        counts = (self.n + other.n, self.inside + other.inside, self.balls + other.balls)
        return PRDC(
            self.reference, self.k, *counts, self.first + other.first, self.radii, self.met | other.met
        )

    def scores(self) -> dict[str, float]:
        """The four numbers. Raises ValueError where there are no more than k images."""
        own = np.concatenate(self.first)[: len(self.reference)]
        recall = (_squares(own, self.reference) <= radii(own, self.k)[:, None] ** 2).any(0).mean()
        return {
            "precision": self.inside / self.n,
            "recall": float(recall),
            "density": self.balls / (self.k * self.n),
            "coverage": float(self.met.mean()),
        }


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (A, B) of (A, d) and (B, d), near a common origin; exactly 0 on the
    diagonal of a set with itself.
    """
    same, middle = a is b, np.asarray(a, dtype=np.float64).mean(0)
    a, b = a - middle, b - middle
    table = np.clip((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0, None)
    if same:
        np.fill_diagonal(table, 0)
    return table


def _unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)
