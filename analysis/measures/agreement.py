"""How far evaluators agree in their verdicts: Cohen's κ. Words in, numbers out."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from controls import intervals


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two judges' verdicts on the same cells beyond chance: 1 always, 0 as by chance.

    κ = (observed - expected) / (1 - expected), expected from how often each says each word (Cohen 1960). None
    where one of them says a single word throughout, or nothing: it tells no cells apart, and κ would be 0
    whatever the other says.
    """
    count, one, two = len(first), Counter(first), Counter(second)
    if min(len(one), len(two)) < 2:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) * count
    expected = sum(one[word] * two[word] for word in one)  # both times count²
    return (observed - expected) / (count**2 - expected)


def interval(first: Sequence[str], second: Sequence[str], controls: Sequence[str]) -> dict:
    """κ with a jackknife over controls, whose cells are alike, cut at -1 and 1.

    No ends with fewer than three controls, nor where κ without one of them is not defined.
    """
    value = kappa(first, second)
    if value is None:
        return dict(intervals.UNDEFINED)
    without = []
    for control in dict.fromkeys(controls):
        kept = [k for k, name in enumerate(controls) if name != control]
        left = kappa([first[k] for k in kept], [second[k] for k in kept])
        without.append(np.nan if left is None else left)
    found = intervals.jackknife(value, without)
    return {end: None if x is None else min(max(x, -1.0), 1.0) for end, x in found.items()}


def pairs(verdicts: dict[str, Sequence[str]], controls: Sequence[str]) -> list[dict]:
    """One entry per pair of evaluators.

    verdicts: by evaluator, a word per cell; controls: whose cell it is. same: the share of equal words, None
    without cells.
    """
    return [
        {
            "first": one,
            "second": two,
            "cells": len(controls),
            "controls": len(set(controls)),
            "same": float(np.mean([a == b for a, b in zip(verdicts[one], verdicts[two], strict=True)]))
            if controls
            else None,
            "kappa": interval(verdicts[one], verdicts[two], controls),
        }
        for one, two in combinations(verdicts, 2)
    ]
