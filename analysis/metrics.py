"""Metrics over sets of images, from features: diversity and distance between two sets."""

import numpy as np

Z = 1.959964  # 97.5 % point of the normal


def distances(features: np.ndarray, kind: str = "cosine") -> np.ndarray:
    """All pairwise distances of features (N, d), as (N, N) with a zero diagonal.

    kind: "cosine" (1 - cos) or "euclidean". Raises ValueError for another.
    """
    x = np.asarray(features, dtype=np.float64)
    if kind == "cosine":
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(lengths == 0, 1, lengths)
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

    features: (N, d), N >= 3. Returns {"value", "low", "high"}. A pairwise mean is a U-statistic: its pairs are not independent, so
    what is left out is an image with all its pairs. Unbiased in N.
    """
    n = len(features)
    if n < 3:
        raise ValueError(f"the diversity of a set needs at least 3 images, not {n}")
    table = distances(features, kind)
    value = table.sum() / (n * (n - 1))
    without = (table.sum() - 2 * table.sum(1)) / ((n - 1) * (n - 2))                             # (N,)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return {"value": float(value), "low": float(value - Z * error), "high": float(value + Z * error)}


def frechet(mu_a: np.ndarray, cov_a: np.ndarray, mu_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance of two normal distributions, |mu_a - mu_b|² + tr(A + B - 2 (A^½ B A^½)^½).

    mu: (d,). cov: (d, d), symmetric. Never negative. Source: Heusel et al. 2017, eq. 6, in its symmetric form.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    inner = np.linalg.eigvalsh(root @ cov_b @ root)
    apart = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    return float(max(np.sum((mu_a - mu_b) ** 2) + apart, 0))
