"""Features to effects: what a control changes, and what it should have left alone.

Arrays are numpy; P prompts, S seeds, K scales, d features. Which network made the features is not asked here.
"""

import numpy as np

FLOOR = 0.01  # a mean CLIP cosine below this is no base for a percentage


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity over the last axis, (..., d) with (..., d) to (...); 0 where a vector is 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.where(lengths == 0, 1, lengths)


def change(score: np.ndarray, zero_index: int) -> np.ndarray:
    """A score (P, S, K) minus its own value at scale 0: the effect, exactly 0 at scale 0."""
    score = np.asarray(score, dtype=np.float64)
    return score - score[..., zero_index, None]


def own_directions(features: np.ndarray, zero_index: int) -> np.ndarray:
    """Where a control without words moves images: the mean change from scale 0 to the largest scale, unit
    length, one per prompt.

    features: (P, S, K, d). Returns (P, d): each prompt's from the other prompts, so that no image measures
    itself; 0 without a change.
    """
    moved = (features[:, :, -1] - features[:, :, zero_index]).mean(1)  # (P, d)
    others = (moved.sum(0) - moved) / (len(moved) - 1) if len(moved) > 1 else moved
    lengths = np.linalg.norm(others, axis=1, keepdims=True)
    return others / np.where(lengths == 0, 1, lengths)


def percent_change(edited: np.ndarray, plain: np.ndarray) -> float | None:
    """Change of the mean CLIP score in %, the column of the paper's Table 1.

    edited, plain: cosines of the images at a scale and at scale 0 with the control's text, any shape. A ratio
    of means, not a mean of ratios; None where the plain mean is below FLOOR, for a percentage of nearly
    nothing says nothing. Source: Gandikota & Bau 2025, arXiv 2503.10637, Table 1.
    """
    base = float(np.mean(plain))
    return 100 * (float(np.mean(edited)) / base - 1) if base >= FLOOR else None


def preservation(features: np.ndarray, zero_index: int) -> np.ndarray:
    """Cosine similarity of every image to its own image at scale 0, by features of what should not change; 1
    = nothing else moved.

    features: (P, S, K, d). Returns (P, S, K), 1 at scale 0.
    """
    return cosine(features, features[:, :, zero_index, None])
