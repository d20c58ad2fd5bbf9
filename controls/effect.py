"""Features to effects: what a control changes, and what it should have left alone.

Arrays are numpy; P prompts, S seeds, K scales, d features. Which network made the features is not asked here.
"""

import numpy as np

from controls import intervals


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity over the last axis, (..., d) with (..., d) to (...); 0 where a vector is 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.where(lengths == 0, 1, lengths)


def change(score: np.ndarray, zero_index: int) -> np.ndarray:
    """A score (P, S, K) minus its own value at scale 0: the effect, exactly 0 at scale 0."""
    score = np.asarray(score, dtype=np.float64)
    return score - score[..., zero_index, None]


def own_direction(plain: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """Where a control without words moves images: the mean change of their features, unit length, (d,); 0
    without one.

    plain, edited: (..., d), the same images without and with it. They are not among the images that are
    measured along it: a direction that was fitted to an image always finds an effect in it.
    """
    moved = (edited - plain).reshape(-1, plain.shape[-1]).mean(0)
    length = np.linalg.norm(moved)
    return moved / length if length else moved


def without(features: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Features (..., d) projected off a direction (d,) of unit length."""
    return features - (features @ direction)[..., None] * direction


def percent_change(edited: np.ndarray, plain: np.ndarray) -> dict:
    """Change of the mean CLIP score in %, the column of the paper's Table 1, with its interval over prompts.

    edited, plain: cosines (P, S) of the images at a scale and at scale 0 with the control's text. A ratio of
    means, not a mean of ratios; None where the plain mean cannot be told from 0, for a percentage of nearly
    nothing says nothing. Source: Gandikota & Bau 2025, arXiv 2503.10637, Table 1.
    """
    share = intervals.ratio(intervals.units(edited), intervals.units(plain))
    return {end: None if value is None else 100 * (value - 1) for end, value in share.items()}


def preservation(features: np.ndarray, zero_index: int) -> np.ndarray:
    """Cosine similarity of every image to its own image at scale 0, by features of what should not change; 1
    = nothing else moved.

    features: (P, S, K, d). Returns (P, S, K), 1 at scale 0.
    """
    return cosine(features, features[:, :, zero_index, None])
